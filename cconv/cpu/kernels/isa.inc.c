/* ISA: both element types for one instruction set.
 *
 * In: ISA (its name), VECTOR_BYTES, TILE_ROWS, EACH_ROWS, EACH_PIXELS.  Out: cconv_isa_<ISA>, the only symbol of the
 * object file.
 */
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

/* The value as rounded, so that a product is not fused into the sum that follows. */
#if defined(__x86_64__)
#if defined(__AVX512F__)
#define ROUNDED_IN "+v"
#else
#define ROUNDED_IN "+x"
#endif
#elif defined(__aarch64__)
#define ROUNDED_IN "+w"
#else
#define ROUNDED_IN "+m"
#endif
#define ROUNDED(value)                                                                                                 \
    ({                                                                                                                 \
        __typeof__(value) rounded_ = (value);                                                                          \
        __asm__("" : ROUNDED_IN(rounded_));                                                                            \
        rounded_;                                                                                                      \
    })

#define STRING_(x) #x
#define STRING(x) STRING_(x)

#define T float
#define SCALAR "ss"
#define PACKED "ps"
#define MASKED(op) op##_ps
#define WIDE __m512
#define BYTES 4
#define LANES (VECTOR_BYTES / BYTES)
#define NAME(x) x##_f32
#define MATH(function) function##f
#include "instance.inc.c"
#undef T
#undef SCALAR
#undef PACKED
#undef BYTES
#undef LANES
#undef NAME
#undef MATH
#undef MASKED
#undef WIDE

#define T double
#define SCALAR "sd"
#define PACKED "pd"
#define MASKED(op) op##_pd
#define WIDE __m512d
#define BYTES 8
#define LANES (VECTOR_BYTES / BYTES)
#define NAME(x) x##_f64
#define MATH(function) function
#include "instance.inc.c"

#define SYMBOL_(x) cconv_isa_##x
#define SYMBOL(x) SYMBOL_(x)
const cconv_isa SYMBOL(ISA) = {STRING(ISA), VECTOR_BYTES, kernels_f32, kernels_f64};
