/* Exponentials: sigmoid, SiLU, tanh and GELU by whole vectors, as rows with their epilogue; e^x for softmax.
 *
 * In: T, BYTES (of T), LANES, NAME, simd.h.  Out: exponential(); the rows swish, sigmoid, tanh, gelu, gelu_tanh.
 *
 *     e^x = 2^n e^r = 2^n (1 + r + r^2 q(r))      n = x / ln 2, rounded;  r = x - n ln 2, so |r| <= ln 2 / 2
 *
 * n is rounded by adding a number so large that its last bit counts ones; n also stands in its last bits then, from
 * where a shift brings it into the exponent of a power of two. ln 2 is subtracted in two pieces, of which the first has
 * so few bits that n times it is exact. Where multiply-adds are fused, products are not rounded; nothing relies on it.
 * The polynomials are Remez fits to the relative error, by a script of 240-bit numbers, their coefficients rounded with
 * a look at all of them; their own errors are 0.06 (e^r) and 0.4 (erfc) of 2^-24 or 2^-53.
 * The formulas are those of reference.py, or equal to them without their cancellation; so are the results for NaN,
 * infinities and -0.
 */
#if BYTES == 4
#define BITS uint32_t
#define MANTISSA 23
#define ROUNDER (12582912 + 127) /* 1.5 * 2^23, and what exponents are stored with */
#define LN2_HIGH 0.693145751953125f
#define LN2_LOW 1.42860682031e-6f
#define LARGEST 89           /* e^x: infinite from here on */
#define SMALLEST (T)-104.5   /* 0 from here on */
#define NEGLIGIBLE -86       /* 1 + e^x = 1, long since; 2^(n - 1) is not subnormal yet */
#define TANH_IS_ONE 20       /* tanh(x / 2) */
#define GELU_IS_LINE (T)14.5 /* e^(-x^2 / 2) = 0 */
#define LOWER_HALF 0xfff     /* the bits without which a square is exact */
#define ERFC_MIDDLE 4
static const T NAME(q)[] = {0.49999994, 0.16666521, 0.04166833, 0.008368707, 0.0013814602};
static const T NAME(scaled_erfc)[] = {
    7.5528514e-1, -6.078966e-1, 3.8713688e-1, -1.8652338e-1, 6.040385e-2, -7.5252624e-3, -3.5125539e-3, 1.5699245e-3,
    1.7934614e-4, -1.3197772e-4,
};
#else
#define BITS uint64_t
#define MANTISSA 52
#define ROUNDER (6755399441055744 + 1023)
#define LN2_HIGH 0.693147180559890330187045
#define LN2_LOW 5.4979230187083711747e-14
#define LARGEST 710
#define SMALLEST -746
#define NEGLIGIBLE -707
#define TANH_IS_ONE 40
#define GELU_IS_LINE 38.7
#define LOWER_HALF 0x7ffffff
#define ERFC_MIDDLE 5
static const T NAME(q)[] = {
    5.00000000000001e-1, 1.6666666666666669e-1, 4.16666666665219e-2, 8.33333333332219e-3, 1.3888888947856271e-3,
    1.9841269886618234e-4, 2.4801487285986974e-5, 2.7557242305901826e-6, 2.7632670844749673e-7, 2.511006149615509e-8,
};
static const T NAME(scaled_erfc)[] = {
    7.69193049750063e-1, -6.653825028900567e-1, 4.953056159699772e-1, -3.1353315667129633e-1, 1.6502036617033972e-1,
    -6.911863870656693e-2, 2.0795066800788957e-2, -2.9933767667627287e-3, -7.978694074894677e-4, 5.448990339904113e-4,
    -5.9375677946333484e-5, -4.97626587283115e-5, 1.6681052641237826e-5, 3.9803998561033824e-6,
    -2.7689771051622178e-6, -3.355747810372379e-7, 4.3291326631427587e-7, 4.093698555722398e-8, -6.602447389654381e-8,
    -8.341803461291798e-9, 7.93582081273648e-9, 1.448557042898239e-9, -2.96488802783684e-10,
};
#endif
typedef BITS NAME(bits) __attribute__((vector_size(LANES * BYTES)));
#define TERMS(c) (int)(sizeof(c) / sizeof((c)[0]))

static inline __attribute__((always_inline)) V NAME(polynomial)(V x, const T *c, const int terms) {
    V y = splat(c[terms - 1]);
    _Pragma("GCC unroll 32") for (int i = terms - 2; i >= 0; i--) y = y * x + splat(c[i]);
    return y;
}

/* e^r - 1, for the r and n that belong to x - rest; *rounded = rounder + n. `rest` is small. */
static inline __attribute__((always_inline)) V NAME(reduced)(V x, V rest, const T rounder, V *rounded) {
    const V t = x * splat((T)1.4426950408889634074) + splat(rounder), n = t - splat(rounder);
    const V r = x - n * splat(LN2_HIGH) - n * splat(LN2_LOW) - rest;
    *rounded = t;
    return r * r * NAME(polynomial)(r, NAME(q), TERMS(NAME(q))) + r;
}

/* 2^n, if t is ROUNDER + n. */
static inline __attribute__((always_inline)) V NAME(power)(V t) { return (V)((NAME(bits))t << MANTISSA); }

static inline __attribute__((always_inline)) V NAME(between_values)(V x, T least, T most) {
    return SMALLER(splat(most), LARGER(splat(least), x));
}

