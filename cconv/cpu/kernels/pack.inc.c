/* Pack: a tile of input without its image's strides and edges, and weights in the order in which they are read.
 *
 * In: T, NAME, LANES.  Out: pack_rows, pack_panel.
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
        long j = first, length = last - first;
        if (stride == (ptrdiff_t)sizeof(T)) {
            const T *from = (const T *)in - first;
            for (; j + LANES <= last; j += LANES) store(out + j, load(from + j));
            if (length >= LANES && j < last) { /* the last vector overlaps the one before */
                store(out + last - LANES, load(from + last - LANES));
                j = last;
            }
            for (; j < last; j++) out[j] = from[j];
        } else if (stride == 2 * (ptrdiff_t)sizeof(T)) {
            const T *from = (const T *)in - 2 * first;
            for (; j + LANES < last; j += LANES) /* not the last one: it would read one element too far */
                store(out + j, EVEN(load(from + 2 * j), load(from + 2 * j + LANES)));
            for (; j < last; j++) out[j] = from[2 * j];
        } else {
            for (; j < last; j++, in += stride) out[j] = *(const T *)in;
        }
        for (long j = last; j < rows->pitch; j++) out[j] = 0;
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
