/* Depthwise: one output map from one input map, y = activation(conv(x, weight) + bias + residual).
 *
 * In: T; STRIP; R, S, STRIDE of the kernels that are worth their own code, dilation 1; R = 0: all of them at run time,
 * with STRIP 1; ACTIVATE.
 * Out: maps (N, K, P, Q), K = C * multiplier.
 *
 * A thread has one column of STRIP rows of outputs: every input that it loads serves all windows that hold it, and
 * neighbouring threads load neighbouring inputs.
 *
 *     STRIDE 1, R = 3:   rows of inputs   0 1 2 3 4 5      Kernels known ahead have their taps in registers; a sum of
 *     output 0                            * * *            at most 49 products is one chain. Others are summed in
 *     output 1                              * * *          chains of `chain` products, like those of conv.cu.
 *     ...
 */
#include "cc.cuh"

#define THREADS 256

struct Depthwise {
    const T *x;
    const T *weight;
    const T *bias;
    const T *residual;
    T *y;
    long long maps;
    int H, W, P, Q, K, multiplier, span, blocks_per_map, maps_per_block;
    int kernel_rows, kernel_columns, stride_down, stride_across, dilation_down, dilation_across, top, left, chain;
    double alpha;
};

CC_KERNEL(THREADS) depthwise(const Depthwise p) {
    long long map;
    int place;
    if (!cc_place(THREADS, p.span, p.blocks_per_map, p.maps_per_block, p.maps, &map, &place)) return;
    const int q = place % p.Q, strip = place / p.Q * STRIP, k = (int)(map % p.K);
    const T *x = p.x + map / p.multiplier * p.H * p.W;
    T sums[STRIP];
    CC_UNROLL for (int i = 0; i < STRIP; i++) sums[i] = 0;
#if R
    const T *weight = p.weight + (long long)k * (R * S);
    const int top = strip * STRIDE - p.top, left = q * STRIDE - p.left;
    T taps[R * S];
    CC_UNROLL for (int i = 0; i < R * S; i++) taps[i] = weight[i];
    CC_UNROLL for (int i = 0; i < (STRIP - 1) * STRIDE + R; i++) {
        const int row = top + i;
        const bool in_map = (unsigned)row < (unsigned)p.H;
        CC_UNROLL for (int s = 0; s < S; s++) {
            const int column = left + s;
            T value = 0;
            if (in_map && (unsigned)column < (unsigned)p.W) value = x[(long long)row * p.W + column];
            CC_UNROLL for (int o = 0; o < STRIP; o++)
                if (i >= o * STRIDE && i < o * STRIDE + R)
                    sums[o] = cc_fma(taps[(i - o * STRIDE) * S + s], value, sums[o]);
        }
    }
#else
    const T *weight = p.weight + (long long)k * p.kernel_rows * p.kernel_columns;
    const int top = strip * p.stride_down - p.top, left = q * p.stride_across - p.left;
    T total = 0;
    int left_of_chain = p.chain;
    for (int r = 0; r < p.kernel_rows; r++)
        for (int s = 0; s < p.kernel_columns; s++) {
            const int row = top + r * p.dilation_down, column = left + s * p.dilation_across;
            T value = 0;
            if ((unsigned)row < (unsigned)p.H && (unsigned)column < (unsigned)p.W)
                value = x[(long long)row * p.W + column];
            sums[0] = cc_fma(weight[(long long)r * p.kernel_columns + s], value, sums[0]);
            if (--left_of_chain == 0) {
                left_of_chain = p.chain;
                total += sums[0];
                sums[0] = 0;
            }
        }
    sums[0] += total;
#endif
    const T bias = p.bias ? p.bias[k] : T(0), alpha = (T)p.alpha;
    CC_UNROLL for (int o = 0; o < STRIP; o++) {
        if (strip + o >= p.P) break;
        const long long at = (map * p.P + strip + o) * p.Q + q;
        T value = sums[o] + bias;
        if (p.residual) value += p.residual[at];
        p.y[at] = ACTIVATE(value, alpha);
    }
}
