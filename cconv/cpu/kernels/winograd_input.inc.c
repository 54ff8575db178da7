/* Winograd's input: tiles of an image to their points, V = B' d B.
 *
 * In: what winograd.inc.c has defined.  Out: winograd_input.
 */
/* d[j] = column j of LANES tiles, the l-th of which begins at p + at[l], or at p + l * apart if `at` is NULL. */
static inline __attribute__((always_inline)) void NAME(gather)(const int alpha, const int apart, const T *p,
                                                               const int32_t *at, V *d) {
    if (!at && apart == 2) {
        _Pragma("GCC unroll 10") for (int j = 0; j < alpha; j += 2) {
            V a = load(p + j), b = load(p + j + LANES);
            d[j] = EVEN(a, b);
            if (j + 1 < alpha) d[j + 1] = ODD(a, b);
        }
    } else if (!at && apart == 4 && !BY_HALVES) {
        _Pragma("GCC unroll 10") for (int j = 0; j < alpha; j += 4) {
            V v[4];
            _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) v[i] = load(p + j + i * LANES);
            V even[2] = {EVEN(v[0], v[1]), EVEN(v[2], v[3])}, odd[2] = {ODD(v[0], v[1]), ODD(v[2], v[3])};
            d[j] = EVEN(even[0], even[1]);
            if (j + 1 < alpha) d[j + 1] = EVEN(odd[0], odd[1]);
            if (j + 2 < alpha) d[j + 2] = ODD(even[0], even[1]);
            if (j + 3 < alpha) d[j + 3] = ODD(odd[0], odd[1]);
        }
    } else {
        load_columns(alpha, p, apart, at, d);
    }
}

/* The columns of a run: the vertical half of its transform, rows of the image to rows of the strip. */
static inline __attribute__((always_inline)) void NAME(input_columns)(const int m_down, const int m, const int r,
                                                                      const int s, const int dilated,
                                                                      const cconv_winograd *how, const T *const *rows,
                                                                      long left, long width, T *strip) {
    const int alpha_down = POINTS(m_down, r, s), alpha = POINTS(m, r, s);
    const long wide = dilated ? how->dilation_w : 1, pitch = TILES_PITCH(alpha);
    const T *c = how->down.coefficients;
    for (long j = 0; j < width; j += LANES, left += LANES * wide) {
        V d[MOST_POINTS], o[MOST_POINTS];
        if (!dilated) {
            const int whole = left >= 0 && left + LANES <= how->W;
            const NAME(lanes) inside = between(whole ? 0 : -left, whole ? LANES : how->W - left);
            _Pragma("GCC unroll 16") for (int i = 0; i < alpha_down; i++) {
                __builtin_prefetch((const char *)(rows[i] + left) + how->channel_stride); /* the next channel's */
                d[i] = load_lanes(rows[i] + left, inside);
            }
        } else {
            _Pragma("GCC unroll 16") for (int i = 0; i < alpha_down; i++)
                d[i] = NAME(load_phase)(rows[i], left, wide, how->W);
        }
        NAME(to_points)(m_down, r, s, c, d, o);
        _Pragma("GCC unroll 16") for (int i = 0; i < alpha_down; i++) store(strip + i * pitch + j, o[i]);
    }
}

/* The horizontal half of LANES tiles, which lie in the strip as gather() says. */
static inline __attribute__((always_inline)) void NAME(input_row)(const int m_down, const int m, const int r,
                                                                  const int s, const T *c, const int32_t *at,
                                                                  const T *strip, T *point, long pitch) {
    const int alpha_down = POINTS(m_down, r, s), alpha = POINTS(m, r, s);
    for (int i = 0; i < alpha_down; i++, strip += TILES_PITCH(alpha)) {
        V d[MOST_POINTS], o[MOST_POINTS];
        NAME(gather)(alpha, m * s, strip, at, d);
        NAME(to_points)(m, r, s, c, d, o);
        _Pragma("GCC unroll 16") for (int j = 0; j < alpha; j++, point += pitch) store(point, o[j]);
    }
}

