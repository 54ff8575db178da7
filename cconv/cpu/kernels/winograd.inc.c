/* Winograd: tiles of m x m' outputs from alpha x alpha' products per channel instead of m m' r r'.
 *
 * `down` is the transform of a tile's columns, `across` that of its rows. At stride s = 1, alpha = m + r - 1; at s = 2 even
 * inputs and taps have a transform, odd ones another, and alpha = 2 m + r - 2, as many as the tile has inputs.
 *
 * In: T, NAME, simd.h, activate() of depthwise.inc.c; a cconv_winograd with the coefficients of planning/winograd.py.
 * Out: winograd_input, winograd_output; EACH_WINOGRAD, IS. multiply_pixels does the products in between.
 *
 *   U = G g G'      V = B' d B      M = sum over channels of U V      y = A' M A          (one dimension after the other)
 *
 * A vector holds LANES neighbouring tiles. The vertical half of a transform then works on rows of the image as they
 * are; between the halves lies a strip of alpha rows, in scratch, with the tiles of a block side by side:
 *
 *     strip row i     tile 0: a0 a1 a2 a3   tile 1: b0 b1 b2 b3   ...          m' s = 4
 *     vectors         [a0 b0 ...] [a1 b1 ...] [a2 b2 ...] [a3 b3 ...]          by EVEN and ODD, or a transposition
 *
 * The points of a transform are 0 (if alpha is even), n pairs +p, -p, and infinity; the two of a pair share their sums:
 * rows(+-p) = A +- p B. Every expression adds one product at most, so that contraction to fused multiply-adds leaves
 * the compiler no choice and a result does not depend on where in a vector its tile stands.
 */
#define MOST_POINTS 11
#define MOST_OUTPUTS 7
/* Points of m outputs and r taps at stride s, and of those of its even inputs alone. */
#define POINTS(m, r, s) ((s) * (m) + (r) - (s))
#define EVEN_POINTS(m, r) ((m) + ((r) + 1) / 2 - 1)
/* Tiles of a strip; elements from one of its rows to the next: every tile may stand alone, and vectors reach too far. */
#define STRIP_TILES (CCONV_STRIP / (long)sizeof(T))
#define TILES_PITCH(alpha) (STRIP_TILES * (alpha) + 6 * LANES)

/* B': alpha inputs d to alpha points o. `c` are the coefficients: p, then Q_p without its leading 1, per pair; then Z. */
static inline __attribute__((always_inline)) void NAME(points_of)(const int alpha, const T *c, const V *d, V *o) {
    const int n = (alpha - 1) / 2, z = 1 - alpha % 2;
    _Pragma("GCC unroll 4") for (int p = 0; p < n; p++, c += n) {
        V a = d[2 * n - 1 + z], b = d[2 * n - 2 + z];
        _Pragma("GCC unroll 4") for (int k = 0; k < n - 1; k++) {
            a += splat(c[1 + k]) * d[2 * k + 1 + z];
            b += splat(c[1 + k]) * d[2 * k + z];
        }
        o[z + 2 * p] = a + splat(c[0]) * b;
        o[z + 2 * p + 1] = a - splat(c[0]) * b;
    }
    V zero = d[2 * n], infinity = d[2 * n + z];
    _Pragma("GCC unroll 4") for (int k = 0; k < n; k++) {
        zero += splat(c[k]) * d[2 * k];
        infinity += splat(c[k]) * d[2 * k + z];
    }
    if (z) o[0] = zero;
    o[alpha - 1] = infinity;
}

/* The same at stride s: the even inputs' points, then those of the odd ones. */
static inline __attribute__((always_inline)) void NAME(to_points)(const int m, const int r, const int s, const T *c,
                                                                  const V *d, V *o) {
    if (s == 1) {
        NAME(points_of)(POINTS(m, r, 1), c, d, o);
        return;
    }
    const int evens = EVEN_POINTS(m, r), odds = POINTS(m, r, 2) - evens, pairs = (evens - 1) / 2;
    V half[MOST_POINTS];
    _Pragma("GCC unroll 16") for (int i = 0; i < evens; i++) half[i] = d[2 * i];
    NAME(points_of)(evens, c, half, o);
    _Pragma("GCC unroll 16") for (int i = 0; i < odds; i++) half[i] = d[2 * i + 1];
    if (r > 3)
        NAME(points_of)(odds, c + pairs * (pairs + 1), half, o + evens);
    else
        _Pragma("GCC unroll 16") for (int i = 0; i < odds; i++) o[evens + i] = half[i];
}

