/* Instance: every kernel for one element type of one ISA, and the table that lists them.
 *
 * In: T, BYTES, SCALAR, PACKED, LANES, NAME, MATH, TILE_ROWS, EACH_ROWS.  Out: NAME(kernels).
 */
#include "simd.h"

#include "pack.inc.c"
#include "step.inc.c"
#include "multiply.inc.c"
#include "exponentials.inc.c"
#include "finish.inc.c"
#include "depthwise.inc.c"
#include "winograd.inc.c"
#include "filters.inc.c"
#include "pool.inc.c"
#include "tensors.inc.c"

static const cconv_kernels NAME(kernels) = {
    .lanes = LANES, .rows = TILE_ROWS, .vectors = 2, .wide_vectors = WIDE_VECTORS,
    .kept = MOST_KEPT, .outputs = sizeof NAME(widest) - 1,
    .widest = NAME(widest),
#define CCONV_KERNEL(name, arguments) .name = NAME(name),
#include "kernels.inc"
#undef CCONV_KERNEL
};

#undef V
#undef load
#undef store
#undef stream
#undef LINE
#undef splat
#undef between
#undef load_lanes
#undef load_anywhere
#undef store_lanes
#undef AHEAD
#undef AT_ONCE
#undef EXPECT
#undef select
#undef LARGER
#undef SMALLER
#undef flip
#undef PLACE
#undef load_columns
#undef store_columns
#undef BY_HALVES
#undef NUMBER
#undef NUMBERS
#undef JOINED
#undef LOWER
#undef UPPER
#undef EVEN_MIXED
#undef ODD_MIXED
#undef LOW_OF_HALVES
#undef HIGH_OF_HALVES
#undef LOW
#undef HIGH
#undef EVEN
#undef ODD
#undef NEXT
#undef PREVIOUS
#undef CHANNELS
#undef CHANNELS_BOTH
#undef CHANNELS_ENTRY
#undef CHANNELS_STEPS
#undef PIXELS_STEPS
#undef IN_ASSEMBLY
#undef CHANNELS_WIDE
#undef CHANNELS_WIDE_ENTRY
#undef WIDE_VECTORS
#undef MOST_KEPT
#undef KEPT
#undef EACH_TOTAL
#undef NOTHING
#undef PIXELS
#undef EACH_SUM
#undef SUM
#undef TOTAL
#undef PIXELS_1
#undef PIXELS_2
#undef PIXELS_3
#undef PIXELS_4
#undef PIXELS_5
#undef PIXELS_6
#undef PIXELS_8
#undef PIXELS_UP_TO
#undef ENTRY
#undef ENTRIES_1
#undef ENTRIES_2
#undef ENTRIES_3
#undef ENTRIES_4
#undef ENTRIES_5
#undef ENTRIES_6
#undef ENTRIES_8
#undef ENTRIES_UP_TO
#undef WIDEST
#undef BLOCK
#undef WIDEST_ROW
#undef MOST_READ
#undef INSIDE
#undef TAPS
#undef REACH
#undef EACH_TAP
#undef STRIP_ROWS
#undef STRIP_OUTPUTS
#undef STRIP_PITCH
#undef STRIP_ODD
#undef FILL
#undef ROWS
#undef MOST_TAPS
#undef DEPTHWISE
#undef MOST_POINTS
#undef CHANNELS_AT_ONCE
#undef MOST_OUTPUTS
#undef EACH_WINOGRAD
#undef STRIP_TILES
#undef TILES_PITCH
#undef DOUBLES
#undef INPUT
#undef OUTPUT
#undef WIDENED
#undef NARROWED
#undef FILTER
