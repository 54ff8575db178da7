/* Filters: those of Winograd's tiles to their points, U = G g G'.
 *
 * In: T, NAME, simd.h, winograd.inc.c; a cconv_winograd with G of planning/winograd.py.  Out: winograd_filter.
 */
#define MOST_TAPS 7

/* G: r taps g to alpha points o, which are `filter` rows of r. The rows of a pair share their even and
 * odd powers. */
#define DOUBLES (VECTOR_BYTES / 8)
typedef double NAME(wide) __attribute__((vector_size(VECTOR_BYTES)));
typedef T NAME(narrow) __attribute__((vector_size(DOUBLES * sizeof(T))));
/* GCC converts vectors of eight by halves. */
#if defined(__AVX512F__) && BYTES == 4
#define WIDENED(v) ((NAME(wide))_mm512_cvtps_pd((__m256)(v)))
#define NARROWED(v) ((NAME(narrow))_mm512_cvtpd_ps((__m512d)(v)))
#else
#define WIDENED(v) __builtin_convertvector(v, NAME(wide))
#define NARROWED(v) __builtin_convertvector(v, NAME(narrow))
#endif
static inline __attribute__((always_inline)) void NAME(filter_points_of)(const int alpha, const int r,
                                                                         const double *filter, const NAME(wide) *g,
                                                                         NAME(wide) *o) {
    const int z = 1 - alpha % 2;
    if (z) o[0] = filter[0] * g[0];
    _Pragma("GCC unroll 4") for (int p = z; p < alpha - 1; p += 2) {
        const double *row = filter + p * r;
        NAME(wide) even = row[0] * g[0], odd = row[1] * g[1];
        _Pragma("GCC unroll 4") for (int k = 2; k < r; k += 2) even += row[k] * g[k];
        _Pragma("GCC unroll 4") for (int k = 3; k < r; k += 2) odd += row[k] * g[k];
        odd = ROUNDED(odd); /* added, not multiplied and added: additions have pipes of their own */
        /* The row of -p is even - odd, but for the sign of its scale: as many factors as there are other points. */
        o[p] = even + odd;
        o[p + 1] = z ? even - odd : odd - even;
    }
    o[alpha - 1] = g[r - 1];
}

/* The same at stride s: the points of the even taps, then those of the odd ones. */
static inline __attribute__((always_inline)) void NAME(to_filter_points)(const int m, const int r, const int s,
                                                                         const double *filter, const NAME(wide) *g,
                                                                         NAME(wide) *o) {
    if (s == 1) {
        NAME(filter_points_of)(POINTS(m, r, 1), r, filter, g, o);
        return;
    }
    const int evens = EVEN_POINTS(m, r), odds = POINTS(m, r, 2) - evens, even_taps = (r + 1) / 2;
    NAME(wide) half[MOST_TAPS];
    _Pragma("GCC unroll 4") for (int k = 0; k < even_taps; k++) half[k] = g[2 * k];
    NAME(filter_points_of)(evens, even_taps, filter, half, o);
    _Pragma("GCC unroll 4") for (int k = 0; k < r / 2; k++) half[k] = g[2 * k + 1];
    if (r > 3)
        NAME(filter_points_of)(odds, r / 2, filter + evens * even_taps, half, o + evens);
    else
        _Pragma("GCC unroll 16") for (int i = 0; i < odds; i++) o[evens + i] = g[1];
}

/* U of a panel of `outputs` filters, of `channels` of the `depth` channels of each:
 * points[(i * alpha' + j) * pitch + c * width + output]. In double, rounded once. A few channels at a time, the taps of
 * LANES filters first become vectors; small tiles then stay in registers until they are stored. */
