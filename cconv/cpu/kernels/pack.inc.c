/* Pack: a tile of input without its image's strides and edges, and weights in the order in which they are read.
 *
 * In: T, NAME, LANES.  Out: pack_rows, preactivate, pack_panel.
 */
/* Rows of so many channels further on are asked for: a processor expects the next lines, not those of another map. */
#define CHANNELS_AHEAD 2

/* Elements first .. last-1 of a packed row, from every stride-th element (in bytes) from `in` on. Nothing beyond the
 * last element is read: a vector that would reach further begins earlier instead. What lies `ahead` bytes further is
 * asked for. */
static inline __attribute__((always_inline)) void NAME(pack_row)(const char *in, ptrdiff_t stride, T *out, long first,
                                                                 long last, ptrdiff_t ahead) {
    const T *from = (const T *)in;
    long j = 0, length = last - first;
    out += first;
    if (stride == (ptrdiff_t)sizeof(T)) {
        for (; j + LANES <= length; j += LANES) {
            __builtin_prefetch((const char *)(from + j) + ahead);
            store(out + j, load(from + j));
        }
        if (j < length && length >= LANES) {
            store(out + length - LANES, load(from + length - LANES));
            return;
        }
    }
    for (; j < length; j++) out[j] = *(const T *)(in + j * stride);
}

/* Vectors of packed rows whose elements lie side by side: of every element, or of every other one and, with two phases,
 * of those between, `pair` elements further on. */
static inline __attribute__((always_inline)) void NAME(pack_vector)(const int phases, const int step, V a, V b, T *out,
                                                                    long pair) {
    store(out, step == 2 ? EVEN(a, b) : a);
    if (phases == 2) store(out + pair, ODD(a, b));
}

/* Whole such rows from `from` on. Their first vector and the last one, which overlaps the one before, have no other
 * lanes of the source than `head` and `tail`; a row of less than a vector is its head, and stores the lanes `part`. */
static inline __attribute__((always_inline)) void NAME(pack_whole)(const int phases, const int step, const T *from,
                                                                   T *out, long pitch, long pair,
                                                                   const NAME(lanes) *head, const NAME(lanes) *tail,
                                                                   NAME(lanes) part, ptrdiff_t ahead) {
    const long end = pitch - LANES;
    V a = load_lanes(from, head[0]), b = step == 2 ? load_lanes(from + LANES, head[1]) : a;
    __builtin_prefetch((const char *)from + ahead);
    if (step == 2) __builtin_prefetch((const char *)(from + LANES) + ahead);
    if (end < 0) {
        store_lanes(out, step == 2 ? EVEN(a, b) : a, part);
        if (phases == 2) store_lanes(out + pair, ODD(a, b), part);
        return;
    }
    NAME(pack_vector)(phases, step, a, b, out, pair);
    for (long j = LANES; j < end; j += LANES) {
        const T *in = from + step * j;
        __builtin_prefetch((const char *)in + ahead);
        if (step == 2) __builtin_prefetch((const char *)(in + LANES) + ahead);
        NAME(pack_vector)(phases, step, load(in), step == 2 ? load(in + LANES) : a, out + j, pair);
    }
    from += step * end;
    a = load_lanes(from, tail[0]);
    if (step == 2) b = load_lanes(from + LANES, tail[1]);
    NAME(pack_vector)(phases, step, a, b, out + end, pair);
}

