/* SIMD: vectors of T by GCC's vector extensions, which serve every ISA from the same source.
 *
 * In: T (float or double), LANES (elements per vector, a literal), NAME; the ISA's names MASKED(op) and WIDE.
 * Out: V, load, store, stream, LINE (whether a line begins there), splat, between, load_lanes, load_anywhere,
 * store_lanes, select, LOW, HIGH, EVEN, ODD, NEXT, EVEN_MIXED, ODD_MIXED (AVX2 alone), flip, load_columns,
 * store_columns; BY_HALVES, whether these two are the best way.
 * Whole-vector operations only: GCC turns lane subscripts into memory traffic.
 * No include guard: it is included once per element type, and instance.inc.c undefines what it defines.
 */
typedef T NAME(vector) __attribute__((vector_size(LANES * sizeof(T))));
typedef T NAME(unaligned) __attribute__((vector_size(LANES * sizeof(T)), aligned(sizeof(T)), may_alias));
#define V NAME(vector)

static inline __attribute__((always_inline)) V NAME(load)(const T *p) { return *(const NAME(unaligned) *)p; }
static inline __attribute__((always_inline)) void NAME(store)(T *p, V v) { *(NAME(unaligned) *)p = v; }
/* A store past the caches: no line of the target is read first. Only where a vector is a line: parts of lines would be
 * read after all. p is a multiple of a vector. Others see it after settle(). */
static inline __attribute__((always_inline)) void NAME(stream)(T *p, V v) {
#ifdef __AVX512F__
    MASKED(_mm512_stream)(p, (WIDE)v);
#else
    NAME(store)(p, v);
#endif
}
/* x - 0 and not x + 0: the compiler may then drop it, for it changes no x, -0 included. */
static inline __attribute__((always_inline)) V NAME(splat)(T x) { return x - (V){0}; }
#define load NAME(load)
#define store NAME(store)
#define stream NAME(stream)
#define LINE(p) (((uintptr_t)(p) & 63) == 0)
#define splat NAME(splat)

typedef __typeof__((V){0} < (V){0}) NAME(comparison);

#if defined(__AVX2__) && !defined(__AVX512F__)
/* A vector is two halves of 16 bytes: shuffles within halves are one instruction, shuffles across them two. */
#define BY_HALVES 1
typedef T NAME(half) __attribute__((vector_size(LANES / 2 * sizeof(T))));
typedef T NAME(unaligned_half) __attribute__((vector_size(LANES / 2 * sizeof(T)), aligned(sizeof(T)), may_alias));
#if LANES == 8
#define NUMBER int
#define NUMBERS 0, 1, 2, 3, 4, 5, 6, 7
#define JOINED(a, b) __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7)
#define LOWER(v) __builtin_shufflevector(v, v, 0, 1, 2, 3)
#define UPPER(v) __builtin_shufflevector(v, v, 4, 5, 6, 7)
#else
#define NUMBER long
#define NUMBERS 0, 1, 2, 3
#define JOINED(a, b) __builtin_shufflevector(a, b, 0, 1, 2, 3)
#define LOWER(v) __builtin_shufflevector(v, v, 0, 1)
#define UPPER(v) __builtin_shufflevector(v, v, 2, 3)
#endif
typedef NUMBER NAME(numbers) __attribute__((vector_size(LANES * sizeof(T))));
static inline __attribute__((always_inline)) V NAME(load_halves)(const T *low, const T *high) {
    return JOINED(*(const NAME(unaligned_half) *)low, *(const NAME(unaligned_half) *)high);
}
/* The first `count` lanes, fewer than all, in stores of 4, 2 and 1. */
static inline __attribute__((always_inline)) void NAME(store_first)(T *p, V v, int count) {
    NAME(half) half = LOWER(v);
    if (count & LANES / 2) {
        *(NAME(unaligned_half) *)p = half;
        half = UPPER(v);
        p += LANES / 2;
    }
#if LANES == 8
    if (count & 2) {
        memcpy(p, &half, 2 * sizeof(T));
        half = __builtin_shufflevector(half, half, 2, 3, 2, 3);
        p += 2;
    }
#endif
    if (count & 1) *p = half[0];
}
#else
#define BY_HALVES 0
#endif

/* A set of lanes (0 or 1 is a condition), and loads and stores that touch no other element; lanes that are not loaded
 * are zeros. */
