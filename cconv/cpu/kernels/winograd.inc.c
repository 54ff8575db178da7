/* Winograd: tiles of m x m' outputs from alpha x alpha' products per channel instead of m m' r r'.
 *
 * `down` is the transform of a tile's columns, `across` that of its rows. At stride s = 1, alpha = m + r - 1; at s = 2
 * even inputs and taps have a transform, odd ones another, and alpha = 2 m + r - 2, as many as the tile has inputs.
 *
 * In: T, NAME, simd.h; a cconv_winograd with the coefficients of planning/winograd.py.
 * Out: to_points, to_outputs, runs_of, EACH_WINOGRAD, IS; winograd_input.inc.c and winograd_output.inc.c, which need
 * them. multiply_pixels or multiply_channels does the products in between.
 *
 *   U = G g G'      V = B' d B      M = sum over channels of U V      y = A' M A      (one dimension after the other)
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
/* Tiles of a strip; elements from one of its rows to the next: every tile may stand alone, vectors reach too far. */
#define STRIP_TILES (CCONV_STRIP / (long)sizeof(T))
#define TILES_PITCH(alpha) (STRIP_TILES * (alpha) + 6 * LANES)

/* B': alpha inputs d to alpha points o. `c` are the coefficients: p and Q_p without its leading 1 per pair, then Z. */
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

/* The runs of tiles first .. first+count-1, counted along rows, down the image, over the phases of the dilation and
 * over the images. A tile is `high` x `wide` steps of the dilation. */
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

/* The tiles of planning/winograd.py: m down and across, taps, stride. */
#define EACH_WINOGRAD(X)                                                                                               \
    X(2, 2, 3, 1) X(3, 3, 3, 1) X(4, 4, 3, 1) X(5, 5, 3, 1) X(6, 6, 3, 1) X(7, 7, 3, 1)                                \
    X(2, 2, 5, 1) X(3, 3, 5, 1) X(3, 4, 5, 1) X(4, 4, 5, 1) X(6, 6, 5, 1)                                              \
    X(2, 2, 7, 1) X(4, 4, 7, 1)                                                                                        \
    X(2, 2, 3, 2) X(4, 4, 3, 2)                                                                                        \
    X(2, 2, 5, 2) X(4, 4, 5, 2)

#define IS(MD, MA, R, S) (how->down.m == MD && how->across.m == MA && how->taps == R && how->stride == S)

#include "winograd_input.inc.c"
#include "winograd_output.inc.c"