#define CHANNELS_AT_ONCE 8
static inline __attribute__((always_inline)) void NAME(filter_tiles)(const int m_down, const int m, const int r,
                                                                     const int s, const cconv_winograd *how,
                                                                     long outputs, long width, long channels,
                                                                     long depth, const T *weight, T *points,
                                                                     long pitch) {
    const int alpha_down = POINTS(m_down, r, s), alpha = POINTS(m, r, s);
    T taps[MOST_TAPS * MOST_TAPS * CHANNELS_AT_ONCE + LANES][LANES];
    for (long c = 0; c < channels; c += CHANNELS_AT_ONCE)
        for (long f = 0; f < outputs; f += LANES) {
            const long some = channels - c < CHANNELS_AT_ONCE ? channels - c : CHANNELS_AT_ONCE;
            const long filters = outputs - f < LANES ? outputs - f : LANES;
            for (long k = 0; k < some * r * r; k += LANES) {
                const NAME(lanes) across = between(0, some * r * r - k);
                V v[LANES];
                _Pragma("GCC unroll 16") for (int l = 0; l < LANES; l++) {
                    const T *row = weight + ((f + l) * depth + c) * r * r + k;
                    __builtin_prefetch(row + CHANNELS_AT_ONCE * r * r); /* rows are too short for the processor's own */
                    v[l] = l < filters ? load_anywhere(row, across) : (V){0};
                }
                flip(v);
                _Pragma("GCC unroll 16") for (int l = 0; l < LANES; l++) store(taps[k + l], v[l]);
            }
            for (long t = 0; t < some; t++)
                for (long h = 0; h < filters; h += DOUBLES) {
                    /* Zeros beyond the panel's width make way for the next channels; what follows the last one is
                     * another thread's. */
                    const int whole =
                        h + DOUBLES <= filters || (outputs <= LANES && h + DOUBLES <= (channels - c - t) * width);
                    T few[MOST_POINTS * MOST_POINTS][DOUBLES];
                    T *first = points + (c + t) * width + f + h, *to = whole ? first : few[0];
                    const long step = whole ? pitch : DOUBLES;
                    NAME(wide) half[MOST_TAPS][MOST_POINTS];
                    _Pragma("GCC unroll 7") for (int k = 0; k < r; k++) {
                        NAME(wide) g[MOST_TAPS];
                        _Pragma("GCC unroll 7") for (int i = 0; i < r; i++) {
                            NAME(narrow) tap;
                            memcpy(&tap, &taps[(t * r + i) * r + k][h], sizeof tap);
                            g[i] = WIDENED(tap);
                        }
                        NAME(to_filter_points)(m_down, r, s, how->down.filter, g, half[k]);
                    }
                    _Pragma("GCC unroll 7") for (int i = 0; i < alpha_down; i++) {
                        NAME(wide) row[MOST_TAPS], o[MOST_POINTS];
                        _Pragma("GCC unroll 7") for (int k = 0; k < r; k++) row[k] = half[k][i];
                        NAME(to_filter_points)(m, r, s, how->across.filter, row, o);
                        _Pragma("GCC unroll 16") for (int j = 0; j < alpha; j++, to += step) {
                            const NAME(narrow) u = NARROWED(o[j]);
                            memcpy(to, &u, sizeof u);
                        }
                    }
                    if (!whole)
                        for (long p = 0; p < alpha_down * alpha; p++)
                            for (long l = 0; l < filters - h; l++) first[p * pitch + l] = few[p][l];
                }
        }
}

#define FILTER(MD, MA, R, S)                                                                                           \
    static __attribute__((noinline)) void NAME(filter_##MD##_##MA##_##R##_##S)(                                        \
        const cconv_winograd *how, long outputs, long width, long channels, long depth, const T *weight, T *points,    \
        long pitch) {                                                                                                  \
        NAME(filter_tiles)(MD, MA, R, S, how, outputs, width, channels, depth, weight, points, pitch);                 \
    }
EACH_WINOGRAD(FILTER)

static void NAME(winograd_filter)(const cconv_winograd *how, long outputs, long width, long channels, long depth,
                                  const void *weight, void *points, long pitch) {
#define CASE(MD, MA, R, S)                                                                                             \
    if (IS(MD, MA, R, S))                                                                                              \
        NAME(filter_##MD##_##MA##_##R##_##S)(how, outputs, width, channels, depth, weight, points, pitch);
    EACH_WINOGRAD(CASE)
#undef CASE
}
#undef IS
