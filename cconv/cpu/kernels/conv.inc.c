/* Convolution: packing a tile of input, and the two register-tiled multiplications over it.
 *
 * In: T, NAME, simd.h, EACH_ROWS(X) = X(1) ... X(pixels of the register tile).
 * Out: pack_rows, pack_panel, multiply_channels, multiply_pixels.
 *
 * Both compute   sums[pixel][output] (+)= sum over k < depth of  input[offset[k] + pixel] * panel[k][output]
 * and differ in what a vector holds:
 *
 *   multiply_channels    sums[pixel]  [o o o o|o o o o]      panel[k] is a row of vectors, input[...] is broadcast
 *   multiply_pixels      sums[output] [p p p p|p p p p]      input[...] is a row of vectors, panel[k][output] is broadcast
 *
 * Assumptions: multiply_pixels may read a tile, and write its sums, up to a vector past the last pixel (garbage lanes are
 * computed and dropped). Every sum is one chain of fused multiply-adds in the order of k, so that no tile shape changes a bit of the result.
 */

static void NAME(pack_rows)(const cconv_rows *rows, const void *source, void *target) {
    T *out = target;
    /* Columns first .. last-1 lie inside the image. */
    long step = rows->column_step, first = 0, last = rows->width;
    if (rows->left < 0) first = (-rows->left + step - 1) / step;
    if (first > last) first = last;
    long inside = rows->source_width - rows->left;
    long fit = inside > 0 ? (inside + step - 1) / step : 0;
    if (fit < last) last = fit > first ? fit : first;
    for (long i = 0; i < rows->height; i++, out += rows->pitch) {
        long row = rows->top + i * rows->row_step;
        if (row < 0 || row >= rows->source_height || first >= last) {
            memset(out, 0, rows->pitch * sizeof(T));
            continue;
        }
        const char *in = (const char *)source + row * rows->row_stride + (rows->left + first * step) * rows->column_stride;
        ptrdiff_t stride = step * rows->column_stride;
        for (long j = 0; j < first; j++) out[j] = 0;
        if (stride == (ptrdiff_t)sizeof(T))
            memcpy(out + first, in, (last - first) * sizeof(T));
        else if (stride == 2 * (ptrdiff_t)sizeof(T)) /* a constant, so that it vectorises */
            for (long j = first; j < last; j++) out[j] = ((const T *)in)[2 * (j - first)];
        else
            for (long j = first; j < last; j++, in += stride) out[j] = *(const T *)in;
        for (long j = last; j < rows->pitch; j++) out[j] = 0;
    }
}

/* panel[k][o] = weight[o][k] for o < outputs, 0 for the rest of the width. */
static void NAME(pack_panel)(long outputs, long width, long depth, const void *weight, void *panel) {
    const T *in = weight;
    T *out = panel;
    for (long k = 0; k < depth; k += LANES) { /* a cache line of every row at a time */
        long end = k + LANES < depth ? k + LANES : depth;
        for (long o = 0; o < outputs; o++)
            for (long i = k; i < end; i++) out[i * width + o] = in[o * depth + i];
        for (long o = outputs; o < width; o++)
            for (long i = k; i < end; i++) out[i * width + o] = 0;
    }
}

/* R pixels by W vectors of output channels in registers. Per k: R broadcasts, W loads, R*W fused multiply-adds. */
#define CHANNELS(R, W)                                                                                                 \
    static __attribute__((noinline)) void NAME(channels_##R##x##W)(                                                    \
        long depth, const int32_t *restrict offset, const T *restrict input, const T *restrict panel,                  \
        T *restrict sums, long pitch, int add) {                                                                       \
        V c[R][W];                                                                                                     \
        _Pragma("GCC unroll 16") for (int i = 0; i < R; i++)                                                           \
            _Pragma("GCC unroll 2") for (int v = 0; v < W; v++) c[i][v] = (V){0};                                      \
        for (long k = 0; k < depth; k++, panel += W * LANES) {                                                         \
            const T *a = input + offset[k];                                                                            \
            V b[W];                                                                                                    \
            _Pragma("GCC unroll 2") for (int v = 0; v < W; v++) b[v] = load(panel + v * LANES);                        \
            _Pragma("GCC unroll 16") for (int i = 0; i < R; i++) {                                                     \
                V x = splat(a[i]);                                                                                     \
                _Pragma("GCC unroll 2") for (int v = 0; v < W; v++) c[i][v] += x * b[v];                               \
            }                                                                                                          \
        }                                                                                                              \
        _Pragma("GCC unroll 16") for (int i = 0; i < R; i++)                                                           \
            _Pragma("GCC unroll 2") for (int v = 0; v < W; v++) {                                                      \
            T *to = sums + i * pitch + v * LANES;                                                                      \
            store(to, add ? load(to) + c[i][v] : c[i][v]);                                                             \
        }                                                                                                              \
    }
