/* Multiply: the two register-tiled multiplications, for which everything else prepares.
 *
 * In: T, NAME, simd.h, step.inc.c, EACH_ROWS(X) = X(1) ... X(pixels of the register tile), EACH_PIXELS(X) = X(outputs,
 * vectors) ... Out: multiply_channels, multiply_pixels, multiply_row, widest.
 *
 * Both compute   sums[pixel][output] (+)= sum over k < depth of  input[offset[k] + pixel] * panel[k][output]
 * and differ in what a vector holds:
 *
 *   multiply_channels    sums[pixel]  [o o o o|o o o o]   panel[k] is a row of vectors, input[...] is broadcast
 *   multiply_pixels      sums[output] [p p p p|p p p p]   input[...] is a row of vectors, panel[k][output] is broadcast
 *
 * Every sum is cut into chains of at most `chain` products: fused multiply-adds in the order of k, added to the sums
 * one chain after the other. No tile shape changes a bit of the result.
 * Assumptions: input holds whole vectors (garbage lanes are computed, and dropped by whoever reads the sums).
 */

/* How far ahead of its use a panel is asked for, in bytes: it comes from the third level where it is large. */
#define AHEAD 4096
/* Steps of k in one turn of a loop: what a turn costs besides its products counts where another thread shares the core.
 * Tiles of many rows have enough products in one step; without FMA the compiler runs out of registers, and so it does
 * with lanes "pixels" but for the tiles in assembly. */
#ifdef __FMA__
#define CHANNELS_STEPS (TILE_ROWS > 8 ? 1 : 4)
#else
#define CHANNELS_STEPS 1
#endif
#define PIXELS_STEPS(O, W) (IN_ASSEMBLY(O, W) ? 4 : 1)
/* The bytes of a panel that a turn reads, asked for. */
#define EXPECT(panel, bytes)                                                                                           \
    _Pragma("GCC unroll 8") for (size_t line = 0; line < (bytes); line += 64)                                          \
        __builtin_prefetch((const char *)(panel) + AHEAD + line)

/* The most sums of a tile that has room for the totals of its chains, too: 15 sums, 15 totals and two vectors are the
 * 32 registers of AVX-512. Elsewhere, and in larger tiles, totals wait in memory while a chain is summed. */
#ifdef __AVX512F__
#define MOST_KEPT 15
#else
#define MOST_KEPT 0
#endif
#define KEPT(R, W) ((W) < 3 && (R) * (W) <= MOST_KEPT)
#define EACH_TOTAL(R, W)                                                                                               \
    _Pragma("GCC unroll 16") for (int i = 0; i < R; i++) _Pragma("GCC unroll 2") for (int v = 0; v < W; v++)
/* What changes no bit of what is added to it: 0 would, of -0. */
#define NOTHING splat((T)-0.0)

