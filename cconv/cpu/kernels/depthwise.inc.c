/* Depthwise: one output map from one input map, 3x3 or 5x5, strides 1 or 2.
 *
 * In: T, NAME, ROUNDED, simd.h, curved(), curve() and activated_as() of finish.inc.c.
 * Out: depthwise; activate() for other epilogues.
 *
 * A vector holds neighbouring outputs of a row. Up to BLOCK output rows are summed at once, so that each vector loaded
 * feeds all of the rows that read it; every sum is one chain of fused multiply-adds, in one order whatever the block.
 * How the taps are read depends on the ISA: where masks are free, in place (depthwise_rows.inc.c), else from a copy
 * (depthwise_strips.inc.c).
 */
#define BLOCK 7 /* the maps of most networks are multiples of 7 */
#define WIDEST_ROW 5

/* The activation of all of z, asking once what it is. Curves work on a copy: z itself, in memory, would stay there. */
static inline __attribute__((always_inline)) void NAME(activate)(const cconv_finish *finish, const int count, V *z) {
    const int activation = finish->activation;
    if (activation == CCONV_RELU) {
        _Pragma("GCC unroll 8") for (int i = 0; i < count; i++) z[i] = NAME(activated_as)(CCONV_RELU, z[i], z[i]);
    } else if (NAME(curved)(activation)) {
        T all[8 * LANES];
        _Pragma("GCC unroll 8") for (int i = 0; i < count; i++) store(all + i * LANES, z[i]);
        NAME(curve)(activation, count * LANES, (T)-0.0, all, NULL, all);
        _Pragma("GCC unroll 8") for (int i = 0; i < count; i++) z[i] = load(all + i * LANES);
    } else if (activation != CCONV_NONE) {
        const V alpha = splat((T)finish->alpha);
        _Pragma("GCC unroll 8") for (int i = 0; i < count; i++) z[i] = NAME(activated_as)(activation, alpha, z[i]);
    }
}

/* Outputs p .. p + rows - 1, q .. q + LANES - 1 from their sums; mostly whole vectors that nothing is added to. */
static inline __attribute__((always_inline)) void NAME(depthwise_store)(const cconv_depthwise *how,
                                                                        const cconv_finish *finish, V *sum, V bias,
                                                                        const T *residual, T *y, long p, long q,
                                                                        const int rows) {
    T *to = y + p * how->Q + q;
    _Pragma("GCC unroll 8") for (int b = 0; b < rows; b++) sum[b] += bias;
    if (!residual && q + LANES <= how->Q) {
        if (finish->activation != CCONV_NONE) NAME(activate)(finish, rows, sum);
        _Pragma("GCC unroll 8") for (int b = 0; b < rows; b++) store(to + b * how->Q, sum[b]);
        return;
    }
    const NAME(lanes) lanes = between(0, how->Q - q);
    V z[BLOCK];
    _Pragma("GCC unroll 8") for (int b = 0; b < rows; b++) {
        z[b] = sum[b];
        if (residual) z[b] += load_lanes(residual + (to - y) + b * how->Q, lanes);
    }
    NAME(activate)(finish, rows, z);
    _Pragma("GCC unroll 8") for (int b = 0; b < rows; b++) store_lanes(to + b * how->Q, z[b], lanes);
}

#if defined(__AVX512F__)
#include "depthwise_rows.inc.c"
#else
#include "depthwise_strips.inc.c"
#endif
DEPTHWISE(1, 3)
DEPTHWISE(2, 3)
DEPTHWISE(1, 5)
DEPTHWISE(2, 5)

/* Output rows first .. last-1 of one map. */
static void NAME(depthwise)(const cconv_depthwise *how, const cconv_finish *finish, double bias, long first, long last,
                            const void *source, const void *weight, const void *residual, void *target) {
    /* The bias is no vector: gcc does not clear the upper halves of registers (vzeroupper) before it leaves a function
     * that takes one, and the caller's next SSE instruction then waits for 100 cycles and more. */
    void (*rows)(const cconv_depthwise *, const cconv_finish *, const T *, const T *, T, long, long, const T *, T *);
    if (how->size == 3)
        rows = how->stride == 1 ? NAME(depthwise_1_3) : NAME(depthwise_2_3);
    else
        rows = how->stride == 1 ? NAME(depthwise_1_5) : NAME(depthwise_2_5);
    rows(how, finish, source, weight, (T)bias, first, last, residual, target);
}
