/* Step: what both multiplications repeat: c[i * W + v] += scalars[i] * vectors[v], for R scalars and W vectors.
 *
 * In: T, BYTES, SCALAR, PACKED (the suffixes of its instructions), NAME, simd.h.
 * Out: step; IN_ASSEMBLY(R, W), whether it is written in assembly for a tile of that shape.
 *
 * With 16 registers, a tile of 12 sums leaves none to spare. GCC reads a vector of a 4 x 3 tile again for every sum
 * that it goes into, 10 loads per 12 multiply-adds where 7 will do, and cannot take several steps in a turn of lanes
 * "pixels". Loads and instructions are free as long as nothing else uses the core; beside a busy hyperthread these
 * tiles lost a tenth (docs/kernels.md). Hence assembly for them.
 */
#define EVERY_ROW _Pragma("GCC unroll 32") for (int i = 0; i < R; i++)
#define EVERY_VECTOR _Pragma("GCC unroll 8") for (int v = 0; v < W; v++)

/* A sanitizer does not see what assembly reads; unless it optimizes, the compiler does not see that _at is constant. */
#if defined(__x86_64__) && defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__) && defined(__OPTIMIZE__) && \
    !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define IN_ASSEMBLY(R, W) (((R) == 4 && (W) == 3) || ((R) == 6 && (W) == 2) || ((R) == 3 && (W) == 4))
#define LOAD(v, to) "vmovups " #v "*32+%c[vectors_at](%[vectors]), %%ymm" #to "\n\t"
#define SPLAT(i, to)                                                                                                   \
    "vbroadcast" SCALAR " " #i "*" STRING(BYTES) "+%c[scalars_at](%[scalars],%[index]," STRING(BYTES) "), "            \
    "%%ymm" #to "\n\t"
#define FMA(sum, x, y) "vfmadd231" PACKED " %%ymm" #x ", %%ymm" #y ", %[c" #sum "]\n\t"
#define ROW_OF_2(i, first, second) SPLAT(i, 15) FMA(first, 15, 13) FMA(second, 15, 14)
#define ROW_OF_3(i, first, second, third) SPLAT(i, 15) FMA(first, 15, 12) FMA(second, 15, 13) FMA(third, 15, 14)
#define COLUMN_OF_3(v, first, second, third) LOAD(v, 15) FMA(first, 15, 12) FMA(second, 15, 13) FMA(third, 15, 14)
#define ASSEMBLE(...)                                                                                                  \
    __asm__ volatile(                                                                                                  \
        __VA_ARGS__                                                                                                    \
        : [c0] "+x"(c[0]), [c1] "+x"(c[1]), [c2] "+x"(c[2]), [c3] "+x"(c[3]), [c4] "+x"(c[4]), [c5] "+x"(c[5]),        \
          [c6] "+x"(c[6]), [c7] "+x"(c[7]), [c8] "+x"(c[8]), [c9] "+x"(c[9]), [c10] "+x"(c[10]), [c11] "+x"(c[11])     \
        : [vectors] "r"(vectors), [scalars] "r"(scalars), [index] "r"(index), [vectors_at] "i"(vectors_at * BYTES),    \
          [scalars_at] "i"(scalars_at * BYTES)                                                                         \
        : "xmm12", "xmm13", "xmm14", "xmm15")
#else
#define IN_ASSEMBLY(R, W) 0
#endif

/* The vectors begin at vectors + vectors_at, the scalars at scalars + index + scalars_at; R, W and both _at are
 * constants wherever this is used. Assumptions: nothing has been stored there since the function began that uses it,
 * and that is called through a pointer, so that the compiler takes it to read anything. */
static inline __attribute__((always_inline)) void NAME(step)(const int R, const int W, V *c, const T *vectors,
                                                             const int vectors_at, const T *scalars, ptrdiff_t index,
                                                             const int scalars_at) {
#ifdef ASSEMBLE
    if (R == 4 && W == 3)
        ASSEMBLE(LOAD(0, 12) LOAD(1, 13) LOAD(2, 14) ROW_OF_3(0, 0, 1, 2) ROW_OF_3(1, 3, 4, 5) ROW_OF_3(2, 6, 7, 8)
                     ROW_OF_3(3, 9, 10, 11));
    else if (R == 6 && W == 2)
        ASSEMBLE(LOAD(0, 13) LOAD(1, 14) ROW_OF_2(0, 0, 1) ROW_OF_2(1, 2, 3) ROW_OF_2(2, 4, 5) ROW_OF_2(3, 6, 7)
                     ROW_OF_2(4, 8, 9) ROW_OF_2(5, 10, 11));
    else if (R == 3 && W == 4)
        ASSEMBLE(SPLAT(0, 12) SPLAT(1, 13) SPLAT(2, 14) COLUMN_OF_3(0, 0, 4, 8) COLUMN_OF_3(1, 1, 5, 9)
                     COLUMN_OF_3(2, 2, 6, 10) COLUMN_OF_3(3, 3, 7, 11));
    else
#endif
    {
        vectors += vectors_at;
        scalars += index + scalars_at;
        V x[16];
        if (W < R) {
            EVERY_VECTOR x[v] = load(vectors + v * LANES);
            EVERY_ROW {
                V scalar = splat(scalars[i]);
                EVERY_VECTOR c[i * W + v] += scalar * x[v];
            }
        } else {
            EVERY_ROW x[i] = splat(scalars[i]);
            EVERY_VECTOR {
                V vector = load(vectors + v * LANES);
                EVERY_ROW c[i * W + v] += x[i] * vector;
            }
        }
    }
}

#undef EVERY_ROW
#undef EVERY_VECTOR
#undef LOAD
#undef SPLAT
#undef FMA
#undef ROW_OF_2
#undef ROW_OF_3
#undef COLUMN_OF_3
#undef ASSEMBLE
