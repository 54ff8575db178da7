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
 * Where rows are as near as columns a block of up to BLOCK output rows shares the input rows: each vector loaded feeds up to
 * R of them. Every sum is one chain of fused multiply-adds in the order of the taps (r, s).
 */
#define BLOCK 4
#define WIDEST_ROW 5

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

/* The taps s of a row, by a chain of shifts where the stride is 2:
 *
 *     row              x0 x1 x2 x3 x4 x5 x6 x7 | x8 ...        (4 lanes)
 *     v[0] = EVEN      x0 x2 x4 x6               v[1] = ODD      x1 x3 x5 x7
 *     v[2] = v[0] and what follows   x2 x4 x6 x8 */
static inline __attribute__((always_inline)) void NAME(load_taps)(const T *row, int inside, const NAME(lanes) *lanes,
                                                                  const int stride, const int size, V *v) {
    if (stride == 1) {
        _Pragma("GCC unroll 5") for (int s = 0; s < size; s++) v[s] = load_lanes(row + s, only(inside, lanes[s]));
        return;
    }
    V a = load_lanes(row, only(inside, lanes[0])), b = load_lanes(row + LANES, only(inside, lanes[1]));
    V c = load_lanes(row + 2 * LANES, only(inside, lanes[2]));
    v[0] = EVEN(a, b);
    v[1] = ODD(a, b);
    _Pragma("GCC unroll 5") for (int s = 2; s < size; s++) {
        v[s] = NEXT(v[s - 2], c);
        if (s + 1 < size) c = NEXT(c, c);
    }
}

/* Outputs p .. p + rows - 1, q .. q + LANES - 1, with every size a constant and the taps of a row side by side. With
 * more than one row, they are `stride` apart in the image and dilation is 1. */
static inline __attribute__((always_inline)) void NAME(depthwise_rows)(
    const cconv_depthwise *how, const cconv_finish *finish, const T *x, const T *w, V bias, const T *residual, T *y,
    long p, long q, const NAME(lanes) *lanes, const int rows, const int stride, const int size) {
    V sum[BLOCK];
    _Pragma("GCC unroll 4") for (int b = 0; b < rows; b++) sum[b] = (V){0};
    _Pragma("GCC unroll 8") for (int i = 0; i < size + (rows - 1) * stride; i++) { /* tap row i - b * stride of row b */
        const long h = p * how->stride_h - how->top + i * how->dilation_h;
        const int inside = h >= 0 && h < how->H;
        V v[WIDEST_ROW];
        NAME(load_taps)(x + (inside ? h * how->row_pitch : 0) + q * stride - how->left, inside, lanes, stride, size, v);
        _Pragma("GCC unroll 4") for (int b = 0; b < rows; b++)
            if (i >= b * stride && i - b * stride < size)
                _Pragma("GCC unroll 5") for (int s = 0; s < size; s++)
                    sum[b] += v[s] * splat(w[(i - b * stride) * size + s]);
    }
    NAME(depthwise_store)(how, finish, sum, bias, residual, y, p, q, rows);
}

/* Rows first .. last-1 of a map, one vector of columns after the other: which lanes lie in the image is the same all the
 * way down. */
#define DEPTHWISE(STRIDE, SIZE)                                                                                        \
    static __attribute__((noinline)) void NAME(depthwise_##STRIDE##_##SIZE)(                                           \
        const cconv_depthwise *how, const cconv_finish *finish, const T *x, const T *w, V bias, long first, long last, \
        const T *residual, T *y) {                                                                                     \
        const int near = how->stride_h == STRIDE && how->dilation_h == 1;                                              \
        for (long q = 0; q < how->Q; q += LANES) {                                                                     \
            NAME(lanes) lanes[WIDEST_ROW];                                                                             \
            _Pragma("GCC unroll 5") for (int s = 0; s < (STRIDE == 1 ? SIZE : 3); s++) {                               \
                const long from = q * STRIDE - how->left + (STRIDE == 1 ? s : s * LANES);                              \
                lanes[s] = between(-from, how->W - from);                                                              \
            }                                                                                                          \
            long p = first;                                                                                            \
            for (; STRIDE == 1 && near && p + 4 <= last; p += 4)                                                       \
                NAME(depthwise_rows)(how, finish, x, w, bias, residual, y, p, q, lanes, 4, STRIDE, SIZE);              \
            for (; near && p + 2 <= last; p += 2)                                                                      \
                NAME(depthwise_rows)(how, finish, x, w, bias, residual, y, p, q, lanes, 2, STRIDE, SIZE);              \
            for (; p < last; p++)                                                                                      \
                NAME(depthwise_rows)(how, finish, x, w, bias, residual, y, p, q, lanes, 1, STRIDE, SIZE);              \
        }                                                                                                              \
    }
DEPTHWISE(1, 3)
DEPTHWISE(2, 3)
DEPTHWISE(1, 5)
DEPTHWISE(2, 5)

/* The same for any filter. */
static __attribute__((noinline)) void NAME(depthwise_any)(const cconv_depthwise *how, const cconv_finish *finish,
                                                          const T *x, const T *w, V bias, long first, long last,
                                                          const T *residual, T *y) {
    for (long p = first; p < last; p++)
        for (long q = 0; q < how->Q; q += LANES) {
            V sum = {0};
            for (long r = 0; r < how->R; r++) {
                const long h = p * how->stride_h - how->top + r * how->dilation_h;
                const int inside = h >= 0 && h < how->H;
                const T *row = x + (inside ? h * how->row_pitch : 0);
                for (long s = 0; s < how->S; s++) {
                    const long column = q * how->stride_w - how->left + s * how->dilation_w, more = column + LANES;
                    V v = load_lanes(row + column, only(inside, between(-column, how->W - column)));
                    if (how->stride_w == 2)
                        v = EVEN(v, load_lanes(row + more, only(inside, between(-more, how->W - more))));
                    sum += v * splat(w[r * how->S + s]);
                }
            }
            NAME(depthwise_store)(how, finish, &sum, bias, residual, y, p, q, 1);
        }
}

/* Output rows first .. last-1 of one map. Strides of columns are 1 or 2. */
static void NAME(depthwise)(const cconv_depthwise *how, const cconv_finish *finish, double bias, long first, long last,
                            const void *source, const void *weight, const void *residual, void *target) {
    /* load_taps shifts in at most LANES elements. */
    const int reached = how->stride_w == 1 || how->S - 2 <= LANES;
    const V b = splat((T)bias);
    void (*rows)(const cconv_depthwise *, const cconv_finish *, const T *, const T *, V, long, long, const T *, T *);
    rows = NAME(depthwise_any);
    if (how->R == 3 && how->S == 3 && how->dilation_w == 1 && reached)
        rows = how->stride_w == 1 ? NAME(depthwise_1_3) : NAME(depthwise_2_3);
    if (how->R == 5 && how->S == 5 && how->dilation_w == 1 && reached)
        rows = how->stride_w == 1 ? NAME(depthwise_1_5) : NAME(depthwise_2_5);
    rows(how, finish, source, weight, b, first, last, residual, target);
}