/* R pixels by W vectors of output channels in registers. */
#define CHANNELS(R, W)                                                                                                 \
    static __attribute__((noinline)) void NAME(channels_##R##x##W)(                                                    \
        long depth, long chain, const int32_t *restrict offset, const T *restrict input, const T *restrict panel,      \
        T *restrict sums, long pitch, int add, int ahead) {                                                            \
        const int32_t *o = offset;                                                                                     \
        const T *p = panel;                                                                                            \
        V total[R * W];                                                                                                \
        if (KEPT(R, W))                                                                                                \
            EACH_TOTAL(R, W) total[i * W + v] = add ? load(sums + i * pitch + v * LANES) : NOTHING;                    \
        for (const int32_t *const last = o + depth; o < last; add = 1) {                                               \
            const int32_t *const end = chain < last - o ? o + chain : last;                                            \
            V c[R * W];                                                                                                \
            _Pragma("GCC unroll 32") for (int sum = 0; sum < R * W; sum++) c[sum] = (V){0};                            \
            for (; o + CHANNELS_STEPS <= end; o += CHANNELS_STEPS, p += CHANNELS_STEPS * W * LANES) {                  \
                if (ahead) EXPECT(p, CHANNELS_STEPS * W * sizeof(V));                                                  \
                _Pragma("GCC unroll 4") for (int step = 0; step < CHANNELS_STEPS; step++)                              \
                    NAME(step)(R, W, c, p, step * W * LANES, input, o[step], 0);                                       \
            }                                                                                                          \
            if (CHANNELS_STEPS > 1)                                                                                    \
                for (; o < end; o++, p += W * LANES) NAME(step)(R, W, c, p, 0, input, *o, 0);                          \
            if (KEPT(R, W)) {                                                                                          \
                _Pragma("GCC unroll 16") for (int sum = 0; sum < R * W; sum++) total[sum] += c[sum];                   \
                continue;                                                                                              \
            }                                                                                                          \
            _Pragma("GCC unroll 16") for (int i = 0; i < R; i++)                                                       \
                _Pragma("GCC unroll 3") for (int v = 0; v < W; v++) {                                                  \
                T *to = sums + i * pitch + v * LANES;                                                                  \
                store(to, add ? load(to) + c[i * W + v] : c[i * W + v]);                                               \
            }                                                                                                          \
        }                                                                                                              \
        if (KEPT(R, W)) EACH_TOTAL(R, W) store(sums + i * pitch + v * LANES, total[i * W + v]);                        \
    }
#define CHANNELS_BOTH(R) CHANNELS(R, 1) CHANNELS(R, 2)
EACH_ROWS(CHANNELS_BOTH)

typedef void (*NAME(channels_kernel))(long, long, const int32_t *, const T *, const T *, T *, long, int, int);
#define CHANNELS_ENTRY(R) {NAME(channels_##R##x1), NAME(channels_##R##x2)},
static const NAME(channels_kernel) NAME(channels_table)[][2] = {EACH_ROWS(CHANNELS_ENTRY)};
/* Three vectors by fewer pixels: fewer loads per product, where registers are too few for many rows. */
#ifdef EACH_WIDE_ROWS
#define WIDE_VECTORS 3
#define CHANNELS_WIDE(R) CHANNELS(R, 3)
#define CHANNELS_WIDE_ENTRY(R) NAME(channels_##R##x3),
EACH_WIDE_ROWS(CHANNELS_WIDE)
static const NAME(channels_kernel) NAME(channels_wide)[] = {EACH_WIDE_ROWS(CHANNELS_WIDE_ENTRY)};
#else
#define WIDE_VECTORS 2
#define WIDE_ROWS TILE_ROWS
#endif

/* Pixels lie side by side; rows of the register tile that are left over make the last tiles smaller. The first tile
 * asks for its panel and the last one for what follows it: those between find theirs in the first level. */
static void NAME(multiply_channels)(int pixels, int vectors, long depth, long chain, const int32_t *offset,
                                    const void *input, const void *panel, void *sums, long pitch, int add) {
    const T *a = input;
    T *to = sums;
    const int rows = vectors > 2 ? WIDE_ROWS : TILE_ROWS;
    for (int cuts = (pixels + rows - 1) / rows, n; cuts > 0; cuts--, pixels -= n, a += n, to += n * pitch) {
        n = pixels / cuts;
        const int ahead = cuts == 1 || a == (const T *)input || chain < depth;
#ifdef EACH_WIDE_ROWS
        NAME(channels_kernel) tile =
            vectors > 2 ? NAME(channels_wide)[n - 1] : NAME(channels_table)[n - 1][vectors - 1];
#else
        NAME(channels_kernel) tile = NAME(channels_table)[n - 1][vectors - 1];
#endif
        tile(depth, chain, offset, a, panel, to, pitch, add, ahead);
    }
}

/* Where finished sums go: y = activation(sums + bias + residual) of some outputs' maps. */
typedef struct {
    const T *bias, *residual; /* or NULL */
    T *target;
    long map; /* elements from a map to the next, of the residual as well */
    int activation; /* up to CCONV_RELU6 */
    int past; /* whole lines may go past the caches */
    int partial; /* the vector of which only `lanes` are to be finished, or -1 */
    NAME(lanes) lanes;
    cconv_gaps gaps; /* of a run: `before` the first tile's first vector and those behind it; or NULLs */
    int end; /* pixels of the run */
} NAME(maps);

