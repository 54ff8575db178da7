/* ISA: both element types for one instruction set.
 *
 * In: ISA (its name), VECTOR_BYTES, TILE_ROWS, EACH_ROWS.  Out: cconv_isa_<ISA>, the only symbol of the object file.
 */
#include <math.h>
#include <string.h>

#include "kernels.h"

#define T float
#define LANES (VECTOR_BYTES / 4)
#define NAME(x) x##_f32
#define MATH(function) function##f
#include "instance.inc.c"
#undef T
#undef LANES
#undef NAME
#undef MATH

#define T double
#define LANES (VECTOR_BYTES / 8)
#define NAME(x) x##_f64
#define MATH(function) function
#include "instance.inc.c"

#define STRING_(x) #x
#define STRING(x) STRING_(x)
#define SYMBOL_(x) cconv_isa_##x
#define SYMBOL(x) SYMBOL_(x)
const cconv_isa SYMBOL(ISA) = {STRING(ISA), VECTOR_BYTES, kernels_f32, kernels_f64};
