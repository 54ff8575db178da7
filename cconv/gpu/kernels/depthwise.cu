/* Depthwise: one output map from one input map, y = activation(conv(x, weight) + bias + residual).
 *
 * In: T; STRIP; R, S, STRIDE of the kernels that are worth their own code, dilation 1; R = 0: all of them at run time;
 * ACTIVATE.
 * Out: maps (N, K, P, Q), K = C * multiplier.
 *
 * A thread has STRIP rows of COLUMNS neighbouring outputs, or one output where R = 0: every input that it loads serves
 * all windows that hold it.
 *
 *     STRIDE 1, R = 3:   rows of inputs   0 1 2 3 4 5      Kernels known ahead have their taps in registers; a sum of
 *     outputs 0                           * * *            at most 49 products is one chain. Others are summed in
 *     outputs 1                             * * *          chains of `chain` products, like those of conv.cu.
 *     ...
 *     a row of inputs    | halo | COLUMNS * STRIDE | rest |      where `aligned`, the middle is loaded as vectors
 *
 * Assumptions: if `aligned`, the left padding is HALO, W and Q are multiples of LANES, and x, residual and y are
 * aligned to 16 bytes.
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
    int H, W, P, Q, K, multiplier, across, span, blocks_per_map, maps_per_block, aligned;
    int kernel_rows, kernel_columns, stride_down, stride_across, dilation_down, dilation_across, top, left, chain;
    double alpha;
};

#if R
#define COLUMNS LANES
#define HALO (S / 2)
#define WINDOW ((COLUMNS - 1) * STRIDE + S)
/* Left alone, ptxas spills 16 bits at stride 2 to have 64 registers. */
#define BLOCKS (sizeof(T) == 2 && STRIDE == 2 ? 2 : 0)

/* A row of the window, zeros outside. */
template <bool ALIGNED> CC_DEVICE void load_row(const Depthwise &p, const T *x, int row, int left, A *in) {
    const bool in_map = (unsigned)row < (unsigned)p.H;
    x += (long long)row * p.W + left;
    CC_UNROLL for (int j = 0; j < WINDOW; j++) in[j] = 0;
    CC_UNROLL for (int j = 0; j < WINDOW; j++) {
        if (ALIGNED && j >= HALO && j < HALO + COLUMNS * STRIDE) continue;
        if (in_map && (unsigned)(left + j) < (unsigned)p.W) in[j] = x[j];
    }
    if (!ALIGNED) return;
    CC_UNROLL for (int v = 0; v < STRIDE; v++) {
        Vector middle;
        CC_UNROLL for (int l = 0; l < LANES; l++) middle.lane[l] = 0;
        const int begin = HALO + v * LANES;
        if (in_map && left + begin < p.W) middle = cc_load(x + begin);
        CC_UNROLL for (int l = 0; l < LANES; l++)
            if (begin + l < WINDOW) in[begin + l] = middle.lane[l];
    }
}

/* STRIP x COLUMNS outputs of a map, from (first, q) on. */
template <bool ALIGNED>
CC_DEVICE void strip_of(const Depthwise &p, long long map, int k, const T *x, int first, int q) {
    const A bias = p.bias ? (A)p.bias[k] : A(0), alpha = (A)p.alpha;
    const int top = first * STRIDE - p.top, left = q * STRIDE - p.left;
    const T *weight = p.weight + (long long)k * (R * S);
    A taps[R * S], sums[STRIP][COLUMNS];
    CC_UNROLL for (int i = 0; i < R * S; i++) taps[i] = weight[i];
    CC_UNROLL for (int o = 0; o < STRIP; o++)
        CC_UNROLL for (int c = 0; c < COLUMNS; c++) sums[o][c] = 0;
    CC_UNROLL for (int i = 0; i < (STRIP - 1) * STRIDE + R; i++) {
        A in[WINDOW];
        load_row<ALIGNED>(p, x, top + i, left, in);
        CC_UNROLL for (int o = 0; o < STRIP; o++)
            CC_UNROLL for (int s = 0; s < S; s++)
                CC_UNROLL for (int c = 0; c < COLUMNS; c++)
                    if (i >= o * STRIDE && i < o * STRIDE + R)
                        sums[o][c] = cc_fma(taps[(i - o * STRIDE) * S + s], in[c * STRIDE + s], sums[o][c]);
    }
    CC_UNROLL for (int o = 0; o < STRIP; o++) {
        if (first + o >= p.P) break;
        const long long at = (map * p.P + first + o) * p.Q + q;
        Vector v, r;
        if (ALIGNED && p.residual) r = cc_load(p.residual + at);
        CC_UNROLL for (int c = 0; c < COLUMNS; c++) {
            if (!ALIGNED && q + c >= p.Q) continue;
            A value = sums[o][c] + bias;
            if (p.residual) value += ALIGNED ? r.lane[c] : (A)p.residual[at + c];
            v.lane[c] = ACTIVATE(value, alpha);
            if (!ALIGNED) p.y[at + c] = v.lane[c];
        }
        if (ALIGNED) cc_store(p.y + at, v);
    }
}
#else
#define BLOCKS 4
#endif

CC_KERNEL(THREADS, BLOCKS) depthwise(const Depthwise p) {
    long long map;
    int place;
    if (!cc_place(THREADS, p.span, p.blocks_per_map, p.maps_per_block, p.maps, &map, &place)) return;
    const int strip = place / p.across, k = (int)(map % p.K);
    const T *x = p.x + map / p.multiplier * p.H * p.W;
#if R
    const int first = strip * STRIP, q = (place - strip * p.across) * COLUMNS;
    if (p.aligned) strip_of<true>(p, map, k, x, first, q);
    else strip_of<false>(p, map, k, x, first, q);
#else
    const int q = place - strip * p.across;
    const T *weight = p.weight + (long long)k * p.kernel_rows * p.kernel_columns;
    const int top = strip * p.stride_down - p.top, left = q * p.stride_across - p.left;
    A sum = 0, total = 0;
    int left_of_chain = p.chain;
    for (int r = 0; r < p.kernel_rows; r++)
        for (int s = 0; s < p.kernel_columns; s++) {
            const int row = top + r * p.dilation_down, column = left + s * p.dilation_across;
            A value = 0;
            if ((unsigned)row < (unsigned)p.H && (unsigned)column < (unsigned)p.W)
                value = x[(long long)row * p.W + column];
            sum = cc_fma((A)weight[(long long)r * p.kernel_columns + s], value, sum);
            if (--left_of_chain == 0) {
                left_of_chain = p.chain;
                total += sum;
                sum = 0;
            }
        }
    const long long at = (map * p.P + strip) * p.Q + q;
    A value = total + sum + (p.bias ? (A)p.bias[k] : A(0));
    if (p.residual) value += p.residual[at];
    p.y[at] = ACTIVATE(value, (A)p.alpha);
#endif
}