#define EACH_SUM(O, W)                                                                                                 \
    _Pragma("GCC unroll 32") for (int o = 0; o < O; o++) _Pragma("GCC unroll 8") for (int v = 0; v < W; v++)
#define SUM c[o * width + v]
#define TOTAL total[o * width + v]

/* Sums of whole vectors to O maps: the first-th of the first tile's and those behind it. */
static inline __attribute__((always_inline)) void NAME(end_whole)(const int O, const int width, V *c, long first,
                                                                  const NAME(maps) *to) {
    T *y = to->target + first * LANES;
    if (to->residual) EACH_SUM(O, width) SUM += load(to->residual + first * LANES + o * to->map + v * LANES);
    if (to->activation) EACH_SUM(O, width) SUM = LARGER((V){0}, SUM);
    if (to->activation == CCONV_RELU6) EACH_SUM(O, width) SUM = SMALLER(splat(6), SUM);
    if (to->past)
        EACH_SUM(O, width) stream(y + o * to->map + v * LANES, SUM);
    else
        EACH_SUM(O, width) store(y + o * to->map + v * LANES, SUM);
}

/* The same where vectors are finished in part: the one that is `partial` or, in a run with gaps, any. There the pixels
 * of a vector are moved together, which lie at[...] modulo its lanes. */
typedef int32_t NAME(places) __attribute__((vector_size(LANES * sizeof(int32_t)), aligned(4), may_alias));
static inline __attribute__((always_inline)) void NAME(end_parts)(const int O, const int width, V *c, long first,
                                                                  const NAME(maps) *to) {
    const T lower = to->activation ? 0 : -__builtin_inf(), upper = to->activation == CCONV_RELU6 ? 6 : __builtin_inf();
    _Pragma("GCC unroll 8") for (int v = 0; v < width; v++) {
        long pixel = (first + v) * LANES;
        NAME(lanes) lanes = first + v == to->partial ? to->lanes : between(0, LANES);
        if (to->gaps.at) {
            const int32_t *before = to->gaps.before + first + v;
            pixel = before[0];
            lanes = between(0, (before[1] < to->end ? before[1] : to->end) - pixel);
            const NAME(places) at = *(const NAME(places) *)(to->gaps.at + pixel);
            _Pragma("GCC unroll 32") for (int o = 0; o < O; o++)
                SUM = __builtin_shuffle(SUM, __builtin_convertvector(at, NAME(comparison)));
        }
        if (to->residual)
            _Pragma("GCC unroll 32") for (int o = 0; o < O; o++)
                SUM += load_lanes(to->residual + o * to->map + pixel, lanes);
        _Pragma("GCC unroll 32") for (int o = 0; o < O; o++)
            SUM = SMALLER(splat(upper), LARGER(splat(lower), SUM));
        _Pragma("GCC unroll 32") for (int o = 0; o < O; o++) store_lanes(to->target + o * to->map + pixel, SUM, lanes);
    }
}

/* O output channels by W vectors of pixels in registers, `tiles` times side by side. Per k: W loads, O broadcasts, O*W
 * fused multiply-adds. What begins and ends in one call needs sums only between its chains, each tile the same ones.
 * Ends need registers of their own, which totals of two vectors would not leave. */
