/* AVX-512 F, BW, DQ, VL: 32 registers = 14 x 2 sums + 2 of weights + 1 broadcast; 14 divides 224, 112, 56, 28, 14. */
#define ISA avx512
#define VECTOR_BYTES 64
#define TILE_ROWS 14
#define EACH_ROWS(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14)
#define EACH_PIXELS(X) \
    X(1, 8) X(2, 8) X(3, 8) X(4, 6) X(5, 5) X(6, 4) X(7, 3) X(8, 3) X(9, 3) X(10, 2) X(11, 2) X(12, 2) \
    X(13, 2) X(14, 2) X(15, 1) X(16, 1) X(17, 1) X(18, 1) X(19, 1) X(20, 1) X(21, 1) X(22, 1) X(23, 1) \
    X(24, 1) X(25, 1) X(26, 1) X(27, 1) X(28, 1)
#include "isa.inc.c"