/* e^(x - rest), with rest far below 1. Two powers: each of them exists, and subnormal results are rounded once. */
static inline __attribute__((always_inline)) V NAME(exponential)(V x, V rest) {
    V t;
    const V p = NAME(reduced)(NAME(between_values)(x, SMALLEST, LARGEST), rest, ROUNDER, &t), n = t - splat(ROUNDER);
    const V half = n * splat((T)0.5) + splat(ROUNDER), other = n - (half - splat(ROUNDER)) + splat(ROUNDER);
    return (p + splat(1)) * NAME(power)(half) * NAME(power)(other);
}

/* 1 + e^x. One power is enough: 2^(n - 1), twice, for n goes up to 128 (1024). */
static inline __attribute__((always_inline)) V NAME(one_and_exponential)(V x) {
    V t;
    const V p = NAME(reduced)(NAME(between_values)(x, NEGLIGIBLE, LARGEST), (V){0}, ROUNDER - 1, &t);
    return (p + p + splat(2)) * NAME(power)(t) + splat(1);
}

static inline __attribute__((always_inline)) V NAME(swish_of)(V alpha, V x) {
    return x / NAME(one_and_exponential)(-alpha * x);
}

static inline __attribute__((always_inline)) V NAME(sigmoid_of)(V alpha, V x) {
    (void)alpha;
    return splat(1) / NAME(one_and_exponential)(-x);
}

/* m / (m + 2) with m = e^2|x| - 1 = (2^n - 1) + 2^n (e^r - 1); then the sign of x. */
static inline __attribute__((always_inline)) V NAME(tanh_of)(V alpha, V x) {
    const NAME(bits) sign = (NAME(bits))splat((T)-0.0);
    const V twice = (V)((NAME(bits))(x + x) & ~sign);
    V t;
    const V p = NAME(reduced)(select(twice > splat(TANH_IS_ONE), splat(TANH_IS_ONE), twice), (V){0}, ROUNDER, &t);
    const V power = NAME(power)(t), m = p * power + (power - splat(1));
    (void)alpha;
    return (V)((NAME(bits))(m / (m + splat(2))) | ((NAME(bits))x & sign));
}

/* x Phi(x), where Phi(-y) = erfc(y / sqrt 2) / 2 = e^(-y^2 / 2) w, and w (y + middle) is a polynomial of
 * z = (y - middle) / (y + middle), which is from -1 to 1 for all y. y^2 is exact in two pieces: its rounding error
 * would be a relative one of the power. */
static inline __attribute__((always_inline)) V NAME(gelu_of)(V alpha, V x) {
    const V far = splat(GELU_IS_LINE), size = (V)((NAME(bits))x & ~(NAME(bits))splat((T)-0.0));
    const V y = select(size > far, far, size), high = (V)((NAME(bits))y & ~((NAME(bits)){0} + LOWER_HALF));
    const V power = NAME(exponential)(high * high * splat((T)-0.5), (y - high) * (y + high) * splat((T)0.5));
    const V s = splat(1) / (y + splat(ERFC_MIDDLE)), z = y * s * splat(2) - splat(1);
    const V w = NAME(polynomial)(z, NAME(scaled_erfc), TERMS(NAME(scaled_erfc))) * s, tail = power * w;
    (void)alpha;
    return x * select(x < splat(0), tail, splat(1) - tail);
}

/* (1 + tanh u) / 2 = 1 / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3). */
static inline __attribute__((always_inline)) V NAME(gelu_tanh_of)(V alpha, V x) {
    const V slope = x * x * splat((T)-0.071354816272600248776) + splat((T)-1.5957691216057307118);
    (void)alpha;
    return x / NAME(one_and_exponential)(slope * x);
}

/* y = f(s + b + r) of a row; r may be NULL. Out of line, one loop for each: their constants fill the registers, and who
 * calls them from an epilogue keeps its own. b = -0 adds nothing. */
#define ROW(name)                                                                                                      \
    static __attribute__((noinline)) void NAME(name)(T alpha, long columns, T b, const T *s, const T *r, T *y) {       \
        const V a = splat(alpha), bias = splat(b);                                                                     \
        long j = 0;                                                                                                    \
        for (; j + LANES <= columns; j += LANES) {                                                                     \
            V x = load(s + j) + bias;                                                                                  \
            if (r) x += load(r + j);                                                                                   \
            store(y + j, NAME(name##_of)(a, x));                                                                       \
        }                                                                                                              \
        if (j == columns) return;                                                                                      \
        const NAME(lanes) rest = between(0, columns - j);                                                              \
        V x = load_lanes(s + j, rest) + bias;                                                                          \
        if (r) x += load_lanes(r + j, rest);                                                                           \
        store_lanes(y + j, NAME(name##_of)(a, x), rest);                                                               \
    }
ROW(swish)
ROW(sigmoid)
ROW(tanh)
ROW(gelu)
ROW(gelu_tanh)

#undef BITS
#undef MANTISSA
#undef ROUNDER
#undef LN2_HIGH
#undef LN2_LOW
#undef LARGEST
#undef SMALLEST
#undef NEGLIGIBLE
#undef TANH_IS_ONE
#undef GELU_IS_LINE
#undef LOWER_HALF
#undef ERFC_MIDDLE
#undef TERMS
#undef ROW
