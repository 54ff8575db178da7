/* Finish: from sums to maps. The transposition of a tile, and the epilogue y = activation(sum + bias + residual).
 *
 * In: T, NAME, simd.h, the rows of exponentials.inc.c.  Out: transpose, expect, finish, settle; curved(), curve(),
 * activated_as() for other epilogues.
 */

/* target[c][r] = source[r][c] in blocks of LANES x LANES.
 * Assumptions: rows and columns are read and written up to the next multiple of LANES. */
static void NAME(transpose)(long rows, long columns, const void *source, long source_pitch, void *target,
                            long target_pitch) {
    for (long c = 0; c < columns; c += LANES)
        for (long r = 0; r < rows; r += LANES) {
            const T *in = (const T *)source + r * source_pitch + c;
            T *out = (T *)target + c * target_pitch + r;
            V v[LANES];
            _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++) v[i] = load(in + i * source_pitch);
            flip(v);
            _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++) store(out + i * target_pitch, v[i]);
        }
}

/* Whether an activation is a curve: one of those that need exponentials. */
static inline int NAME(curved)(int activation) {
    return activation == CCONV_SIGMOID || activation == CCONV_SILU || activation == CCONV_TANH ||
           activation == CCONV_GELU;
}

/* A row of y = curve(s + b + r); r may be NULL. */
static void NAME(curve)(int activation, long columns, T b, const T *s, const T *r, T *y) {
    switch (activation) {
    case CCONV_SIGMOID: NAME(sigmoid)(0, columns, b, s, r, y); break;
    case CCONV_SILU: NAME(swish)(1, columns, b, s, r, y); break;
    case CCONV_TANH: NAME(tanh)(0, columns, b, s, r, y); break;
    case CCONV_GELU: NAME(gelu)(0, columns, b, s, r, y); break;
    }
}

/* The others. Comparisons are written so that NaN passes through. */
static inline __attribute__((always_inline)) V NAME(activated_as)(int activation, V alpha, V x) {
    const V zero = {0};
    switch (activation) {
    case CCONV_NONE: return x;
    case CCONV_RELU: return LARGER(zero, x);
    case CCONV_RELU6: return LARGER(zero, SMALLER(splat(6), x));
    case CCONV_LEAKY_RELU: return select(x < zero, alpha * x, x);
    default: /* hardswish */
        return x * LARGER(zero, SMALLER(splat(6), x + splat(3))) / splat(6);
    }
}

/* Asks for the cache lines of rows x columns of a map, which finish will write when the multiplication is done. They
 * wait in the second level: the same place in many maps is often the same set of the first. */
static void NAME(expect)(long rows, long columns, const void *target, long pitch) {
    for (long i = 0; i < rows; i++)
        for (long j = 0; j < columns; j += 64 / sizeof(T)) __builtin_prefetch((const T *)target + i * pitch + j, 0, 2);
}

/* What went past the caches is seen by whoever sees what is stored from now on. */
static void NAME(settle)(void) {
#ifdef __AVX512F__
    _mm_sfence();
#endif
}

/* One row: whole vectors, then the rest. With `past` there is no r. */
static inline __attribute__((always_inline)) void NAME(finish_row)(const int activation, V alpha, V b, int past,
                                                                   long columns, const T *s, const T *r, T *y) {
    long j = 0;
    if (past && LINE(y))
        for (; j + LANES <= columns; j += LANES)
            stream(y + j, NAME(activated_as)(activation, alpha, load(s + j) + b));
    else if (r)
        for (; j + LANES <= columns; j += LANES)
            store(y + j, NAME(activated_as)(activation, alpha, load(s + j) + b + load(r + j)));
    else
        for (; j + LANES <= columns; j += LANES)
            store(y + j, NAME(activated_as)(activation, alpha, load(s + j) + b));
    if (j == columns) return;
    const NAME(lanes) rest = between(0, columns - j);
    V x = load_lanes(s + j, rest) + b;
    if (r) x += load_lanes(r + j, rest);
    store_lanes(y + j, NAME(activated_as)(activation, alpha, x), rest);
}

/* y = activation(sums + bias + residual) of rows x columns of one map; residual and y share a pitch. Rows without a gap
 * are one. */
static void NAME(finish)(const cconv_finish *how, double bias, long rows, long columns, const void *sums,
                         long sums_pitch, const void *residual, void *target, long pitch) {
    const V b = splat((T)bias), alpha = splat((T)how->alpha);
    if (sums_pitch == columns && pitch == columns) columns *= rows, rows = 1;
    for (long i = 0; i < rows; i++) {
        const T *s = (const T *)sums + i * sums_pitch;
        const T *r = residual ? (const T *)residual + i * pitch : NULL;
        T *y = (T *)target + i * pitch;
        if (how->activation == CCONV_NONE)
            NAME(finish_row)(CCONV_NONE, alpha, b, how->past, columns, s, r, y);
        else if (how->activation == CCONV_RELU)
            NAME(finish_row)(CCONV_RELU, alpha, b, how->past, columns, s, r, y);
        else if (NAME(curved)(how->activation))
            NAME(curve)(how->activation, columns, (T)bias, s, r, y);
        else
            NAME(finish_row)(how->activation, alpha, b, how->past, columns, s, r, y);
    }
}
