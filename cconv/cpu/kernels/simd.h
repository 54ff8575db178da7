/* SIMD: vectors of T by GCC's vector extensions, which serve every ISA from the same source.
 *
 * In: T (float or double), LANES (elements per vector, a literal), NAME; with AVX-512 its names MASKED(op) and WIDE.
 * Out: V, load, store, splat, between, only, load_lanes, store_lanes, select, LOW, HIGH, EVEN, ODD, NEXT, flip.
 * Whole-vector operations only: GCC turns lane subscripts into memory traffic.
 * No include guard: it is included once per element type, and instance.inc.c undefines what it defines.
 */
typedef T NAME(vector) __attribute__((vector_size(LANES * sizeof(T))));
typedef T NAME(unaligned) __attribute__((vector_size(LANES * sizeof(T)), aligned(sizeof(T)), may_alias));
#define V NAME(vector)

static inline __attribute__((always_inline)) V NAME(load)(const T *p) { return *(const NAME(unaligned) *)p; }
static inline __attribute__((always_inline)) void NAME(store)(T *p, V v) { *(NAME(unaligned) *)p = v; }
/* x - 0 and not x + 0: the compiler may then drop it, for it changes no x, -0 included. */
static inline __attribute__((always_inline)) V NAME(splat)(T x) { return x - (V){0}; }
#define load NAME(load)
#define store NAME(store)
#define splat NAME(splat)

/* A set of lanes (0 or 1 is a condition), and loads and stores that touch no other element; lanes that are not loaded are zeros. */
#if defined(__AVX512F__)
typedef unsigned NAME(lanes);
static inline __attribute__((always_inline)) NAME(lanes) NAME(between)(long first, long last) {
    first = first < 0 ? 0 : first > LANES ? LANES : first;
    last = last < 0 ? 0 : last > LANES ? LANES : last;
    return ((1u << last) - 1) & ~((1u << first) - 1);
}
static inline __attribute__((always_inline)) NAME(lanes) NAME(only)(int condition, NAME(lanes) lanes) {
    return lanes & -(unsigned)condition;
}
static inline __attribute__((always_inline)) V NAME(load_lanes)(const T *p, NAME(lanes) lanes) {
    return (V)MASKED(_mm512_maskz_loadu)(lanes, p);
}
static inline __attribute__((always_inline)) void NAME(store_lanes)(T *p, V v, NAME(lanes) lanes) {
    MASKED(_mm512_mask_storeu)(p, lanes, (WIDE)v);
}
#else
typedef struct {
    int first, last;
} NAME(lanes);
static inline __attribute__((always_inline)) NAME(lanes) NAME(between)(long first, long last) {
    return (NAME(lanes)){first < 0 ? 0 : first > LANES ? LANES : first, last < 0 ? 0 : last > LANES ? LANES : last};
}
static inline __attribute__((always_inline)) NAME(lanes) NAME(only)(int condition, NAME(lanes) lanes) {
    return condition ? lanes : (NAME(lanes)){0, 0};
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
#define between NAME(between)
#define only NAME(only)
#define load_lanes NAME(load_lanes)
#define store_lanes NAME(store_lanes)

/* Lane by lane a where the comparison holds, else b. */
typedef __typeof__((V){0} < (V){0}) NAME(comparison);
static inline __attribute__((always_inline)) V NAME(select)(NAME(comparison) holds, V a, V b) {
    return (V)(((NAME(comparison))a & holds) | ((NAME(comparison))b & ~holds));
}
#define select NAME(select)

/* LOW, HIGH: the lower (upper) halves of a and b, interleaved: a0 b0 a1 b1 ...
 * EVEN, ODD: every other lane of a, then of b: the inverse.  NEXT: a without its first lane, then b's first. */
#if LANES == 2
#define NEXT(a, b) __builtin_shufflevector(a, b, 1, 2)
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 2)
#define HIGH(a, b) __builtin_shufflevector(a, b, 1, 3)
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2)
#define ODD(a, b) __builtin_shufflevector(a, b, 1, 3)
#elif LANES == 4
#define NEXT(a, b) __builtin_shufflevector(a, b, 1, 2, 3, 4)
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6)
#define ODD(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7)
#elif LANES == 8
#define NEXT(a, b) __builtin_shufflevector(a, b, 1, 2, 3, 4, 5, 6, 7, 8)
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14)
#define ODD(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15)
#elif LANES == 16
#define NEXT(a, b) __builtin_shufflevector(a, b, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16)
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#define ODD(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)
#else
#error "LANES: expected 2, 4, 8 or 16"
#endif

/* v as a LANES x LANES matrix, transposed by log2(LANES) rounds of interleaving:
 *
 *   a0 a1 a2 a3        a0 c0 a1 c1        a0 b0 c0 d0
 *   b0 b1 b2 b3   ->   a2 c2 a3 c3   ->   a1 b1 c1 d1
 *   c0 c1 c2 c3        b0 d0 b1 d1        a2 b2 c2 d2
 *   d0 d1 d2 d3        b2 d2 b3 d3        a3 b3 c3 d3
 *
 * Inlined, so that the compiler drops what leads to rows that nobody reads. */
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
#define flip NAME(flip)