static inline __attribute__((always_inline)) void NAME(pack_phases)(const long phases, const long step,
                                                                    const cconv_rows *rows, const void *source,
                                                                    void *target) {
    const ptrdiff_t stride = step * rows->column_stride;
    /* Columns first .. last-1 of a phase lie inside the image, from source column `from` on. */
    long first[2], last[2], from[2];
    for (long f = 0; f < phases; f++) {
        const long left = rows->left + f, inside = rows->source_width - left;
        first[f] = left < 0 ? (-left + step - 1) / step : 0;
        last[f] = inside > 0 ? (inside + step - 1) / step : 0;
        if (first[f] > rows->width) first[f] = rows->width;
        if (last[f] > rows->width) last[f] = rows->width;
        if (last[f] < first[f]) last[f] = first[f];
        from[f] = left + first[f] * step;
    }
    const ptrdiff_t ahead = CHANNELS_AHEAD * rows->channel_stride;
    /* The same of both phases, in elements of the source from the first one's first on, and of the rows' last vectors:
     * rows are packed by whole vectors if those between their first and their last lie inside the image. */
    const long pitch = rows->pitch, end = pitch - LANES, inside = rows->source_width - rows->left;
    const long begin = -rows->left, stop = inside < step * rows->width ? inside : step * rows->width;
    const int inner = begin <= step * LANES && stop >= step * ((end + LANES - 1) / LANES * LANES);
    const int whole = step <= 2 && rows->column_stride == sizeof(T) && (end <= LANES || inner);
    NAME(lanes) head[2], tail[2];
    for (long i = 0; i < 2; i++) {
        head[i] = between(begin - i * LANES, stop - i * LANES);
        tail[i] = between(begin - step * end - i * LANES, stop - step * end - i * LANES);
    }
    const NAME(lanes) part = between(0, pitch);
    for (long c = 0; c < rows->channels; c++) {
        const char *channel = (const char *)source + c * rows->channel_stride;
        T *out = (T *)target + c * rows->plane;
        for (long i = 0; i < rows->height; i++, out += pitch) {
            const long row = rows->top + i * rows->row_step;
            const int outside = row < 0 || row >= rows->source_height;
            const char *in = channel + row * rows->row_stride;
            if (whole && !outside) {
                NAME(pack_whole)(phases, step == 2 ? 2 : 1, (const T *)in + rows->left, out, pitch, rows->pair, head,
                                 tail, part, ahead);
                continue;
            }
            for (long f = 0; f < phases; f++) {
                T *to = out + f * rows->pair;
                if (outside || first[f] == last[f]) {
                    memset(to, 0, pitch * sizeof(T));
                    continue;
                }
                for (long j = 0; j < first[f]; j++) to[j] = 0;
                NAME(pack_row)(in + from[f] * rows->column_stride, stride, to, first[f], last[f], ahead);
                for (long j = last[f]; j < pitch; j++) to[j] = 0;
            }
        }
        for (long j = 0; j < rows->after; j++) out[j] = 0;
    }
}

static void NAME(pack_rows)(const cconv_rows *rows, const void *source, void *target) {
    if (rows->pair)
        NAME(pack_phases)(2, 2, rows, source, target);
    else if (rows->column_step == 2)
        NAME(pack_phases)(1, 2, rows, source, target);
    else
        NAME(pack_phases)(1, rows->column_step, rows, source, target);
}

/* target[c][j] = max(scale[c] * source[c][j] + shift[c], 0); NaN passes. Channels of the source are `channel_stride`
 * bytes apart, those of the target `plane` elements; the two may be the same. */
static void NAME(preactivate)(long channels, long count, ptrdiff_t channel_stride, const void *scale, const void *shift,
                              const void *source, void *target, long plane) {
    const V zero = {0};
    for (long c = 0; c < channels; c++) {
        const T *x = (const T *)((const char *)source + c * channel_stride);
        const V a = splat(((const T *)scale)[c]), b = splat(((const T *)shift)[c]);
        T *y = (T *)target + c * plane;
        for (long j = 0; j < count; j += LANES) {
            const NAME(lanes) some = between(0, count - j);
            const int whole = j + LANES <= count;
            const V v = (whole ? load(x + j) : load_lanes(x + j, some)) * a + b;
            const V positive = LARGER(zero, v);
            __builtin_prefetch((const char *)(x + j) + CHANNELS_AHEAD * channel_stride);
            if (whole)
                store(y + j, positive);
            else
                store_lanes(y + j, positive, some);
        }
    }
}

/* panel[k][o] = weight[o][k] for k < depth and o < outputs, whose rows are `pitch` elements apart, 0 for the rest of
 * the width: LANES x LANES at a time, and a cache line of every output before the next one, for rows that lie a power
 * of two apart meet in few sets of a cache. Of longer rows, those that follow are asked for: the pieces are too short
 * for the processor to see where they lead. */
static void NAME(pack_panel)(long outputs, long width, long depth, long pitch, const void *weight, void *panel) {
    const T *in = weight;
    T *out = panel;
    const long line = LANES * sizeof(T) < 64 ? 64 / sizeof(T) : LANES;
    for (long begin = 0; begin < depth; begin += line)
        for (long o = 0; o < width; o += LANES) {
            const NAME(lanes) across = between(0, width - o);
            for (long k = begin; k < begin + line && k < depth; k += LANES) {
                const NAME(lanes) down = between(0, depth - k);
                V v[LANES];
                if (pitch > depth)
                    _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++)
                        __builtin_prefetch(in + (o + i) * pitch + k + depth, 0, 2);
                _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++)
                    v[i] = o + i < outputs ? load_anywhere(in + (o + i) * pitch + k, down) : (V){0};
                flip(v);
                _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++)
                    if (k + i < depth) store_lanes(out + (k + i) * width + o, v[i], across);
            }
        }
}
