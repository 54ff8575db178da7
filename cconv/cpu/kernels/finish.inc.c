/* Finish: from sums to maps. The transposition of a tile, and the epilogue y = activation(sum + bias + residual).
 *
 * In: T, NAME, MATH(f) (f or ff: libm's name for T), simd.h.  Out: transpose, finish.
 */

/* target[c][r] = source[r][c] in blocks of LANES x LANES, by log2(LANES) rounds of interleaving:
 *
 *   a0 a1 a2 a3        a0 c0 a1 c1        a0 b0 c0 d0
 *   b0 b1 b2 b3   ->   a2 c2 a3 c3   ->   a1 b1 c1 d1
 *   c0 c1 c2 c3        b0 d0 b1 d1        a2 b2 c2 d2
 *   d0 d1 d2 d3        b2 d2 b3 d3        a3 b3 c3 d3
 *
 * Assumptions: rows and columns are read and written up to the next multiple of LANES. */
static void NAME(transpose)(long rows, long columns, const void *source, long source_pitch, void *target,
                            long target_pitch) {
    for (long c = 0; c < columns; c += LANES)
        for (long r = 0; r < rows; r += LANES) {
            const T *in = (const T *)source + r * source_pitch + c;
            T *out = (T *)target + c * target_pitch + r;
            V v[LANES], w[LANES];
            _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++) v[i] = load(in + i * source_pitch);
            _Pragma("GCC unroll 4") for (int round = 1; round < LANES; round *= 2) {
                _Pragma("GCC unroll 8") for (int i = 0; i < LANES / 2; i++) {
                    w[2 * i] = LOW(v[i], v[i + LANES / 2]);
                    w[2 * i + 1] = HIGH(v[i], v[i + LANES / 2]);
                }
                _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++) v[i] = w[i];
            }
            _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++) store(out + i * target_pitch, v[i]);
        }
}

/* Comparisons are written so that NaN passes through. The formulas are those of reference.py. */
static inline __attribute__((always_inline)) T NAME(activate)(int activation, T alpha, T x) {
    switch (activation) {
    case CCONV_RELU: return x < 0 ? 0 : x;
    case CCONV_RELU6: return x < 0 ? 0 : x > 6 ? 6 : x;
    case CCONV_LEAKY_RELU: return x < 0 ? alpha * x : x;
    case CCONV_SIGMOID: return 1 / (1 + MATH(exp)(-x));
    case CCONV_SILU: return x / (1 + MATH(exp)(-x));
    case CCONV_HARDSWISH: return x * (x < -3 ? 0 : x > 3 ? 6 : x + 3) / 6;
    case CCONV_TANH: return MATH(tanh)(x);
    case CCONV_GELU: return x * (T)0.5 * (1 + MATH(erf)(x * (T)0.70710678118654752440));
    default: return x;
    }
}

/* One loop per activation, so that the compiler vectorises those that it can. */
#define FINISH_LOOP(ACTIVATION)                                                                                        \
    case ACTIVATION:                                                                                                   \
        if (r)                                                                                                         \
            for (long i = 0; i < count; i++) y[i] = NAME(activate)(ACTIVATION, alpha, s[i] + b + r[i]);                \
        else                                                                                                           \
            for (long i = 0; i < count; i++) y[i] = NAME(activate)(ACTIVATION, alpha, s[i] + b);                       \
        break;

static void NAME(finish)(const cconv_finish *how, double bias, long count, const void *sums, const void *residual,
                         void *target) {
    const T *s = sums, *r = residual;
    T *y = target, b = (T)bias, alpha = (T)how->alpha;
    switch (how->activation) {
        FINISH_LOOP(CCONV_NONE)
        FINISH_LOOP(CCONV_RELU)
        FINISH_LOOP(CCONV_RELU6)
        FINISH_LOOP(CCONV_LEAKY_RELU)
        FINISH_LOOP(CCONV_SIGMOID)
        FINISH_LOOP(CCONV_SILU)
        FINISH_LOOP(CCONV_HARDSWISH)
        FINISH_LOOP(CCONV_TANH)
        FINISH_LOOP(CCONV_GELU)
    }
}