#define PIXELS(O, W)                                                                                                   \
    static __attribute__((noinline)) void NAME(pixels_##O##x##W)(                                                      \
        long tiles, long depth, long chain, const int32_t *restrict offset, const T *restrict input,                   \
        const T *restrict panel, T *restrict sums, long pitch, int adds, const NAME(maps) *to) {                       \
        enum { width = W, steps = PIXELS_STEPS(O, W), kept = (W) == 1 && KEPT(O, W) };                                 \
        for (long tile = 0; tile < tiles; tile++, input += W * LANES, sums += to && !adds ? 0 : W * LANES) {           \
            const T *restrict weights = panel;                                                                         \
            int add = adds;                                                                                            \
            V total[O * W];                                                                                            \
            if (kept) EACH_SUM(O, W) TOTAL = add ? load(sums + o * pitch + v * LANES) : NOTHING;                       \
            for (long k = 0, end; k < depth; add = 1) {                                                                \
                V c[O * W];                                                                                            \
                EACH_SUM(O, W) SUM = (V){0};                                                                           \
                end = k + chain < depth ? k + chain : depth;                                                           \
                for (; k + steps <= end; k += steps, weights += steps * O) {                                           \
                    EXPECT(weights, steps * O * sizeof(T));                                                            \
                    _Pragma("GCC unroll 4") for (int step = 0; step < steps; step++)                                   \
                        NAME(step)(O, W, c, input + offset[k + step], 0, weights, 0, step * O);                        \
                }                                                                                                      \
                if (steps > 1)                                                                                         \
                    for (; k < end; k++, weights += O) NAME(step)(O, W, c, input + offset[k], 0, weights, 0, 0);       \
                if (kept) {                                                                                            \
                    EACH_SUM(O, W) TOTAL += SUM;                                                                       \
                    if (k < depth) continue;                                                                           \
                    EACH_SUM(O, W) SUM = TOTAL;                                                                        \
                } else if (add)                                                                                        \
                    EACH_SUM(O, W) SUM = load(sums + o * pitch + v * LANES) + SUM;                                     \
                if (to && k == depth) {                                                                                \
                    EACH_SUM(O, W) SUM += to->bias ? splat(to->bias[o]) : (V){0};                                      \
                    if (to->partial < 0 && !to->gaps.at)                                                               \
                        NAME(end_whole)(O, W, c, tile * W, to);                                                        \
                    else                                                                                               \
                        NAME(end_parts)(O, W, c, tile * W, to);                                                        \
                } else                                                                                                 \
                    EACH_SUM(O, W) store(sums + o * pitch + v * LANES, SUM);                                           \
            }                                                                                                          \
        }                                                                                                              \
    }
#define PIXELS_1(O) PIXELS(O, 1)
#define PIXELS_2(O) PIXELS_1(O) PIXELS(O, 2)
#define PIXELS_3(O) PIXELS_2(O) PIXELS(O, 3)
#define PIXELS_4(O) PIXELS_3(O) PIXELS(O, 4)
#define PIXELS_5(O) PIXELS_4(O) PIXELS(O, 5)
#define PIXELS_6(O) PIXELS_5(O) PIXELS(O, 6)
#define PIXELS_8(O) PIXELS_6(O) PIXELS(O, 7) PIXELS(O, 8)
#define PIXELS_UP_TO(O, W) PIXELS_##W(O)
EACH_PIXELS(PIXELS_UP_TO)

typedef void (*NAME(pixels_kernel))(long, long, long, const int32_t *, const T *, const T *, T *, long, int,
                                    const NAME(maps) *);
#define ENTRY(O, W) NAME(pixels_##O##x##W)
#define ENTRIES_1(O) ENTRY(O, 1)
#define ENTRIES_2(O) ENTRIES_1(O), ENTRY(O, 2)
#define ENTRIES_3(O) ENTRIES_2(O), ENTRY(O, 3)
#define ENTRIES_4(O) ENTRIES_3(O), ENTRY(O, 4)
#define ENTRIES_5(O) ENTRIES_4(O), ENTRY(O, 5)
#define ENTRIES_6(O) ENTRIES_5(O), ENTRY(O, 6)
#define ENTRIES_8(O) ENTRIES_6(O), ENTRY(O, 7), ENTRY(O, 8)
#define ENTRIES_UP_TO(O, W) {ENTRIES_##W(O)},
static const NAME(pixels_kernel) NAME(pixels_table)[][8] = {EACH_PIXELS(ENTRIES_UP_TO)};
#define WIDEST(O, W) W,
static const unsigned char NAME(widest)[] = {EACH_PIXELS(WIDEST) 0};

