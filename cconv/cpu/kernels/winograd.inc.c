/* Winograd: tiles of m x m' outputs from alpha x alpha' products per channel instead of m m' r r'.
 *
 * `down` is the transform of a tile's columns, `across` that of its rows. At stride s = 1, alpha = m + r - 1; at s = 2 even
 * inputs and taps have a transform, odd ones another, and alpha = 2 m + r - 2, as many as the tile has inputs.
 *
 * In: T, NAME, simd.h, activate() of depthwise.inc.c; a cconv_winograd with the coefficients of planning/winograd.py.
 * Out: winograd_filter, winograd_input, winograd_output. multiply_pixels does the products in between.
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
#define MOST_TAPS 7
/* Points of m outputs and r taps at stride s, and of those of its even inputs alone. */
#define POINTS(m, r, s) ((s) * (m) + (r) - (s))
#define EVEN_POINTS(m, r) ((m) + ((r) + 1) / 2 - 1)

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

/* d[j] = column j of LANES tiles, the l-th of which begins at row + at[l]; `apart` from each other if `regular`. */
static inline __attribute__((always_inline)) void NAME(gather)(const int alpha, const int apart, const T *row,
                                                               const int32_t *at, int regular, V *d) {
    if (regular && apart == 2) {
        const T *p = row + at[0];
        _Pragma("GCC unroll 10") for (int j = 0; j < alpha; j += 2) {
            V a = load(p + j), b = load(p + j + LANES);
            d[j] = EVEN(a, b);
            if (j + 1 < alpha) d[j + 1] = ODD(a, b);
        }
    } else if (regular && apart == 4 && !BY_HALVES) {
        const T *p = row + at[0];
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
        load_columns(alpha, row, at, d);
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

/* LANES columns of an image's row from `column` on, `step` apart, zeros outside; `inside` and `beyond` are the columns of
 * the first two vectors from there on that the row has. */
static inline __attribute__((always_inline)) V NAME(load_phase)(const T *row, long column, long step, long W,
                                                                NAME(lanes) inside, NAME(lanes) beyond) {
    if (step == 1) return load_lanes(row + column, inside);
    if (step == 2) return EVEN(load_lanes(row + column, inside), load_lanes(row + column + LANES, beyond));
    T lanes[LANES];
    for (long l = 0; l < LANES; l++, column += step) lanes[l] = column >= 0 && column < W ? row[column] : 0;
    return load(lanes);
}

/* Tiles first .. first+count-1 of one channel, counted along rows, down the image, over the phases of the dilation and
 * over the images: points[(i * alpha' + j) * pitch + t]. Writes whole vectors of t; scratch holds strip and places. */
static inline __attribute__((always_inline)) void NAME(input_tiles)(const int m_down, const int m, const int r,
                                                                    const int s, const cconv_winograd *how, long first,
                                                                    long count, const char *source, T *scratch,
                                                                    T *points, long pitch) {
    const int alpha_down = POINTS(m_down, r, s), alpha = POINTS(m, r, s);
    const T *down_c = how->down.coefficients, *c = how->across.coefficients;
    T *strip = scratch;
    const long strip_pitch = how->strip_pitch, high = how->dilation_h, wide = how->dilation_w;
    int32_t *at = (int32_t *)(scratch + alpha_down * strip_pitch);
    long place = 0;
    for (long t = 0, length; t < count; t += length) { /* tiles of one row of tiles */
        long g = first + t, across = g % how->tiles_wide, down = g / how->tiles_wide % how->tiles_high;
        long n = g / (how->tiles_wide * how->tiles_high), phase = n % (high * wide);
        const char *image = source + n / (high * wide) * how->image_stride;
        length = how->tiles_wide - across < count - t ? how->tiles_wide - across : count - t;
        long top = down * m_down * s * high + phase / wide - how->top, width = (length - 1) * m * s + alpha;
        long left = across * m * s * wide + phase % wide - how->left;
        for (long j = 0; j < width; j += LANES, left += LANES * wide) {
            V d[MOST_POINTS], o[MOST_POINTS];
            const NAME(lanes) inside = between(-left, how->W - left);
            const NAME(lanes) beyond = wide == 1 ? inside : between(-left - LANES, how->W - left - LANES);
            _Pragma("GCC unroll 16") for (int i = 0; i < alpha_down; i++) {
                const long h = top + i * high;
                d[i] = (V){0};
                if (h >= 0 && h < how->H) {
                    const T *row = (const T *)(image + h * how->row_stride);
                    __builtin_prefetch((const char *)(row + left) + how->channel_stride); /* what the next call reads */
                    d[i] = NAME(load_phase)(row, left, wide, how->W, inside, beyond);
                }
            }
            NAME(to_points)(m_down, r, s, down_c, d, o);
            _Pragma("GCC unroll 16") for (int i = 0; i < alpha_down; i++)
                store(strip + i * strip_pitch + place + j, o[i]);
        }
        for (long i = 0; i < length; i++) at[t + i] = (int32_t)(place + i * m * s);
        place += width;
    }
    for (long t = count; t % LANES; t++) at[t] = at[count - 1];
    for (long t = 0; t < count; t += LANES) {
        long last = t + LANES < count ? t + LANES - 1 : count - 1;
        int regular = at[last] - at[t] == (last - t) * m * s;
        for (int i = 0; i < alpha_down; i++) {
            V d[MOST_POINTS], o[MOST_POINTS];
            NAME(gather)(alpha, m * s, strip + i * strip_pitch, at + t, regular, d);
            NAME(to_points)(m, r, s, c, d, o);
            _Pragma("GCC unroll 16") for (int j = 0; j < alpha; j++) store(points + (i * alpha + j) * pitch + t, o[j]);
        }
    }
}

/* Outputs of a row `step` apart, as many as `inside` says of `width`. */
static inline __attribute__((always_inline)) void NAME(store_phase)(T *to, V v, long step, long width,
                                                                    NAME(lanes) inside) {
    if (step == 1) {
        store_lanes(to, v, inside);
        return;
    }
    T lanes[LANES];
    store(lanes, v);
    for (long l = 0; l < LANES && l < width; l++) to[l * step] = lanes[l];
}

/* The same tiles of one output map from its products, with the epilogue. */
static inline __attribute__((always_inline)) void NAME(output_tiles)(const int m_down, const int m, const int r,
                                                                     const int s, const cconv_winograd *how,
                                                                     const cconv_finish *finish, double bias,
                                                                     long first, long count, const T *points,
                                                                     long pitch, T *strip, const T *residual,
                                                                     T *target) {
    const int alpha_down = POINTS(m_down, r, s), alpha = POINTS(m, r, s);
    const T *down_c = how->down.powers, *c = how->across.powers;
    const V b = splat((T)bias);
    const long strip_pitch = how->strip_pitch, high = how->dilation_h, wide = how->dilation_w;
    for (long t = 0; t < count; t += LANES)
        for (int i = 0; i < alpha_down; i++) {
            V v[MOST_POINTS], y[MOST_OUTPUTS];
            _Pragma("GCC unroll 16") for (int j = 0; j < alpha; j++) v[j] = load(points + (i * alpha + j) * pitch + t);
            NAME(to_outputs)(m, r, s, c, v, y);
            NAME(scatter)(m, y, strip + i * strip_pitch + t * m);
        }
    for (long t = 0, length; t < count; t += length) {
        long g = first + t, across = g % how->tiles_wide, down = g / how->tiles_wide % how->tiles_high;
        length = how->tiles_wide - across < count - t ? how->tiles_wide - across : count - t;
        long n = g / (how->tiles_wide * how->tiles_high), phase = n % (high * wide);
        long p = down * m_down * high + phase / wide, q = across * m * wide + phase % wide;
        long at = n / (high * wide) * how->map_stride + p * how->Q + q;
        long rows = (how->P - p + high - 1) / high, width = (how->Q - q + wide - 1) / wide;
        if (width > length * m) width = length * m;
        for (long j = 0; j < width; j += LANES) {
            if (j + LANES > width && j && !residual) j = width - LANES; /* the last vector overlaps the one before */
            V v[MOST_POINTS], y[MOST_OUTPUTS];
            _Pragma("GCC unroll 16") for (int i = 0; i < alpha_down; i++)
                v[i] = load(strip + i * strip_pitch + t * m + j);
            NAME(to_outputs)(m_down, r, s, down_c, v, y);
            const long span = (width - j - 1) * wide + 1; /* columns of the image that the outputs lie among */
            const NAME(lanes) inside = between(0, width - j), here = between(0, span);
            const NAME(lanes) beyond = between(-LANES, span - LANES);
            _Pragma("GCC unroll 8") for (int i = 0; i < m_down; i++) {
                const long place = at + i * high * how->Q + j * wide;
                y[i] += b;
                if (residual && i < rows) y[i] += NAME(load_phase)(residual + place, 0, wide, span, here, beyond);
            }
            NAME(activate)(finish, m_down, y);
            _Pragma("GCC unroll 8") for (int i = 0; i < m_down; i++) {
                if (i >= rows) break;
                T *to = target + at + i * high * how->Q + j * wide;
                NAME(store_phase)(to, y[i], wide, width - j, inside);
                __builtin_prefetch(to + how->P * how->Q, 1); /* what the next call writes */
            }
        }
    }
}

/* G: r taps g to alpha points o, which are `filter` rows of r. The rows of a pair share their even and
 * odd powers. */
#define DOUBLES (VECTOR_BYTES / 8)
typedef double NAME(wide) __attribute__((vector_size(VECTOR_BYTES)));
typedef T NAME(narrow) __attribute__((vector_size(DOUBLES * sizeof(T))));
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
        /* The row of -p is even - odd, but for the sign of its scale, which its first entry shows. */
        o[p] = even + odd;
        o[p + 1] = row[r] == row[0] ? even - odd : odd - even;
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

/* U of a panel of `outputs` filters of `channels` channels each: points[(i * alpha' + j) * pitch + c * width + output].
 * In double, rounded once. A few channels at a time, the taps of LANES filters first become vectors. */
#define CHANNELS_AT_ONCE 8
static inline __attribute__((always_inline)) void NAME(filter_tiles)(const int m_down, const int m, const int r,
                                                                     const int s, const cconv_winograd *how,
                                                                     long outputs, long width, long channels,
                                                                     const T *weight, T *points, long pitch) {
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
                    const T *row = weight + ((f + l) * channels + c) * r * r + k;
                    __builtin_prefetch(row + CHANNELS_AT_ONCE * r * r); /* rows are too short for the processor's own */
                    v[l] = l < filters ? load_anywhere(row, across) : (V){0};
                }
                flip(v);
                _Pragma("GCC unroll 16") for (int l = 0; l < LANES; l++) store(taps[k + l], v[l]);
            }
            for (long t = 0; t < some; t++)
                for (long h = 0; h < filters; h += DOUBLES) {
                    NAME(wide) half[MOST_TAPS][MOST_POINTS];
                    _Pragma("GCC unroll 7") for (int k = 0; k < r; k++) {
                        NAME(wide) g[MOST_TAPS];
                        _Pragma("GCC unroll 7") for (int i = 0; i < r; i++) {
                            NAME(narrow) tap;
                            memcpy(&tap, &taps[(t * r + i) * r + k][h], sizeof tap);
                            g[i] = __builtin_convertvector(tap, NAME(wide));
                        }
                        NAME(to_filter_points)(m_down, r, s, how->down.filter, g, half[k]);
                    }
                    T *to = points + (c + t) * width + f + h;
                    for (int i = 0; i < alpha_down; i++) {
                        NAME(wide) row[MOST_TAPS], o[MOST_POINTS];
                        _Pragma("GCC unroll 7") for (int k = 0; k < r; k++) row[k] = half[k][i];
                        NAME(to_filter_points)(m, r, s, how->across.filter, row, o);
                        _Pragma("GCC unroll 16") for (int j = 0; j < alpha; j++, to += pitch) {
                            const NAME(narrow) u = __builtin_convertvector(o[j], NAME(narrow));
                            /* Zeros beyond the panel's width make way for the next channel. */
                            if (h + DOUBLES <= filters || (outputs <= LANES && c + t + 1 < channels))
                                memcpy(to, &u, sizeof u);
                            else
                                for (long l = 0; l < filters - h; l++) to[l] = u[l];
                        }
                    }
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
    static __attribute__((noinline)) void NAME(input_##MD##_##MA##_##R##_##S)(                                         \
        const cconv_winograd *how, long first, long count, const char *source, T *scratch, T *points, long pitch) {    \
        NAME(input_tiles)(MD, MA, R, S, how, first, count, source, scratch, points, pitch);                            \
    }                                                                                                                  \
    static __attribute__((noinline)) void NAME(output_##MD##_##MA##_##R##_##S)(                                        \
        const cconv_winograd *how, const cconv_finish *finish, double bias, long first, long count, const T *points,   \
        long pitch, T *strip, const T *residual, T *target) {                                                          \
        NAME(output_tiles)                                                                                             \
        (MD, MA, R, S, how, finish, bias, first, count, points, pitch, strip, residual, target);                       \
    }                                                                                                                  \
    static __attribute__((noinline)) void NAME(filter_##MD##_##MA##_##R##_##S)(                                        \
        const cconv_winograd *how, long outputs, long width, long channels, const T *weight, T *points, long pitch) {  \
        NAME(filter_tiles)(MD, MA, R, S, how, outputs, width, channels, weight, points, pitch);                        \
    }
EACH_WINOGRAD(WINOGRAD)
#define IS(MD, MA, R, S) (how->down.m == MD && how->across.m == MA && how->taps == R && how->stride == S)

static void NAME(winograd_filter)(const cconv_winograd *how, long outputs, long width, long channels,
                                  const void *weight, void *points, long pitch) {
#define CASE(MD, MA, R, S)                                                                                             \
    if (IS(MD, MA, R, S))                                                                                              \
        NAME(filter_##MD##_##MA##_##R##_##S)(how, outputs, width, channels, weight, points, pitch);
    EACH_WINOGRAD(CASE)
#undef CASE
}

static void NAME(winograd_input)(const cconv_winograd *how, long first, long count, const void *source, void *scratch,
                                 void *points, long pitch) {
#define CASE(MD, MA, R, S)                                                                                             \
    if (IS(MD, MA, R, S)) NAME(input_##MD##_##MA##_##R##_##S)(how, first, count, source, scratch, points, pitch);
    EACH_WINOGRAD(CASE)
#undef CASE
}

static void NAME(winograd_output)(const cconv_winograd *how, const cconv_finish *finish, double bias, long first,
                                  long count, const void *points, long pitch, void *scratch, const void *residual,
                                  void *target) {
#define CASE(MD, MA, R, S)                                                                                             \
    if (IS(MD, MA, R, S))                                                                                              \
        NAME(output_##MD##_##MA##_##R##_##S)                                                                           \
        (how, finish, bias, first, count, points, pitch, scratch, residual, target);
    EACH_WINOGRAD(CASE)
#undef CASE
}
#undef IS