#if defined(__AVX512F__)
typedef unsigned NAME(lanes);
static inline __attribute__((always_inline)) NAME(lanes) NAME(between)(long first, long last) {
    first = first < 0 ? 0 : first > LANES ? LANES : first;
    last = last < 0 ? 0 : last > LANES ? LANES : last;
    return ((1u << last) - 1) & ~((1u << first) - 1);
}
static inline __attribute__((always_inline)) V NAME(load_lanes)(const T *p, NAME(lanes) lanes) {
    return (V)MASKED(_mm512_maskz_loadu)(lanes, p);
}
static inline __attribute__((always_inline)) void NAME(store_lanes)(T *p, V v, NAME(lanes) lanes) {
    MASKED(_mm512_mask_storeu)(p, lanes, (WIDE)v);
}
#elif defined(__AVX2__)
/* The hardware's masks do not touch the other elements, so a load may reach beyond an array's end. */
typedef struct {
    NAME(numbers) mask;
    int count; /* of lanes, if they are the first ones; else -1 */
} NAME(lanes);
static inline __attribute__((always_inline)) NAME(lanes) NAME(between)(long first, long last) {
    const NAME(numbers) number = {NUMBERS};
    first = first < 0 ? 0 : first > LANES ? LANES : first;
    last = last < 0 ? 0 : last > LANES ? LANES : last;
    return (NAME(lanes)){(number >= (NUMBER)first) & (number < (NUMBER)last), first > 0 ? -1 : (int)last};
}
static inline __attribute__((always_inline)) V NAME(load_lanes)(const T *p, NAME(lanes) lanes) {
    return (V)MASKED(_mm256_maskload)(p, (__m256i)lanes.mask);
}
/* Masked stores are microcode on some processors. */
static inline __attribute__((always_inline)) void NAME(store_lanes)(T *p, V v, NAME(lanes) lanes) {
    if (lanes.count == LANES)
        store(p, v);
    else if (lanes.count >= 0)
        NAME(store_first)(p, v, lanes.count);
    else
        MASKED(_mm256_maskstore)(p, (__m256i)lanes.mask, v);
}
#else
typedef struct {
    int first, last;
} NAME(lanes);
static inline __attribute__((always_inline)) NAME(lanes) NAME(between)(long first, long last) {
    return (NAME(lanes)){first < 0 ? 0 : first > LANES ? LANES : first, last < 0 ? 0 : last > LANES ? LANES : last};
}
static inline __attribute__((always_inline)) V NAME(load_lanes)(const T *p, NAME(lanes) lanes) {
    if (lanes.first == 0 && lanes.last == LANES) return load(p);
    T lane[LANES] = {0};
    for (int i = lanes.first; i < lanes.last; i++) lane[i] = p[i];
    return load(lane);
}
static inline __attribute__((always_inline)) void NAME(store_lanes)(T *p, V v, NAME(lanes) lanes) {
    if (lanes.first == 0 && lanes.last == LANES) {
        store(p, v);
        return;
    }
    T lane[LANES];
    store(lane, v);
    for (int i = lanes.first; i < lanes.last; i++) p[i] = lane[i];
}
#endif
/* load_anywhere: load_lanes from any byte on, for weights lie where their file has them. */
#if defined(__AVX2__)
#define load_anywhere NAME(load_lanes)
#else
static inline __attribute__((always_inline)) V NAME(load_anywhere)(const T *p, NAME(lanes) lanes) {
    T lane[LANES] = {0};
    memcpy(lane + lanes.first, (const char *)p + lanes.first * sizeof(T), (lanes.last - lanes.first) * sizeof(T));
    return load(lane);
}
#define load_anywhere NAME(load_anywhere)
#endif
#define between NAME(between)
#define load_lanes NAME(load_lanes)
#define store_lanes NAME(store_lanes)

/* Lane by lane a where the comparison holds, else b. */
static inline __attribute__((always_inline)) V NAME(select)(NAME(comparison) holds, V a, V b) {
    return (V)(((NAME(comparison))a & holds) | ((NAME(comparison))b & ~holds));
}
#define select NAME(select)
/* Lane by lane the larger (smaller) one; b where either is NaN, and of two zeros. One instruction of x86. */
#if defined(__AVX512F__)
#define LARGER(a, b) ((V)MASKED(_mm512_max)(a, b))
#define SMALLER(a, b) ((V)MASKED(_mm512_min)(a, b))
#elif defined(__AVX2__)
#define LARGER(a, b) ((V)MASKED(_mm256_max)(a, b))
#define SMALLER(a, b) ((V)MASKED(_mm256_min)(a, b))
#else
#define LARGER(a, b) select((a) > (b), a, b)
#define SMALLER(a, b) select((a) < (b), a, b)
#endif

