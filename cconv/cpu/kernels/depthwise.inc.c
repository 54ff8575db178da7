/* Depthwise: one output map from one input map, read in place.
 *
 * In: T, NAME, simd.h, activated_as() of finish.inc.c.  Out: depthwise; activate() for other epilogues.
 *
 * A vector holds neighbouring outputs of a row. A tap of theirs is a vector of neighbouring inputs (stride 1), or every
 * other of two vectors (stride 2); what lies outside the image is masked away, so no padded copy is needed:
 *
 *     row of the image      x0 x1 x2 x3 x4 ...         stride 1, tap s:  lanes q - left + s
 *     tap s = 0, left = 1    0 x0 x1 x2 ...            stride 2, tap s:  EVEN of lanes 2q - left + s
 *
 * Where rows are as near as columns, a block of up to BLOCK output rows shares the input rows: each vector loaded feeds
 * up to R of them. Every sum is one chain of fused multiply-adds in the order of the taps (r, s).
 */
#define BLOCK 4
#define WIDEST_ROW 5
#define MOST_SETS 6

/* activated() of all of z, asking once what it is. */
static inline __attribute__((always_inline)) void NAME(activate)(const cconv_finish *finish, const int count, V *z) {
    const int activation = finish->activation;
    if (activation == CCONV_RELU) {
        _Pragma("GCC unroll 8") for (int i = 0; i < count; i++) z[i] = NAME(activated_as)(CCONV_RELU, z[i], z[i]);
    } else if (activation != CCONV_NONE) {
        const V alpha = splat((T)finish->alpha);
        _Pragma("GCC unroll 8") for (int i = 0; i < count; i++) z[i] = NAME(activated_as)(activation, alpha, z[i]);
    }
}

/* Outputs p .. p + rows - 1, q .. q + LANES - 1 from their sums. */
static inline __attribute__((always_inline)) void NAME(depthwise_store)(const cconv_depthwise *how,
                                                                        const cconv_finish *finish, const V *sum,
                                                                        V bias, const T *residual, T *y, long p, long q,
                                                                        const int rows) {
    const NAME(lanes) lanes = between(0, how->Q - q);
    const long at = p * how->Q + q;
    V z[BLOCK];
    _Pragma("GCC unroll 4") for (int b = 0; b < rows; b++) {
        z[b] = sum[b] + bias;
        if (residual) z[b] += load_lanes(residual + at + b * how->Q, lanes);
    }
    NAME(activate)(finish, rows, z);
    _Pragma("GCC unroll 4") for (int b = 0; b < rows; b++) store_lanes(y + at + b * how->Q, z[b], lanes);
}

/* The taps s of a row. Where the stride is 2, either as they lie in memory, two of them from two vectors:
 *
 *     row              x0 x1 x2 x3 x4 x5 x6 x7 | x8 ...        (4 lanes)
 *     v[0] = EVEN      x0 x2 x4 x6               v[1] = ODD      x1 x3 x5 x7
 *     v[2] = EVEN of what begins at x2           x2 x4 x6 x8
 *
 * or by a chain of shifts: v[2] = v[0] and what follows. */
#ifdef EVEN_MIXED
#define SETS(stride, size) ((stride) == 1 ? (size) : ((size) + 1) / 2 * 2)
#define SET_AT(stride, s) ((stride) == 1 ? (s) : (s) / 2 * 2 + (s) % 2 * LANES)
#else
#define SETS(stride, size) ((stride) == 1 ? (size) : 3)
#define SET_AT(stride, s) ((stride) == 1 ? (s) : (s)*LANES)
#endif
static inline __attribute__((always_inline)) void NAME(load_taps)(const T *row, const int whole,
                                                                  const NAME(lanes) *lanes, const int stride,
                                                                  const int size, V *v) {
    const int sets = SETS(stride, size);
    V from[MOST_SETS];
    _Pragma("GCC unroll 6") for (int s = 0; s < sets; s++) {
        const T *at = row + SET_AT(stride, s);
        from[s] = whole ? load(at) : load_lanes(at, lanes[s]);
    }
    if (stride == 1) {
        _Pragma("GCC unroll 5") for (int s = 0; s < size; s++) v[s] = from[s];
        return;
    }
#ifdef EVEN_MIXED
    _Pragma("GCC unroll 5") for (int s = 0; s < size; s++)
        v[s] = s % 2 ? ODD_MIXED(from[s - 1], from[s]) : EVEN_MIXED(from[s], from[s + 1]);
#else
    V c = from[2];
    v[0] = EVEN(from[0], from[1]);
    v[1] = ODD(from[0], from[1]);
    _Pragma("GCC unroll 5") for (int s = 2; s < size; s++) {
        v[s] = NEXT(v[s - 2], c);
        if (s + 1 < size) c = NEXT(c, c);
    }
#endif
}

/* Outputs p .. p + rows - 1, q .. q + LANES - 1, with every size a constant and the taps of a row side by side. With
 * more than one row, they are `stride` apart in the image and dilation is 1. `whole`: no tap lies outside the image. */