#define CHANNELS_BOTH(R) CHANNELS(R, 1) CHANNELS(R, 2)
EACH_ROWS(CHANNELS_BOTH)

typedef void (*NAME(channels_kernel))(long, const int32_t *, const T *, const T *, T *, long, int);
#define CHANNELS_ENTRY(R) {NAME(channels_##R##x1), NAME(channels_##R##x2)},
static const NAME(channels_kernel) NAME(channels_table)[][2] = {EACH_ROWS(CHANNELS_ENTRY)};

static void NAME(multiply_channels)(int pixels, int vectors, long depth, const int32_t *offset, const void *input,
                                    const void *panel, void *sums, long pitch, int add) {
    NAME(channels_table)[pixels - 1][vectors - 1](depth, offset, input, panel, sums, pitch, add);
}

/* O output channels by W vectors of pixels in registers. Per k: W loads, O broadcasts, O*W fused multiply-adds. */
#define PIXELS(O, W)                                                                                                   \
    static inline __attribute__((always_inline)) void NAME(pixels_##O##x##W)(                                          \
        long depth, const int32_t *restrict offset, const T *restrict input, const T *restrict panel,                  \
        T *restrict sums, long pitch, int add) {                                                                       \
        V c[O][W];                                                                                                     \
        _Pragma("GCC unroll 4") for (int o = 0; o < O; o++)                                                            \
            _Pragma("GCC unroll 4") for (int v = 0; v < W; v++) c[o][v] = (V){0};                                      \
        for (long k = 0; k < depth; k++, panel += O) {                                                                 \
            const T *a = input + offset[k];                                                                            \
            V b[W];                                                                                                    \
            _Pragma("GCC unroll 4") for (int v = 0; v < W; v++) b[v] = load(a + v * LANES);                            \
            _Pragma("GCC unroll 4") for (int o = 0; o < O; o++) {                                                      \
                V w = splat(panel[o]);                                                                                 \
                _Pragma("GCC unroll 4") for (int v = 0; v < W; v++) c[o][v] += w * b[v];                               \
            }                                                                                                          \
        }                                                                                                              \
        _Pragma("GCC unroll 4") for (int o = 0; o < O; o++)                                                            \
            _Pragma("GCC unroll 4") for (int v = 0; v < W; v++) {                                                      \
            T *to = sums + o * pitch + v * LANES;                                                                      \
            store(to, add ? load(to) + c[o][v] : c[o][v]);                                                             \
        }                                                                                                              \
    }
PIXELS(1, 1)
PIXELS(1, 4)
PIXELS(2, 1)
PIXELS(2, 4)
PIXELS(4, 1)
PIXELS(4, 2)

#define PIXELS_LOOP(O, W)                                                                                              \
    static __attribute__((noinline)) void NAME(pixels_##O)(long pixels, long depth, const int32_t *offset,             \
                                                           const T *input, const T *panel, T *sums, long pitch,        \
                                                           int add) {                                                  \
        long p = 0;                                                                                                    \
        for (; p + (W - 1) * LANES < pixels; p += W * LANES)                                                           \
            NAME(pixels_##O##x##W)(depth, offset, input + p, panel, sums + p, pitch, add);                             \
        for (; p < pixels; p += LANES)                                                                                 \
            NAME(pixels_##O##x1)(depth, offset, input + p, panel, sums + p, pitch, add);                               \
    }
PIXELS_LOOP(1, 4)
PIXELS_LOOP(2, 4)
PIXELS_LOOP(4, 2)

/* `outputs` is 1, 2 or 4: PIXEL_OUTPUTS is the largest. */
static void NAME(multiply_pixels)(int outputs, long pixels, long depth, const int32_t *offset, const void *input,
                                  const void *panel, void *sums, long pitch, int add) {
    if (outputs == 1)
        NAME(pixels_1)(pixels, depth, offset, input, panel, sums, pitch, add);
    else if (outputs == 2)
        NAME(pixels_2)(pixels, depth, offset, input, panel, sums, pitch, add);
    else
        NAME(pixels_4)(pixels, depth, offset, input, panel, sums, pitch, add);
}