/* LOW, HIGH: the lower (upper) halves of a and b, interleaved: a0 b0 a1 b1 ...
 * EVEN, ODD: every other lane of a, then of b: the inverse.  NEXT: a without its first lane, then b's first.
 * PREVIOUS: b's last lane, then a without its last. */
#if LANES == 2
#define NEXT(a, b) __builtin_shufflevector(a, b, 1, 2)
#define PREVIOUS(a, b) __builtin_shufflevector(a, b, 3, 0)
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 2)
#define HIGH(a, b) __builtin_shufflevector(a, b, 1, 3)
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2)
#define ODD(a, b) __builtin_shufflevector(a, b, 1, 3)
#elif LANES == 4
#define NEXT(a, b) __builtin_shufflevector(a, b, 1, 2, 3, 4)
#define PREVIOUS(a, b) __builtin_shufflevector(a, b, 7, 0, 1, 2)
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6)
#define ODD(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7)
#elif LANES == 8
#define NEXT(a, b) __builtin_shufflevector(a, b, 1, 2, 3, 4, 5, 6, 7, 8)
#define PREVIOUS(a, b) __builtin_shufflevector(a, b, 15, 0, 1, 2, 3, 4, 5, 6)
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14)
#define ODD(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15)
#elif LANES == 16
#define NEXT(a, b) __builtin_shufflevector(a, b, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16)
#define PREVIOUS(a, b) __builtin_shufflevector(a, b, 31, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14)
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#define ODD(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)
#else
#error "LANES: expected 2, 4, 8 or 16"
#endif

/* EVEN_MIXED, ODD_MIXED: EVEN and ODD in the order that is the cheapest. */
#if BY_HALVES && LANES == 8
#define EVEN_MIXED(a, b) __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14)
#define ODD_MIXED(a, b) __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15)
#elif BY_HALVES
#define EVEN_MIXED(a, b) __builtin_shufflevector(a, b, 0, 4, 2, 6)
#define ODD_MIXED(a, b) __builtin_shufflevector(a, b, 1, 5, 3, 7)
#endif

/* v as a LANES x LANES matrix, transposed by log2(LANES) rounds of interleaving:
 *
 *   a0 a1 a2 a3        a0 c0 a1 c1        a0 b0 c0 d0
 *   b0 b1 b2 b3   ->   a2 c2 a3 c3   ->   a1 b1 c1 d1
 *   c0 c1 c2 c3        b0 d0 b1 d1        a2 b2 c2 d2
 *   d0 d1 d2 d3        b2 d2 b3 d3        a3 b3 c3 d3
 *
 * Inlined, so that the compiler drops what leads to rows that nobody reads. */
#define flip NAME(flip)
#define load_columns NAME(load_columns)
#define store_columns NAME(store_columns)
/* load_columns: d[j] = element j of LANES rows, the l-th of which begins at p + at[l], or `apart` from each other if
 * `at` is NULL, for j < n. Reads whole vectors of a row. */
