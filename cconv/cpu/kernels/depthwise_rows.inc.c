/* Depthwise in place: taps are read where they lie in the image.
 *
 * In: what depthwise.inc.c has, depthwise_store() and activate() of it.  Out: DEPTHWISE(stride, size), a function for
 * filters of size x size.
 *
 * At stride 1 a tap is one load, at stride 2 a pair of loads gives two taps, sorted by EVEN and ODD, and the one before
 * them, which is one element and the second of them but for its last lane: with one column of padding, both loads are
 * of whole lines. Lanes outside the image are masked away; a row outside it is read from ZEROS.
 *
 *     row of the image         x0 x1 x2 x3 x4 ...              left = 1: outputs q .. q + LANES - 1 read
 *     stride 1, tap s          x(q - 1 + s) ...                LANES neighbours
 *     stride 2, taps 0, 1, 2   x(2q - 1) x(2q) x(2q + 1) ...   of 2 * LANES neighbours of x(2q) the even and the odd
 *
 * A block takes one column of taps after the other (at stride 2 two or three), whose weights stay in registers.
 */
#define MOST_READ (WIDEST_ROW + 2 * (BLOCK - 1)) /* rows that a block reads */

static const T NAME(ZEROS)[2 * LANES + WIDEST_ROW];

/* Which of LANES elements from element c of a row on are inside it. */
#define INSIDE(c) between(-(c), how->W - (c))

/* The vectors of `taps` taps that begin at p: 1 at stride 1, 2 or 3 at stride 2. With `edge`, what lies outside the row
 * is zero: all but the `inside` elements of the vectors loaded, and the first of three taps unless it is `within`. */
static inline __attribute__((always_inline)) void NAME(load_taps)(const T *p, const NAME(lanes) *inside, int within,
                                                                  const int edge, const int stride, const int taps,
                                                                  V *tap) {
    const int before = taps - stride;
    const V a = edge ? load_lanes(p + before, inside[0]) : load(p + before);
    if (stride == 1) {
        tap[0] = a;
        return;
    }
    const V b = edge ? load_lanes(p + before + LANES, inside[1]) : load(p + before + LANES);
    tap[before] = EVEN(a, b);
    tap[before + 1] = ODD(a, b);
    if (before) tap[0] = PREVIOUS(tap[2], !edge || within ? splat(*p) : (V){0});
}

/* Columns of taps that a block takes at once: three of a 5 x 5 filter do not stay in registers. */
#define TAPS(stride, size) ((stride) == 2 && (size) == 3 ? 3 : (stride))
/* Elements from the first to the last that a block reads of a row: more than its taps where pairs are loaded. */
#define REACH(stride, size) ((size) - 1 - (TAPS(stride, size) == 3) + LANES * (stride))
#define EACH_TAP                                                                                                       \
    _Pragma("GCC unroll 3") for (int t = 0; t < taps; t++) if (s + t < size)

/* Outputs q .. q + LANES - 1 of the rows from p on, with every size a constant. row[i]: the first tap of output q in
 * the i-th row that is read, which is element c of its row. */
static inline __attribute__((always_inline)) void NAME(depthwise_block)(
    const cconv_depthwise *how, const cconv_finish *finish, const T *const *row, long c, const T *w, V bias,
    const T *residual, T *y, long p, long q, const int edge, const int rows, const int stride, const int size) {
    V sum[BLOCK];
    _Pragma("GCC unroll 8") for (int b = 0; b < rows; b++) sum[b] = (V){0};
    const int taps = TAPS(stride, size);
    _Pragma("GCC unroll 5") for (int s = 0; s < size; s += taps) {
        V weight[3][WIDEST_ROW];
        _Pragma("GCC unroll 5") for (int r = 0; r < size; r++)
            EACH_TAP weight[t][r] = splat(w[r * size + s + t]);
        const long d = c + s + taps - stride;
        const NAME(lanes) inside[] = {INSIDE(d), INSIDE(d + LANES)};
        const int within = c >= 0 && c < how->W;
        _Pragma("GCC unroll 17") for (int i = 0; i < size + (rows - 1) * stride; i++) { /* row i - b * stride of b */
            V tap[3];
            NAME(load_taps)(row[i] + s, inside, within, edge, stride, taps, tap);
            _Pragma("GCC unroll 8") for (int b = 0; b < rows; b++)
                if (i >= b * stride && i - b * stride < size)
                    EACH_TAP sum[b] += tap[t] * weight[t][i - b * stride];
        }
    }
    NAME(depthwise_store)(how, finish, sum, bias, residual, y, p, q, rows);
}

/* `rows` rows at a time from p on, as long as they lie before `last`. The last vector of columns overlaps the one
 * before, unless sums are added to what may lie in the output. */
#define ROWS(rows, STRIDE, SIZE)                                                                                       \
    for (; p + rows <= last; p += rows)                                                                                \
        for (long q = 0; q < how->Q; q += LANES) {                                                                     \
            if (q + LANES > how->Q && q && !residual) q = how->Q - LANES;                                              \
            const long c = q * STRIDE - how->left, h = p * STRIDE - how->top;                                          \
            const T *row[MOST_READ], *const from = x + h * how->row_pitch + c;                                         \
            const long reads = SIZE + (rows - 1) * STRIDE;                                                             \
            const int inside = h >= 0 && h + reads - 1 < how->H;                                                       \
            _Pragma("GCC unroll 17") for (int i = 0; i < reads; i++) {                                                 \
                const long at = h + i;                                                                                 \
                row[i] = inside || (at >= 0 && at < how->H) ? from + i * how->row_pitch : NAME(ZEROS);                 \
            }                                                                                                          \
            if (c >= 0 && c + REACH(STRIDE, SIZE) <= how->W)                                                           \
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
        long p = first;                                                                                                \
        ROWS(7, STRIDE, SIZE)                                                                                          \
        ROWS(4, STRIDE, SIZE)                                                                                          \
        ROWS(2, STRIDE, SIZE)                                                                                          \
        ROWS(1, STRIDE, SIZE)                                                                                          \
    }
