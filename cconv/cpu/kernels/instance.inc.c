/* Instance: every kernel for one element type of one ISA, and the table that lists them.
 *
 * In: T, LANES, NAME, MATH, TILE_ROWS, EACH_ROWS.  Out: NAME(kernels).
 */
#include "simd.h"

#include "conv.inc.c"
#include "finish.inc.c"
#include "pool.inc.c"

static const cconv_kernels NAME(kernels) = {
    .lanes = LANES, .rows = TILE_ROWS, .vectors = 2, .outputs = 4,
#define CCONV_KERNEL(name, arguments) .name = NAME(name),
#include "kernels.inc"
#undef CCONV_KERNEL
};

#undef V
#undef load
#undef store
#undef splat
#undef LOW
#undef HIGH
#undef CHANNELS
#undef CHANNELS_BOTH
#undef CHANNELS_ENTRY
#undef PIXELS
#undef PIXELS_LOOP
#undef FINISH_LOOP
