/* Dispatch: which ISA this processor runs. Compiled with the baseline's flags: it runs before anything is known.
 *
 * In: a name or NULL.  Out: a table of kernels, or NULL.
 */
#include <string.h>

#include "kernels.h"

extern const cconv_isa cconv_isa_generic;
#if defined(__x86_64__)
extern const cconv_isa cconv_isa_avx2, cconv_isa_avx512;
#endif

const cconv_isa *cconv_list(int i, int *usable) {
    *usable = 1;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (i == 0) {
        /* libgcc also asks whether the operating system saves the wide registers. */
        *usable = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        return &cconv_isa_avx512;
    }
    if (i == 1) {
        *usable = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        return &cconv_isa_avx2;
    }
    i -= 2;
#endif
    return i == 0 ? &cconv_isa_generic : NULL;
}

const cconv_isa *cconv_select(const char *name) {
    int usable;
    const cconv_isa *isa;
    for (int i = 0; (isa = cconv_list(i, &usable)) != NULL; i++)
        if (usable && (name == NULL || strcmp(name, isa->name) == 0)) return isa;
    return NULL;
}
