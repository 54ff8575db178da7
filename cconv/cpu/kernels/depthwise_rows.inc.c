/* Depthwise in place: taps are read where they lie in the image.
 *
 * In: what depthwise.inc.c has, depthwise_store() and activate() of it.  Out: DEPTHWISE(stride, size), a function for
 * filters of size x size.
 *
 * At stride 1 a tap is one load, at stride 2 a pair of loads gives two taps, sorted by EVEN and ODD. Lanes outside the image
 * are masked away, which costs nothing on AVX-512; a row outside it is read from ZEROS.
 *
 *     row of the image       x0 x1 x2 x3 x4 ...              left = 1: outputs q .. q + LANES - 1 read
 *     stride 1, tap s        x(q - 1 + s) ...                LANES neighbours
 *     stride 2, taps 0, 1    x(2q - 1) x(2q) x(2q + 1) ...   of 2 * LANES neighbours the even ones, and the odd ones
 *
 * A block takes one column of taps after the other (two, at stride 2), whose weights stay in registers. Where rows are
 * dilated or strides differ, a block is one row.
 */
#define MOST_LEFT (1L << 40) /* any */
#define MOST_READ (WIDEST_ROW + 2 * (BLOCK - 1)) /* rows that a block reads */

static const T NAME(ZEROS)[2 * LANES + WIDEST_ROW];

/* The vectors of taps s and s + 1 (if the stride is 2; else of tap s) of a row, of which tap s is element c, at p; with
 * `edge`, elements outside 0 .. W - 1 are zeros. */
static inline __attribute__((always_inline)) void NAME(load_taps)(const T *p, long c, long W, const int edge,
                                                                  const int stride, V *tap, V *next) {
    const V a = edge ? load_lanes(p, between(-c, W - c)) : load(p);
    if (stride == 1) {
        *tap = a;
        return;
    }
    const V b = edge ? load_lanes(p + LANES, between(-c - LANES, W - c - LANES)) : load(p + LANES);
    *tap = EVEN(a, b);
    *next = ODD(a, b);
}

/* Outputs q .. q + LANES - 1 of the rows from p on, with every size a constant. row[i]: the first tap of output q in the
 * i-th row that is read, which is element c of its row. */
static inline __attribute__((always_inline)) void NAME(depthwise_block)(
    const cconv_depthwise *how, const cconv_finish *finish, const T *const *row, long c, const T *w, V bias,
    const T *residual, T *y, long p, long q, const int edge, const int rows, const int stride, const int size) {
    V sum[BLOCK];
    _Pragma("GCC unroll 8") for (int b = 0; b < rows; b++) sum[b] = (V){0};
    _Pragma("GCC unroll 5") for (int s = 0; s < size; s += stride) {
        const int two = stride == 2 && s + 1 < size;
        V weight[WIDEST_ROW], beside[WIDEST_ROW];
        _Pragma("GCC unroll 5") for (int r = 0; r < size; r++) {
            weight[r] = splat(w[r * size + s]);
            if (two) beside[r] = splat(w[r * size + s + 1]);
        }
        _Pragma("GCC unroll 17") for (int i = 0; i < size + (rows - 1) * stride; i++) { /* row i - b * stride of b */
            V tap, next;
            NAME(load_taps)(row[i] + s, c + s, how->W, edge, stride, &tap, &next);
            _Pragma("GCC unroll 8") for (int b = 0; b < rows; b++)
                if (i >= b * stride && i - b * stride < size) {
                    sum[b] += tap * weight[i - b * stride];
                    if (two) sum[b] += next * beside[i - b * stride];
                }
        }
    }
    NAME(depthwise_store)(how, finish, sum, bias, residual, y, p, q, rows);
}

/* `rows` rows at a time from p on, as long as they lie before `last`. The last vector of columns overlaps the one before,
 * unless sums are added to what may lie in the output. */
#define ROWS(rows, STRIDE, SIZE)                                                                                       \
    for (; p + rows <= last && (rows == 1 || near); p += rows)                                                         \
        for (long q = 0; q < how->Q; q += LANES) {                                                                     \
            if (q + LANES > how->Q && q && !residual) q = how->Q - LANES;                                              \
            const long c = q * STRIDE - how->left, h = p * how->stride_h - how->top;                                   \
            const T *row[MOST_READ];                                                                                   \
            _Pragma("GCC unroll 17") for (int i = 0; i < SIZE + (rows - 1) * STRIDE; i++) {                            \
                const long at = h + i * how->dilation_h;                                                               \
                row[i] = at >= 0 && at < how->H ? x + at * how->row_pitch + c : NAME(ZEROS);                           \
            }                                                                                                          \
            if (c >= 0 && c + (SIZE - 1) / STRIDE * STRIDE + LANES * STRIDE <= how->W)                                 \
                NAME(depthwise_block)(how, finish, row, c, w, b, residual, y, p, q, 0, rows, STRIDE, SIZE);            \
            else                                                                                                       \
                NAME(depthwise_block)(how, finish, row, c, w, b, residual, y, p, q, 1, rows, STRIDE, SIZE);            \
        }

/* Rows first .. last-1 of a map. */
#define DEPTHWISE(STRIDE, SIZE)                                                                                        \
    static __attribute__((noinline)) void NAME(depthwise_##STRIDE##_##SIZE)(                                           \
        const cconv_depthwise *how, const cconv_finish *finish, const T *x, const T *w, T bias, long first, long last, \
        const T *residual, T *y) {                                                                                     \
        const V b = splat(bias);                                                                                       \
        const int near = how->stride_h == STRIDE && how->dilation_h == 1;                                              \
        long p = first;                                                                                                \
        ROWS(7, STRIDE, SIZE)                                                                                          \
        ROWS(4, STRIDE, SIZE)                                                                                          \
        ROWS(2, STRIDE, SIZE)                                                                                          \
        ROWS(1, STRIDE, SIZE)                                                                                          \
    }
