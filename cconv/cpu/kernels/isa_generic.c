/* Any processor: 16-byte vectors as the compiler's target has them (SSE2 on x86-64, NEON on aarch64). */
#define ISA generic
#define VECTOR_BYTES 16
#define TILE_ROWS 4
#define EACH_ROWS(X) X(1) X(2) X(3) X(4)
#include "isa.inc.c"
