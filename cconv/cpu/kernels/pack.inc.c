/* Pack: a tile of input without its image's strides and edges, and weights in the order in which they are read.
 *
 * In: T, NAME, LANES.  Out: pack_rows, pack_panel.
 */
/* Elements first .. last-1 of a packed row, from every stride-th element (in bytes) from `in` on. Nothing beyond the last
 * element is read: a vector that would reach further begins earlier instead. */
static inline __attribute__((always_inline)) void NAME(pack_row)(const char *in, ptrdiff_t stride, T *out, long first,
                                                                 long last) {
    const T *from = (const T *)in;
    long j = 0, length = last - first;
    out += first;
    if (stride == (ptrdiff_t)sizeof(T)) {
        for (; j + LANES <= length; j += LANES) store(out + j, load(from + j));
        if (j < length && length >= LANES) {
            store(out + length - LANES, load(from + length - LANES));
            return;
        }
    } else if (stride == 2 * (ptrdiff_t)sizeof(T)) {
        for (; j + LANES < length; j += LANES) store(out + j, EVEN(load(from + 2 * j), load(from + 2 * j + LANES)));
        if (j < length && length > LANES) {
            const T *odd = from + 2 * (length - LANES) - 1;
            store(out + length - LANES, ODD(load(odd), load(odd + LANES)));
            return;
        }
    }
    for (; j < length; j++) out[j] = *(const T *)(in + j * stride);
}

static void NAME(pack_rows)(const cconv_rows *rows, const void *source, void *target) {
    /* Columns first .. last-1 lie inside the image. */
    const long step = rows->column_step, inside = rows->source_width - rows->left;
    long first = rows->left < 0 ? (-rows->left + step - 1) / step : 0;
    long last = inside > 0 ? (inside + step - 1) / step : 0;
    if (first > rows->width) first = rows->width;
    if (last > rows->width) last = rows->width;
    if (last < first) last = first;
    const ptrdiff_t stride = step * rows->column_stride;
    const char *channel = source;
    channel += rows->top * rows->row_stride + (rows->left + first * step) * rows->column_stride;
    T *plane = target;
    for (long c = 0; c < rows->channels; c++, channel += rows->channel_stride, plane += rows->plane) {
        const char *in = channel;
        T *out = plane;
        for (long i = 0; i < rows->height; i++, out += rows->pitch, in += rows->row_step * rows->row_stride) {
            const long row = rows->top + i * rows->row_step;
            if (row < 0 || row >= rows->source_height || first == last) {
                memset(out, 0, rows->pitch * sizeof(T));
                continue;
            }
            for (long j = 0; j < first; j++) out[j] = 0;
            NAME(pack_row)(in, stride, out, first, last);
            for (long j = last; j < rows->pitch; j++) out[j] = 0;
        }
    }
}

/* panel[k][o] = weight[o][k] for o < outputs, 0 for the rest of the width: LANES x LANES at a time. */
static void NAME(pack_panel)(long outputs, long width, long depth, const void *weight, void *panel) {
    const T *in = weight;
    T *out = panel;
    for (long o = 0; o < width; o += LANES) {
        const NAME(lanes) across = between(0, width - o);
        for (long k = 0; k < depth; k += LANES) {
            const NAME(lanes) down = between(0, depth - k);
            V v[LANES];
            _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++)
                v[i] = o + i < outputs ? load_lanes(in + (o + i) * depth + k, down) : (V){0};
            flip(v);
            _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++)
                if (k + i < depth) store_lanes(out + (k + i) * width + o, v[i], across);
        }
    }
}