/* A': alpha points v to m outputs y. `c` are the powers p, p^2 ... p^(m-1) per pair. */
static inline __attribute__((always_inline)) void NAME(outputs_of)(const int alpha, const int m, const T *c, const V *v,
                                                                   V *y) {
    const int n = (alpha - 1) / 2, z = 1 - alpha % 2;
    V sum[4], difference[4];
    _Pragma("GCC unroll 4") for (int p = 0; p < n; p++) {
        sum[p] = v[z + 2 * p] + v[z + 2 * p + 1];
        difference[p] = v[z + 2 * p] - v[z + 2 * p + 1];
    }
    y[0] = sum[0];
    if (z) y[0] += v[0];
    _Pragma("GCC unroll 4") for (int p = 1; p < n; p++) y[0] += sum[p];
    _Pragma("GCC unroll 10") for (int i = 1; i < m; i++) {
        const V *half = i % 2 ? difference : sum;
        V first = ROUNDED(splat(c[i - 1]) * half[0]); /* a second product is added to it */
        y[i] = first;
        _Pragma("GCC unroll 4") for (int p = 1; p < n; p++) y[i] += splat(c[p * (m - 1) + i - 1]) * half[p];
    }
    y[m - 1] += v[alpha - 1];
}

/* The same at stride s: the sum of what even and odd inputs give. */
static inline __attribute__((always_inline)) void NAME(to_outputs)(const int m, const int r, const int s, const T *c,
                                                                   const V *v, V *y) {
    if (s == 1) {
        NAME(outputs_of)(POINTS(m, r, 1), m, c, v, y);
        return;
    }
    const int evens = EVEN_POINTS(m, r), odds = POINTS(m, r, 2) - evens;
    V other[MOST_OUTPUTS];
    NAME(outputs_of)(evens, m, c, v, y);
    if (r > 3) NAME(outputs_of)(odds, m, c + (evens - 1) / 2 * (m - 1), v + evens, other);
    _Pragma("GCC unroll 8") for (int i = 0; i < m; i++) y[i] += r > 3 ? other[i] : v[evens + i];
}

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

/* The inverse: column j of LANES tiles from y[j], tiles side by side from p on. Writes up to a vector too far. */
static inline __attribute__((always_inline)) void NAME(scatter)(const int m, const V *y, T *p) {
    if (m == 2) {
        store(p, LOW(y[0], y[1]));
        store(p + LANES, HIGH(y[0], y[1]));
    } else if (m == 4 && !BY_HALVES) {
        V even[2] = {LOW(y[0], y[2]), HIGH(y[0], y[2])}, odd[2] = {LOW(y[1], y[3]), HIGH(y[1], y[3])};
        _Pragma("GCC unroll 2") for (int i = 0; i < 2; i++) {
            store(p + 2 * i * LANES, LOW(even[i], odd[i]));
            store(p + (2 * i + 1) * LANES, HIGH(even[i], odd[i]));
        }
    } else {
        store_columns(m, y, p);
    }
}

/* LANES columns of an image's row from `column` on, `step` apart, zeros outside. */
static inline __attribute__((always_inline)) V NAME(load_phase)(const T *row, long column, long step, long W) {
    const NAME(lanes) inside = between(-column, W - column);
    if (step == 1) return load_lanes(row + column, inside);
    if (step == 2)
        return EVEN(load_lanes(row + column, inside),
                    load_lanes(row + column + LANES, between(-column - LANES, W - column - LANES)));
    T lanes[LANES];
    for (long l = 0; l < LANES; l++, column += step) lanes[l] = column >= 0 && column < W ? row[column] : 0;
    return load(lanes);
}

/* Tiles side by side in one row of tiles. */
typedef struct {
    ptrdiff_t image; /* where it begins */
    long top, left;  /* row and column of the first tile */
    long tiles;
} NAME(run);

/* The runs of tiles first .. first+count-1, counted along rows, down the image, over the phases of the dilation and over
 * the images. A tile is `high` x `wide` steps of the dilation. */
