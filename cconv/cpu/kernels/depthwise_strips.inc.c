/* Depthwise by strips: rows of the image are copied to a strip in the first-level cache.
 *
 * In: what depthwise.inc.c has, depthwise_store() and activate() of it.  Out: DEPTHWISE(stride, size), a function for
 * filters of size x size.
 *
 * The strip has the zeros around the rows, which are sorted into phases (column modulo stride): a tap is then one load,
 * wherever it lies.
 *
 *     row of the image      x0 x1 x2 x3 x4 ...              left = 1: outputs q .. q + LANES - 1 read
 *     strip, stride 1        0 x0 x1 x2 x3 ...              tap s: strip[q + s ..]
 *     strip, stride 2        0 x0 x2 x4 ... | 0 x1 x3 ...   taps 0, 2: of x1 x3 ...;  tap 1: of x0 x2 ...
 *
 * A block takes one column of taps after the other, whose weights stay in registers: a sum's order is (s, r). A strip
 * begins LANES outputs before the image.
 */
#define STRIP_ROWS 32
#define STRIP_OUTPUTS 28                    /* output rows at stride 1 */
#define STRIP_PITCH (768 / (long)sizeof(T)) /* no power of two: rows would meet in the same sets of the cache */
#define STRIP_ODD (STRIP_PITCH / 2)         /* where columns 1, 3, 5 ... begin, if the stride is 2 */

/* LANES * stride columns of a row, given as its vectors. Without ROUNDED, the loops around it become calls of memcpy
 * (and those below of memset), one for each short row. */
static inline __attribute__((always_inline)) void NAME(fill_phases)(V a, V b, const int stride, T *strip) {
    if (stride == 1) {
        store(strip, ROUNDED(a));
    } else {
        store(strip, EVEN(a, b));
        store(strip + STRIP_ODD, ODD(a, b));
    }
}

/* `count` vectors of zeros in each of `rows` rows. */
static inline __attribute__((always_inline)) void NAME(fill_zeros)(long rows, long count, const int stride, T *strip) {
    V zero = {0};
    for (long i = 0; i < rows; i++, strip += STRIP_PITCH)
        for (long j = 0; j < count; j++) {
            zero = ROUNDED(zero);
            store(strip + j * LANES, zero);
            if (stride == 2) store(strip + STRIP_ODD + j * LANES, zero);
        }
}

/* `whole` vectors of each of `rows` rows, then, if `more`, one with the first `columns` of the columns that follow. */
static inline __attribute__((always_inline)) void NAME(fill_rows)(const T *row, long pitch, long rows, const long whole,
                                                                  const int more, long columns, const int stride,
                                                                  T *strip) {
    const NAME(lanes) rest = between(0, columns), next = between(0, columns - LANES);
    for (long i = 0; i < rows; i++, row += pitch, strip += STRIP_PITCH) {
        for (long j = 0; j < whole; j++) {
            const T *in = row + j * stride * LANES;
            T *to = strip + j * LANES;
#if BY_HALVES
            if (stride == 2) { /* the halves so that what EVEN_MIXED makes of them is in order */
                const V a = NAME(load_halves)(in, in + LANES);
                const V b = NAME(load_halves)(in + LANES / 2, in + LANES / 2 * 3);
                store(to, EVEN_MIXED(a, b));
                store(to + STRIP_ODD, ODD_MIXED(a, b));
                continue;
            }
#endif
            NAME(fill_phases)(load(in), stride == 1 ? (V){0} : load(in + LANES), stride, to);
        }
        if (!more) continue;
        const T *in = row + whole * stride * LANES;
        NAME(fill_phases)(load_lanes(in, rest), stride == 1 ? (V){0} : load_lanes(in + LANES, next), stride,
                          strip + whole * LANES);
    }
}

/* The strip: `rows` rows of the image, from row h and column c on: `vectors` of each phase. c is a multiple of
 * LANES * stride, and not below the first negative one. */
#define FILL(STRIDE)                                                                                                   \
    static __attribute__((noinline)) void NAME(fill_##STRIDE)(const cconv_depthwise *how, const T *x, long h,          \
                                                              long rows, long c, long vectors, T *strip) {             \
        const long wide = STRIDE * LANES, before = c < 0, from = c + before * wide, most = vectors - before;           \
        const long left = how->W > from ? how->W - from : 0, whole = left / wide < most ? left / wide : most;          \
        const long rest = left - whole * wide, more = whole < most && rest, after = most - whole - more;               \
        long above = h < 0 ? -h : 0, end = h < how->H ? how->H - h : 0;                                                \
        above = above < rows ? above : rows;                                                                           \
        end = end < above ? above : end < rows ? end : rows;                                                           \
        const long inside = end - above;                                                                               \
        const T *row = x + (h + above) * how->row_pitch + from;                                                        \
        NAME(fill_zeros)(above, vectors, STRIDE, strip);                                                               \
        NAME(fill_zeros)(rows - end, vectors, STRIDE, strip + end * STRIP_PITCH);                                      \
        strip += above * STRIP_PITCH;                                                                                  \
        if (before) NAME(fill_zeros)(inside, 1, STRIDE, strip);                                                        \
        strip += before * LANES;                                                                                       \
        if (after) NAME(fill_zeros)(inside, after, STRIDE, strip + (whole + more) * LANES);                            \
        /* Frequent widths: 14, 28, 56 and 112 / 2, by 8 lanes; their loops vanish. */                                 \
        if (whole == 1 && more)                                                                                        \
            NAME(fill_rows)(row, how->row_pitch, inside, 1, 1, rest, STRIDE, strip);                                   \
        else if (whole == 3 && more)                                                                                   \
            NAME(fill_rows)(row, how->row_pitch, inside, 3, 1, rest, STRIDE, strip);                                   \
        else if (whole == 7 && !more)                                                                                  \
            NAME(fill_rows)(row, how->row_pitch, inside, 7, 0, rest, STRIDE, strip);                                   \
        else                                                                                                           \
            NAME(fill_rows)(row, how->row_pitch, inside, whole, more, rest, STRIDE, strip);                            \
    }
