/* SIMD: vectors of T by GCC's vector extensions, which serve every ISA from the same source.
 *
 * In: T (float or double), LANES (elements per vector, a literal), NAME.  Out: V, load, store, splat, LOW, HIGH.
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

/* The lower (upper) halves of a and b, interleaved: a0 b0 a1 b1 ... */
#if LANES == 2
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 2)
#define HIGH(a, b) __builtin_shufflevector(a, b, 1, 3)
#elif LANES == 4
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#elif LANES == 8
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#elif LANES == 16
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#else
#error "LANES: expected 2, 4, 8 or 16"
#endif