static inline __attribute__((always_inline)) void NAME(depthwise_rows)(
    const cconv_depthwise *how, const cconv_finish *finish, const T *x, const V *w, V bias, const T *residual, T *y,
    long p, long q, const NAME(lanes) *lanes, const int rows, const int stride, const int size, const int whole) {
    const T *column = x + q * stride - how->left;
    const long top = p * how->stride_h - how->top;
    V sum[BLOCK];
    _Pragma("GCC unroll 4") for (int b = 0; b < rows; b++) sum[b] = (V){0};
    _Pragma("GCC unroll 8") for (int i = 0; i < size + (rows - 1) * stride; i++) { /* tap row i - b * stride of row b */
        const long h = top + i * (rows > 1 ? 1 : how->dilation_h);
        V v[WIDEST_ROW] = {{0}};
        if (i < rows * stride) __builtin_prefetch(column + (h + how->H) * how->row_pitch, 0, 2); /* of the next map */
        if (whole || (h >= 0 && h < how->H))
            NAME(load_taps)(column + h * how->row_pitch, whole, lanes, stride, size, v);
        _Pragma("GCC unroll 4") for (int b = 0; b < rows; b++)
            if (i >= b * stride && i - b * stride < size)
                _Pragma("GCC unroll 5") for (int s = 0; s < size; s++) sum[b] += v[s] * w[(i - b * stride) * size + s];
    }
#ifdef EVEN_MIXED
    if (stride == 2) _Pragma("GCC unroll 4") for (int b = 0; b < rows; b++) sum[b] = unmixed(sum[b]);
#endif
    NAME(depthwise_store)(how, finish, sum, bias, residual, y, p, q, rows);
}

/* `rows` rows at a time from p on, as long as they lie before last. */
#define ROWS(rows, STRIDE, SIZE)                                                                                       \
    for (; p + rows <= last; p += rows) {                                                                              \
        const long top = p * how->stride_h - how->top;                                                                 \
        if (whole && top >= 0 && top + (SIZE - 1) * how->dilation_h + (rows - 1) * STRIDE < how->H)                    \
            NAME(depthwise_rows)(how, finish, x, taps, b, residual, y, p, q, lanes, rows, STRIDE, SIZE, 1);            \
        else                                                                                                           \
            NAME(depthwise_rows)(how, finish, x, taps, b, residual, y, p, q, lanes, rows, STRIDE, SIZE, 0);            \
    }

/* Rows first .. last-1 of a map, one vector of columns after the other: which lanes lie in the image is the same all
 * the way down. The last vector overlaps the one before, unless sums are added to what may lie in the output. */
#define DEPTHWISE(STRIDE, SIZE)                                                                                        \
    static __attribute__((noinline)) void NAME(depthwise_##STRIDE##_##SIZE)(                                           \
        const cconv_depthwise *how, const cconv_finish *finish, const T *x, const T *w, T bias, long first, long last, \
        const T *residual, T *y) {                                                                                     \
        const int near = how->stride_h == STRIDE && how->dilation_h == 1;                                              \
        const V b = splat(bias);                                                                                       \
        V taps[SIZE * SIZE];                                                                                           \
        _Pragma("GCC unroll 25") for (int k = 0; k < SIZE * SIZE; k++) taps[k] = splat(w[k]);                          \
        for (long q = 0; q < how->Q; q += LANES) {                                                                     \
            if (q + LANES > how->Q && q && !residual) q = how->Q - LANES;                                              \
            NAME(lanes) lanes[MOST_SETS];                                                                              \
            int whole = 1;                                                                                             \
            _Pragma("GCC unroll 6") for (int s = 0; s < SETS(STRIDE, SIZE); s++) {                                     \
                const long from = q * STRIDE - how->left + SET_AT(STRIDE, s);                                          \
                lanes[s] = between(-from, how->W - from);                                                              \
                whole = whole && from >= 0 && from + LANES <= how->W;                                                  \
            }                                                                                                          \
            long p = first;                                                                                            \
            if (STRIDE == 1 && near) ROWS(4, STRIDE, SIZE)                                                             \
            if (near) ROWS(2, STRIDE, SIZE)                                                                            \
            ROWS(1, STRIDE, SIZE)                                                                                      \
        }                                                                                                              \
    }
DEPTHWISE(1, 3)
DEPTHWISE(2, 3)
DEPTHWISE(1, 5)
DEPTHWISE(2, 5)

/* The same for any filter. */
static __attribute__((noinline)) void NAME(depthwise_any)(const cconv_depthwise *how, const cconv_finish *finish,
                                                          const T *x, const T *w, T bias, long first, long last,
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
            NAME(depthwise_store)(how, finish, &sum, splat(bias), residual, y, p, q, 1);
        }
}

/* Output rows first .. last-1 of one map. Strides of columns are 1 or 2. */
static void NAME(depthwise)(const cconv_depthwise *how, const cconv_finish *finish, double bias, long first, long last,
                            const void *source, const void *weight, const void *residual, void *target) {
    /* load_taps shifts in at most LANES elements. */
    const int reached = how->stride_w == 1 || how->S - 2 <= LANES;
    /* The bias is no vector: gcc does not clear the upper halves of registers (vzeroupper) before it leaves a function
     * that takes one, and the caller's next SSE instruction then waits for 100 cycles and more. */
    void (*rows)(const cconv_depthwise *, const cconv_finish *, const T *, const T *, T, long, long, const T *, T *);
    rows = NAME(depthwise_any);
    if (how->R == 3 && how->S == 3 && how->dilation_w == 1 && reached)
        rows = how->stride_w == 1 ? NAME(depthwise_1_3) : NAME(depthwise_2_3);
    if (how->R == 5 && how->S == 5 && how->dilation_w == 1 && reached)
        rows = how->stride_w == 1 ? NAME(depthwise_1_5) : NAME(depthwise_2_5);
    rows(how, finish, source, weight, (T)bias, first, last, residual, target);
}