FILL(1)
FILL(2)

/* Outputs p .. p + rows - 1, q .. q + LANES - 1, with every size a constant; their taps 0 and 1 begin at `even` and
 * `odd` of the strip. With more than one row, they are `stride` apart in it. */
static inline __attribute__((always_inline)) void NAME(depthwise_block)(
    const cconv_depthwise *how, const cconv_finish *finish, const T *even, const T *odd, const T *w, V bias,
    const T *residual, T *y, long p, long q, const int rows, const int stride, const int size) {
    V sum[BLOCK];
    _Pragma("GCC unroll 8") for (int b = 0; b < rows; b++) sum[b] = (V){0};
    _Pragma("GCC unroll 5") for (int s = 0; s < size; s++) {
        const T *column = stride == 1 ? even + s : (s % 2 ? odd : even) + s / 2;
        V weight[WIDEST_ROW];
        _Pragma("GCC unroll 5") for (int r = 0; r < size; r++) weight[r] = splat(w[r * size + s]);
        _Pragma("GCC unroll 17") for (int i = 0; i < size + (rows - 1) * stride; i++) { /* row i - b * stride of b */
            const V v = load(column + i * STRIP_PITCH);
            _Pragma("GCC unroll 8") for (int b = 0; b < rows; b++)
                if (i >= b * stride && i - b * stride < size) sum[b] += v * weight[i - b * stride];
        }
    }
    NAME(depthwise_store)(how, finish, sum, bias, residual, y, p, q, rows);
}

/* `rows` rows at a time from p on, as long as they lie before `end`. The last vector of columns overlaps the one
 * before, unless sums are added to what may lie in the output. */
#define ROWS(rows, STRIDE, SIZE)                                                                                       \
    for (; p + rows <= end; p += rows, strip += rows * STRIDE * STRIP_PITCH)                                           \
        for (long q = 0; q < columns; q += LANES) {                                                                    \
            if (q + LANES > columns && q && !residual) q = columns - LANES;                                            \
            NAME(depthwise_block)(how, finish, strip + even + q, strip + odd + q, w, b, residual, y, p, column + q,    \
                                  rows, STRIDE, SIZE);                                                                 \
        }

/* Rows first .. last-1 of a map, strip by strip. */
#define DEPTHWISE(STRIDE, SIZE)                                                                                        \
    static __attribute__((noinline)) void NAME(depthwise_##STRIDE##_##SIZE)(                                           \
        const cconv_depthwise *how, const cconv_finish *finish, const T *x, const T *w, T bias, long first, long last, \
        const T *residual, T *y) {                                                                                     \
        T whole_strip[STRIP_ROWS * STRIP_PITCH] __attribute__((aligned(64)));                                          \
        const V b = splat(bias);                                                                                       \
        const long most_rows = STRIP_OUTPUTS / STRIDE;                                                                 \
        const long most_columns = (STRIP_PITCH / STRIDE - 2 * LANES - SIZE) / LANES * LANES;                           \
        /* Where taps 0 and 1 of output 0 lie in a row of the strip, which begins LANES outputs before it. */          \
        const long even = LANES - (how->left + STRIDE - 1) / STRIDE + (STRIDE == 2 && how->left % 2 ? STRIP_ODD : 0);  \
        const long odd = LANES - how->left / 2 + (how->left % 2 ? 0 : STRIP_ODD);                                      \
        const long reach = how->left < SIZE ? (SIZE - 1 - how->left) / STRIDE : 0; /* beyond an output's own column */ \
        for (long column = 0; column < how->Q; column += most_columns) {                                               \
            const long columns = how->Q - column < most_columns ? how->Q - column : most_columns;                      \
            const long q_last = columns >= LANES && !residual ? columns - LANES : (columns - 1) / LANES * LANES;       \
            const long vectors = (LANES + q_last + LANES + reach + LANES - 1) / LANES;                                 \
            for (long p = first, end; p < last;) {                                                                     \
                const T *strip = whole_strip;                                                                          \
                end = p + most_rows < last ? p + most_rows : last;                                                     \
                NAME(fill_##STRIDE)(how, x, p * STRIDE - how->top, (end - p - 1) * STRIDE + SIZE,                      \
                                    (column - LANES) * STRIDE, vectors, whole_strip);                                  \
                ROWS(7, STRIDE, SIZE)                                                                                  \
                ROWS(4, STRIDE, SIZE)                                                                                  \
                ROWS(2, STRIDE, SIZE)                                                                                  \
                ROWS(1, STRIDE, SIZE)                                                                                  \
            }                                                                                                          \
        }                                                                                                              \
    }