/* The same of `count` tiles of the strip, the t-th at at[t]. */
static inline __attribute__((always_inline)) void NAME(input_rows)(const int m_down, const int m, const int r,
                                                                   const int s, const cconv_winograd *how, long count,
                                                                   const int32_t *at, const T *strip, T *points,
                                                                   long pitch) {
    const T *c = how->across.coefficients;
    for (long t = 0; t < count; t += LANES) {
        const long last = t + LANES < count ? t + LANES - 1 : count - 1;
        if (at[last] - at[t] == (last - t) * m * s)
            NAME(input_row)(m_down, m, r, s, c, NULL, strip + at[t], points + t, pitch);
        else
            NAME(input_row)(m_down, m, r, s, c, at + t, strip, points + t, pitch);
    }
}

#define INPUT(MD, MA, R, S)                                                                                            \
    static __attribute__((noinline)) void NAME(input_columns_##MD##_##MA##_##R##_##S)(                                 \
        const cconv_winograd *how, const T *const *rows, long left, long width, T *strip) {                            \
        NAME(input_columns)(MD, MA, R, S, 0, how, rows, left, width, strip);                                           \
    }                                                                                                                  \
    static __attribute__((noinline)) void NAME(input_dilated_##MD##_##MA##_##R##_##S)(                                 \
        const cconv_winograd *how, const T *const *rows, long left, long width, T *strip) {                            \
        NAME(input_columns)(MD, MA, R, S, 1, how, rows, left, width, strip);                                           \
    }                                                                                                                  \
    static __attribute__((noinline)) void NAME(input_rows_##MD##_##MA##_##R##_##S)(                                    \
        const cconv_winograd *how, long count, const int32_t *at, const T *strip, T *points, long pitch) {             \
        NAME(input_rows)(MD, MA, R, S, how, count, at, strip, points, pitch);                                          \
    }
EACH_WINOGRAD(INPUT)

/* Both halves of a tile's transform; that of columns also where they are dilated. */
typedef struct {
    void (*columns)(const cconv_winograd *, const T *const *, long, long, T *);
    void (*rows)(const cconv_winograd *, long, const int32_t *, const T *, T *, long);
} NAME(input_halves);

static NAME(input_halves) NAME(input_halves_of)(const cconv_winograd *how) {
    NAME(input_halves) halves = {0};
    const int dilated = how->dilation_w > 1;
#define CASE(MD, MA, R, S)                                                                                             \
    if (IS(MD, MA, R, S))                                                                                              \
        halves = (NAME(input_halves)){dilated ? NAME(input_dilated_##MD##_##MA##_##R##_##S)                            \
                                              : NAME(input_columns_##MD##_##MA##_##R##_##S),                           \
                                      NAME(input_rows_##MD##_##MA##_##R##_##S)};
    EACH_WINOGRAD(CASE)
#undef CASE
    return halves;
}

/* Tiles first .. first+count-1 of some channels: points[(i * alpha' + j) * pitch + channel * channel_pitch + t]. Writes
 * whole vectors of t; scratch holds a strip. */
static void NAME(winograd_input)(const cconv_winograd *how, long first, long count, long channels, const void *source,
                                 void *scratch, void *points, long pitch, long channel_pitch) {
    const NAME(input_halves) halves = NAME(input_halves_of)(how);
    const long alpha = how->across.alpha, apart = how->across.m * how->stride;
    const char *from = source;
    T *to = points, *strip = scratch;
    NAME(run) runs[STRIP_TILES];
    int32_t at[STRIP_TILES + LANES];
    const long found = NAME(runs_of)(how, first, count, how->down.m * how->stride, apart, how->image_stride, runs);
    for (long i = 0, t = 0, place = 0; i < found; t += runs[i].tiles, place += (runs[i++].tiles - 1) * apart + alpha)
        for (long j = 0; j < runs[i].tiles; j++) at[t + j] = (int32_t)(place + j * apart);
    for (long t = count; t % LANES; t++) at[t] = at[count - 1];
    for (long channel = 0; channel < channels; channel++, from += how->channel_stride, to += channel_pitch) {
        long place = 0;
        for (const NAME(run) *run = runs; run < runs + found; run++) {
            const T *rows[MOST_POINTS];
            const long top = run->top - how->top, width = (run->tiles - 1) * apart + alpha;
            for (int i = 0; i < how->down.alpha; i++) {
                const long h = top + i * how->dilation_h;
                rows[i] = how->zeros;
                if (h >= 0 && h < how->H) rows[i] = (const T *)(from + run->image + h * how->row_stride);
            }
            halves.columns(how, rows, run->left - how->left, width, strip + place);
            place += width;
        }
        halves.rows(how, count, at, strip, to, pitch);
    }
}