/* Any number of vectors of pixels side by side: as many tiles as they need, as equal as can be. */
static void NAME(multiply_pixels)(int outputs, int vectors, long depth, long chain, const int32_t *offset,
                                  const void *input, const void *panel, void *sums, long pitch, int add) {
    const NAME(pixels_kernel) *tile = NAME(pixels_table)[outputs - 1];
    const int widest = chain < depth && KEPT(outputs, 1) ? 1 : NAME(widest)[outputs - 1];
    const int cuts = (vectors + widest - 1) / widest, n = vectors / cuts;
    const int wider = vectors % cuts, at = (cuts - wider) * n * LANES;
    tile[n - 1](cuts - wider, depth, chain, offset, input, panel, sums, pitch, add, NULL);
    if (wider)
        tile[n](wider, depth, chain, offset, (const T *)input + at, panel, (T *)sums + at, pitch, add, NULL);
}

/* How many products of a row the register tiles do before they go back to its beginning: all of them, so that sums stay
 * in the first level; where a vector is less than a line, a chain, so that the rest of the lines does. */
#define AT_ONCE(depth, chain) (LANES * sizeof(T) < 64 ? (chain) : (depth))

/* The pixels of an output row, to the maps themselves; with `gaps`, those of many rows that are one run. `narrow`: by
 * register tiles of one vector.
 * Of pixels that are not whole vectors the last tile overlaps the one before or, if there is none, stores a part. A
 * residual may lie where the output does: where tiles overlap, it is added once. A run's vectors all store a part. */
static void NAME(multiply_row)(int outputs, int narrow, int pixels, const cconv_gaps *gaps, long depth, long chain,
                               const int32_t *offset, const void *input, const void *panel, void *sums,
                               const void *bias, const cconv_finish *finish, const void *residual, void *target,
                               long map) {
    const NAME(pixels_kernel) *tile = NAME(pixels_table)[outputs - 1];
    const int run = gaps ? gaps->at[pixels - 1] + 1 : pixels, widest = narrow ? 1 : NAME(widest)[outputs - 1];
    const int all = (run + LANES - 1) / LANES, over = gaps ? 0 : all * LANES - pixels;
    const int lines = finish->past && !gaps && LINE(map * sizeof(T));
    NAME(maps) maps = {bias, residual, target, map, finish->activation, 0, -1, between(0, LANES), {NULL, NULL}, pixels};
    if (gaps) maps.gaps = *gaps;
    for (long k = 0, some; k < depth; k += some) {
        some = AT_ONCE(depth, chain) < depth - k ? AT_ONCE(depth, chain) : depth - k;
        const NAME(maps) *to = k + some == depth ? &maps : NULL;
        const T *a = input, *weights = (const T *)panel + k * outputs;
        T *s = sums;
        int vectors = all, cuts = (vectors + widest - 1) / widest;
        for (int n, tiles; cuts > 0;
             cuts -= tiles, vectors -= n * tiles, a += n * tiles * LANES, s += n * tiles * LANES) {
            n = vectors / cuts;
            tiles = cuts - vectors % cuts;
            maps.partial = -1;
            if (over && cuts == 1 && a == (const T *)input) {
                maps.partial = n - 1;
                maps.lanes = between(0, LANES - over);
            } else if (over && cuts == 1) {
                a -= over;
                if (residual) {
                    maps.partial = 0;
                    maps.lanes = between(over, LANES);
                }
            } else if (over && tiles == cuts)
                tiles--;
            if (gaps)
                maps.gaps.before = gaps->before + (a - (const T *)input) / LANES;
            else {
                maps.target = (T *)target + (a - (const T *)input);
                if (residual) maps.residual = (const T *)residual + (a - (const T *)input);
            }
            maps.past = lines && maps.partial < 0 && LINE(maps.target);
            tile[n - 1](tiles, some, chain, offset + k, a, weights, s, all * LANES, k > 0, to);
        }
    }
}
