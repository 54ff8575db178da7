/* Depthwise: one output map from one input map, read in place.
 *
 * In: T, NAME, simd.h, activated() of finish.inc.c.  Out: depthwise.
 *
 * A vector holds neighbouring outputs of a row. A tap of theirs is a vector of neighbouring inputs (stride 1), or every
 * other of two vectors (stride 2); what lies outside the image is masked away, so no padded copy is needed:
 *
 *     row of the image      x0 x1 x2 x3 x4 ...         stride 1, tap s:  lanes q - left + s
 *     tap s = 0, left = 1    0 x0 x1 x2 ...            stride 2, tap s:  EVEN of lanes 2q - left + s
 *
 * With stride 1 down the image a block of BLOCK output rows shares the input rows: each vector loaded feeds up to
 * R of them. Every sum is one chain of fused multiply-adds in the order of the taps (r, s).
 */
#define BLOCK 4
#define MOST_TAPS 5

/* Outputs p .. p + rows - 1, q .. q + LANES - 1 from their sums. */
static inline __attribute__((always_inline)) void NAME(depthwise_store)(const cconv_depthwise *how,
                                                                        const cconv_finish *finish, const V *sum,
                                                                        V bias, const T *residual, T *y, long p, long q,
                                                                        const int rows) {
    const NAME(lanes) lanes = between(0, how->Q - q);
    _Pragma("GCC unroll 4") for (int b = 0; b < rows; b++) {
        long at = (p + b) * how->Q + q;
        V z = sum[b] + bias;
        if (residual) z += load_lanes(residual + at, lanes);
        store_lanes(y + at, activated(finish, z), lanes);
    }
}

/* `rows` rows of outputs from row p on, with every size a constant and the taps of a row side by side. With more than
 * one row, stride and dilation of rows are 1. */
static inline __attribute__((always_inline)) void NAME(depthwise_rows)(const cconv_depthwise *how,
                                                                       const cconv_finish *finish, const T *x,
                                                                       const T *w, V bias, const T *residual, T *y,
                                                                       long p, const int rows, const int stride,
                                                                       const int size) {
    const T *row[MOST_TAPS + BLOCK];
    int inside[MOST_TAPS + BLOCK];
    _Pragma("GCC unroll 8") for (int i = 0; i < size + rows - 1; i++) {
        long h = p * how->stride_h - how->top + i * how->dilation_h;
        inside[i] = h >= 0 && h < how->H;
        row[i] = x + (inside[i] ? h * how->row_pitch : 0);
    }
    for (long q = 0; q < how->Q; q += LANES) {
        const long column = q * stride - how->left;
        NAME(lanes) near[MOST_TAPS], far[MOST_TAPS]; /* in the image, of the first and the second vector of a tap */
        V sum[BLOCK];
        _Pragma("GCC unroll 6") for (int s = 0; s < size; s += stride) {
            near[s] = between(-column - s, how->W - column - s);
            far[s] = between(-column - s - LANES, how->W - column - s - LANES);
        }
        _Pragma("GCC unroll 4") for (int b = 0; b < rows; b++) sum[b] = (V){0};
        _Pragma("GCC unroll 8") for (int i = 0; i < size + rows - 1; i++) { /* tap row i - b of output row b */
            V v[MOST_TAPS + 1];
            _Pragma("GCC unroll 6") for (int s = 0; s < size; s += stride) {
                V a = load_lanes(row[i] + column + s, only(inside[i], near[s]));
                v[s] = a;
                if (stride == 2) {
                    V b = load_lanes(row[i] + column + s + LANES, only(inside[i], far[s]));
                    v[s] = EVEN(a, b);
                    v[s + 1] = ODD(a, b);
                }
            }
            _Pragma("GCC unroll 4") for (int b = 0; b < rows; b++)
                if (i >= b && i - b < size)
                    _Pragma("GCC unroll 5") for (int s = 0; s < size; s++)
                        sum[b] += v[s] * splat(w[(i - b) * size + s]);
        }
        NAME(depthwise_store)(how, finish, sum, bias, residual, y, p, q, rows);
    }
}

#define DEPTHWISE(ROWS, STRIDE, SIZE)                                                                                  \
    static __attribute__((noinline)) void NAME(depthwise_##ROWS##_##STRIDE##_##SIZE)(                                  \
        const cconv_depthwise *how, const cconv_finish *finish, const T *x, const T *w, V bias, const T *residual,     \
        T *y, long p) {                                                                                                \
        NAME(depthwise_rows)(how, finish, x, w, bias, residual, y, p, ROWS, STRIDE, SIZE);                             \
    }
DEPTHWISE(4, 1, 3)
DEPTHWISE(1, 1, 3)
DEPTHWISE(1, 2, 3)
DEPTHWISE(4, 1, 5)
DEPTHWISE(1, 1, 5)
DEPTHWISE(1, 2, 5)

/* One row of outputs, any filter. */
static __attribute__((noinline)) void NAME(depthwise_any)(const cconv_depthwise *how, const cconv_finish *finish,
                                                          const T *x, const T *w, V bias, const T *residual, T *y,
                                                          long p) {
    for (long q = 0; q < how->Q; q += LANES) {
        V sum = {0};
        for (long r = 0; r < how->R; r++) {
            long h = p * how->stride_h - how->top + r * how->dilation_h;
            const int inside = h >= 0 && h < how->H;
            const T *row = x + (inside ? h * how->row_pitch : 0);
            for (long s = 0; s < how->S; s++) {
                long column = q * how->stride_w - how->left + s * how->dilation_w;
                V v = load_lanes(row + column, only(inside, between(-column, how->W - column)));
                if (how->stride_w == 2)
                    v = EVEN(v, load_lanes(row + column + LANES,
                                           only(inside, between(-column - LANES, how->W - column - LANES))));
                sum += v * splat(w[r * how->S + s]);
            }
        }
        NAME(depthwise_store)(how, finish, &sum, bias, residual, y, p, q, 1);
    }
}

/* Output rows first .. last-1 of one map. Strides of columns are 1 or 2. */
static void NAME(depthwise)(const cconv_depthwise *how, const cconv_finish *finish, double bias, long first, long last,
                            const void *source, const void *weight, const void *residual, void *target) {
    typedef void (*rows_kernel)(const cconv_depthwise *, const cconv_finish *, const T *, const T *, V, const T *, T *,
                                long);
    const int near = how->stride_h == 1 && how->dilation_h == 1 && how->stride_w == 1;
    rows_kernel block = NULL, row = NAME(depthwise_any);
    if (how->R == 3 && how->S == 3 && how->dilation_w == 1) {
        row = how->stride_w == 1 ? NAME(depthwise_1_1_3) : NAME(depthwise_1_2_3);
        if (near) block = NAME(depthwise_4_1_3);
    } else if (how->R == 5 && how->S == 5 && how->dilation_w == 1) {
        row = how->stride_w == 1 ? NAME(depthwise_1_1_5) : NAME(depthwise_1_2_5);
        if (near) block = NAME(depthwise_4_1_5);
    }
    long p = first;
    for (; block && p + BLOCK <= last; p += BLOCK)
        block(how, finish, source, weight, splat((T)bias), residual, target, p);
    for (; p < last; p++) row(how, finish, source, weight, splat((T)bias), residual, target, p);
}