#define PLACE(l) (p + (at ? at[l] : (l) * apart))
#if BY_HALVES
#if LANES == 8
#define LOW_OF_HALVES(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define HIGH_OF_HALVES(a, b) __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#else
#define LOW_OF_HALVES(a, b) __builtin_shufflevector(a, b, 0, 4, 2, 6)
#define HIGH_OF_HALVES(a, b) __builtin_shufflevector(a, b, 1, 5, 3, 7)
#endif
/* Two matrices of LANES / 2 rows, side by side, each transposed in its place. */
static inline __attribute__((always_inline)) void NAME(flip_halves)(V *v) {
    V w[LANES / 2];
    _Pragma("GCC unroll 2") for (int round = 1; round < LANES / 2; round *= 2) {
        _Pragma("GCC unroll 2") for (int i = 0; i < LANES / 4; i++) {
            w[2 * i] = LOW_OF_HALVES(v[i], v[i + LANES / 4]);
            w[2 * i + 1] = HIGH_OF_HALVES(v[i], v[i + LANES / 4]);
        }
        _Pragma("GCC unroll 4") for (int i = 0; i < LANES / 2; i++) v[i] = w[i];
    }
}
/* The quarters at the upper right and the lower left change places, and each is transposed. */
static inline __attribute__((always_inline)) void NAME(flip)(V *v) {
    _Pragma("GCC unroll 4") for (int i = 0; i < LANES / 2; i++) {
        const V a = v[i], b = v[i + LANES / 2];
        v[i] = JOINED(LOWER(a), LOWER(b));
        v[i + LANES / 2] = JOINED(UPPER(a), UPPER(b));
    }
    NAME(flip_halves)(v);
    NAME(flip_halves)(v + LANES / 2);
}
static inline __attribute__((always_inline)) void NAME(load_columns)(const int n, const T *p, const int apart,
                                                                     const int32_t *at, V *d) {
    _Pragma("GCC unroll 8") for (int j = 0; j < n; j += LANES / 2) {
        V v[LANES / 2];
        _Pragma("GCC unroll 4") for (int l = 0; l < LANES / 2; l++)
            v[l] = NAME(load_halves)(PLACE(l) + j, PLACE(l + LANES / 2) + j);
        NAME(flip_halves)(v);
        _Pragma("GCC unroll 4") for (int i = 0; i < LANES / 2; i++)
            if (j + i < n) d[j + i] = v[i];
    }
}
/* store_columns: the inverse, rows side by side from p on. Writes up to a vector too far. */
static inline __attribute__((always_inline)) void NAME(store_columns)(const int n, const V *y, T *p) {
    V v[4][LANES / 2];
    _Pragma("GCC unroll 4") for (int b = 0; b * (LANES / 2) < n; b++) {
        _Pragma("GCC unroll 4") for (int i = 0; i < LANES / 2; i++)
            v[b][i] = b * (LANES / 2) + i < n ? y[b * (LANES / 2) + i] : (V){0};
        NAME(flip_halves)(v[b]);
    }
    if (n == LANES / 2) {
        _Pragma("GCC unroll 2") for (int l = 0; l < LANES / 2; l += 2) {
            store(p + l * n, JOINED(LOWER(v[0][l]), LOWER(v[0][l + 1])));
            store(p + (l + LANES / 2) * n, JOINED(UPPER(v[0][l]), UPPER(v[0][l + 1])));
        }
        return;
    }
    _Pragma("GCC unroll 8") for (int l = 0; l < LANES; l++) /* in this order: each covers the excess of the last */
        _Pragma("GCC unroll 4") for (int b = 0; b * (LANES / 2) < n; b++) {
            const V row = v[b][l % (LANES / 2)];
            *(NAME(unaligned_half) *)(p + l * n + b * (LANES / 2)) = l < LANES / 2 ? LOWER(row) : UPPER(row);
        }
}
#else
static inline __attribute__((always_inline)) void NAME(flip)(V *v) {
    V w[LANES];
    _Pragma("GCC unroll 4") for (int round = 1; round < LANES; round *= 2) {
        _Pragma("GCC unroll 8") for (int i = 0; i < LANES / 2; i++) {
            w[2 * i] = LOW(v[i], v[i + LANES / 2]);
            w[2 * i + 1] = HIGH(v[i], v[i + LANES / 2]);
        }
        _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++) v[i] = w[i];
    }
}
static inline __attribute__((always_inline)) void NAME(load_columns)(const int n, const T *p, const int apart,
                                                                     const int32_t *at, V *d) {
    _Pragma("GCC unroll 8") for (int j = 0; j < n; j += LANES) {
        V v[LANES];
        _Pragma("GCC unroll 16") for (int l = 0; l < LANES; l++) v[l] = load(PLACE(l) + j);
        flip(v);
        _Pragma("GCC unroll 16") for (int l = 0; l < LANES; l++)
            if (j + l < n) d[j + l] = v[l];
    }
}
static inline __attribute__((always_inline)) void NAME(store_columns)(const int n, const V *y, T *p) {
    V v[8 / LANES + 1][LANES];
    _Pragma("GCC unroll 4") for (int b = 0; b * LANES < n; b++) {
        _Pragma("GCC unroll 16") for (int l = 0; l < LANES; l++)
            v[b][l] = b * LANES + l < n ? y[b * LANES + l] : (V){0};
        flip(v[b]);
    }
    _Pragma("GCC unroll 16") for (int l = 0; l < LANES; l++) /* in this order: each covers the excess of the last */
        _Pragma("GCC unroll 4") for (int b = 0; b * LANES < n; b++) store(p + l * n + b * LANES, v[b][l]);
}
#endif
