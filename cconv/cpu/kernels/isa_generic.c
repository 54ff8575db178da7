/* Any processor: 16-byte vectors as the compiler's target has them (SSE2 on x86-64, NEON on aarch64). */
#define ISA generic
#define VECTOR_BYTES 16
#define TILE_ROWS 4
#define EACH_ROWS(X) X(1) X(2) X(3) X(4)
#define EACH_PIXELS(X) \
    X(1, 4) X(2, 4) X(3, 3) X(4, 2) X(5, 2) X(6, 2) X(7, 1) X(8, 1)
#include "isa.inc.c"