static long NAME(runs_of)(const cconv_winograd *how, long first, long count, long high, long wide, ptrdiff_t image_step,
                          NAME(run) *runs) {
    const long phases_wide = how->dilation_w, phases = how->dilation_h * phases_wide;
    long across = first % how->tiles_wide, down = first / how->tiles_wide % how->tiles_high;
    long n = first / (how->tiles_wide * how->tiles_high), phase = n % phases, found = 0;
    for (n /= phases; count > 0; count -= runs[found++].tiles) {
        NAME(run) *run = runs + found;
        run->tiles = how->tiles_wide - across < count ? how->tiles_wide - across : count;
        run->image = n * image_step;
        run->top = down * high * how->dilation_h + phase / phases_wide;
        run->left = across * wide * phases_wide + phase % phases_wide;
        across = 0;
        if (++down < how->tiles_high) continue;
        down = 0;
        if (++phase < phases) continue;
        phase = 0;
        n++;
    }
    return found;
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

/* Outputs of a row `step` apart, `width` of them if they are fewer than LANES. */
static inline __attribute__((always_inline)) void NAME(store_phase)(T *to, V v, long step, long width) {
    if (step == 1) {
        if (width >= LANES)
            store(to, v);
        else
            store_lanes(to, v, between(0, width));
        return;
    }
    T lanes[LANES];
    store(lanes, v);
    for (long l = 0; l < LANES && l < width; l++) to[l * step] = lanes[l];
}

/* The outputs of a run, of which the map has `high` rows and `width` columns: the vertical half of its transform, rows of
 * the strip to rows of the map, and the epilogue. */
static inline __attribute__((always_inline)) void NAME(output_columns)(const int m_down, const int m, const int r,
                                                                       const int s, const int dilated,
                                                                       const cconv_winograd *how,
                                                                       const cconv_finish *finish, const T *bias,
                                                                       long high, long width, const T *strip,
                                                                       const T *residual, T *target) {
    const int alpha_down = POINTS(m_down, r, s);
    const T *c = how->down.powers;
    const V b = splat(bias ? *bias : 0);
    const long pitch = TILES_PITCH(POINTS(m, r, s)), row = how->dilation_h * how->Q;
    const long wide = dilated ? how->dilation_w : 1, span = (width - 1) * wide + 1;
    const int past = finish->past && !dilated && LINE(row * sizeof(T));
    for (long j = 0; j < width; j += LANES) {
        if (j + LANES > width && j && !residual) j = width - LANES; /* the last vector overlaps the one before */
        V v[MOST_POINTS], y[MOST_OUTPUTS];
        _Pragma("GCC unroll 16") for (int i = 0; i < alpha_down; i++) v[i] = load(strip + i * pitch + j);
        NAME(to_outputs)(m_down, r, s, c, v, y);
        _Pragma("GCC unroll 8") for (int i = 0; i < m_down; i++) y[i] += b;
        if (residual)
            _Pragma("GCC unroll 8") for (int i = 0; i < m_down; i++) {
                if (i == high) break;
                y[i] += NAME(load_phase)(residual + i * row, j * wide, wide, span);
            }
        NAME(activate)(finish, m_down, y);
        T *to = target + j * wide;
        _Pragma("GCC unroll 8") for (int i = 0; i < m_down; i++, to += row) {
            if (i == high) break;
            if (past && width - j >= LANES && LINE(to)) {
                stream(to, y[i]);
                continue;
            }
            NAME(store_phase)(to, y[i], wide, width - j);
            __builtin_prefetch(to + how->P * how->Q, 1); /* the next map's */
        }
    }
}

/* The horizontal half: the points of `count` tiles to the strip, where they lie side by side. */
static inline __attribute__((always_inline)) void NAME(output_rows)(const int m_down, const int m, const int r,
                                                                    const int s, const cconv_winograd *how, long count,
                                                                    const T *points, long pitch, T *strip) {
    const int alpha_down = POINTS(m_down, r, s), alpha = POINTS(m, r, s);
    const T *c = how->across.powers;
    for (long t = 0; t < count; t += LANES) {
        const T *point = points + t;
        T *to = strip + t * m;
        for (int i = 0; i < alpha_down; i++, to += TILES_PITCH(alpha)) {
            V v[MOST_POINTS], y[MOST_OUTPUTS];
            _Pragma("GCC unroll 16") for (int j = 0; j < alpha; j++, point += pitch) v[j] = load(point);
            NAME(to_outputs)(m, r, s, c, v, y);
            NAME(scatter)(m, y, to);
        }
    }
}

/* The tiles of planning/winograd.py: m down and across, taps, stride. */
#define EACH_WINOGRAD(X)                                                                                               \
    X(2, 2, 3, 1) X(3, 3, 3, 1) X(4, 4, 3, 1) X(5, 5, 3, 1) X(6, 6, 3, 1) X(7, 7, 3, 1)                                \
    X(2, 2, 5, 1) X(3, 3, 5, 1) X(3, 4, 5, 1) X(4, 4, 5, 1) X(6, 6, 5, 1)                                              \
    X(2, 2, 7, 1) X(4, 4, 7, 1)                                                                                        \
    X(2, 2, 3, 2) X(4, 4, 3, 2)                                                                                        \
    X(2, 2, 5, 2) X(4, 4, 5, 2)

#define WINOGRAD(MD, MA, R, S)                                                                                         \
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
    }                                                                                                                  \
    static __attribute__((noinline)) void NAME(output_columns_##MD##_##MA##_##R##_##S)(                                \
        const cconv_winograd *how, const cconv_finish *finish, const T *bias, long high, long width, const T *strip,   \
        const T *residual, T *target) {                                                                                \
        NAME(output_columns)(MD, MA, R, S, 0, how, finish, bias, high, width, strip, residual, target);                \
    }                                                                                                                  \
    static __attribute__((noinline)) void NAME(output_dilated_##MD##_##MA##_##R##_##S)(                                \
        const cconv_winograd *how, const cconv_finish *finish, const T *bias, long high, long width, const T *strip,   \
        const T *residual, T *target) {                                                                                \
        NAME(output_columns)(MD, MA, R, S, 1, how, finish, bias, high, width, strip, residual, target);                \
    }                                                                                                                  \
    static __attribute__((noinline)) void NAME(output_rows_##MD##_##MA##_##R##_##S)(                                   \
        const cconv_winograd *how, long count, const T *points, long pitch, T *strip) {                                \
        NAME(output_rows)(MD, MA, R, S, how, count, points, pitch, strip);                                             \
    }
EACH_WINOGRAD(WINOGRAD)

/* Both halves of a tile's transforms; those of columns also where they are dilated. */
typedef struct {
    void (*input_columns)(const cconv_winograd *, const T *const *, long, long, T *);
    void (*input_rows)(const cconv_winograd *, long, const int32_t *, const T *, T *, long);
    void (*output_rows)(const cconv_winograd *, long, const T *, long, T *);
    void (*output_columns)(const cconv_winograd *, const cconv_finish *, const T *, long, long, const T *, const T *,
                           T *);
} NAME(halves);

#define IS(MD, MA, R, S) (how->down.m == MD && how->across.m == MA && how->taps == R && how->stride == S)
static NAME(halves) NAME(halves_of)(const cconv_winograd *how) {
    NAME(halves) halves = {0};
    const int dilated = how->dilation_w > 1;
#define CASE(MD, MA, R, S)                                                                                             \
    if (IS(MD, MA, R, S))                                                                                              \
        halves = (NAME(halves)){dilated ? NAME(input_dilated_##MD##_##MA##_##R##_##S)                                  \
                                        : NAME(input_columns_##MD##_##MA##_##R##_##S),                                 \
                                NAME(input_rows_##MD##_##MA##_##R##_##S),                                              \
                                NAME(output_rows_##MD##_##MA##_##R##_##S),                                             \
                                dilated ? NAME(output_dilated_##MD##_##MA##_##R##_##S)                                 \
                                        : NAME(output_columns_##MD##_##MA##_##R##_##S)};
    EACH_WINOGRAD(CASE)
#undef CASE
    return halves;
}

/* Tiles first .. first+count-1 of some channels: points[(i * alpha' + j) * pitch + channel * channel_pitch + t]. Writes
 * whole vectors of t; scratch holds a strip. */
static void NAME(winograd_input)(const cconv_winograd *how, long first, long count, long channels, const void *source,
                                 void *scratch, void *points, long pitch, long channel_pitch) {
    const NAME(halves) halves = NAME(halves_of)(how);
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
            halves.input_columns(how, rows, run->left - how->left, width, strip + place);
            place += width;
        }
        halves.input_rows(how, count, at, strip, to, pitch);
    }
}

/* The same tiles of some output maps from their products, with the epilogue. */
static void NAME(winograd_output)(const cconv_winograd *how, const cconv_finish *finish, const void *bias, long first,
                                  long count, long outputs, const void *points, long pitch, long channel_pitch,
                                  void *scratch, const void *residual, void *target) {
    const NAME(halves) halves = NAME(halves_of)(how);
    const long map = how->P * how->Q, m = how->across.m;
    const T *from = points, *biases = bias, *second = residual;
    T *strip = scratch, *y = target;
    NAME(run) runs[STRIP_TILES];
    const long found = NAME(runs_of)(how, first, count, how->down.m, m, how->map_stride, runs);
    for (long output = 0; output < outputs; output++, from += channel_pitch) {
        long place = 0;
        halves.output_rows(how, count, from, pitch, strip);
        for (const NAME(run) *run = runs; run < runs + found; place += run++->tiles * m) {
            const long at = output * map + run->image + run->top * how->Q + run->left;
            const long high = (how->P - run->top + how->dilation_h - 1) / how->dilation_h;
            const long inside = (how->Q - run->left + how->dilation_w - 1) / how->dilation_w;
            const long width = inside < run->tiles * m ? inside : run->tiles * m;
            halves.output_columns(how, finish, biases ? biases + output : NULL, high, width, strip + place,
                                  second ? second + at : NULL, y + at);
        }
    }
}
