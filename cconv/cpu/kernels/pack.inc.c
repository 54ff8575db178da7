/* Pack: a tile of input without its image's strides and edges, and weights in the order in which they are read.
 *
 * In: T, NAME, LANES.  Out: pack_rows, preactivate, pack_panel.
 */
/* Rows of so many channels further on are asked for: a processor expects the next lines, not those of another map. */
#define CHANNELS_AHEAD 2

/* Elements first .. last-1 of a packed row, from every stride-th element (in bytes) from `in` on. Nothing beyond the last
 * element is read: a vector that would reach further begins earlier instead. What lies `ahead` bytes further is asked
 * for. */
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
    } else if (stride == 2 * (ptrdiff_t)sizeof(T)) {
        for (; j + LANES < length; j += LANES) {
            __builtin_prefetch((const char *)(from + 2 * j) + ahead);
            __builtin_prefetch((const char *)(from + 2 * j + LANES) + ahead);
            store(out + j, EVEN(load(from + 2 * j), load(from + 2 * j + LANES)));
        }
        if (j < length && length > LANES) {
            const T *odd = from + 2 * (length - LANES) - 1;
            __builtin_prefetch((const char *)(odd) + ahead);
            __builtin_prefetch((const char *)(odd + LANES) + ahead);
            store(out + length - LANES, ODD(load(odd), load(odd + LANES)));
            return;
        }
    }
    for (; j < length; j++) out[j] = *(const T *)(in + j * stride);
}

/* A packed row whose elements lie side by side from `from` on: whole vectors, of which the first one and the last one, which
 * overlaps the one before, have no other lanes than `head` and `tail`. */
static inline __attribute__((always_inline)) void NAME(pack_whole)(const T *from, T *out, long pitch, NAME(lanes) head,
                                                                   NAME(lanes) tail, ptrdiff_t ahead) {
    const long end = pitch - LANES;
    __builtin_prefetch((const char *)from + ahead);
    store(out, load_lanes(from, head));
    for (long j = LANES; j < end; j += LANES) {
        __builtin_prefetch((const char *)(from + j) + ahead);
        store(out + j, load(from + j));
    }
    store(out + end, load_lanes(from + end, tail));
}

/* Every other element from `in` on to `even`, those between to `odd`, so many of each: one pass over a row. */
static inline __attribute__((always_inline)) void NAME(pack_pairs)(const T *in, T *even, T *odd, long pairs,
                                                                   ptrdiff_t ahead) {
    long j = 0;
    for (; j + LANES <= pairs; j += LANES) {
        const V a = load(in + 2 * j), b = load(in + 2 * j + LANES);
        __builtin_prefetch((const char *)(in + 2 * j) + ahead);
        store(even + j, EVEN(a, b));
        store(odd + j, ODD(a, b));
    }
    if (j < pairs && pairs >= LANES) {
        j = pairs - LANES;
        const V a = load(in + 2 * j), b = load(in + 2 * j + LANES);
        store(even + j, EVEN(a, b));
        store(odd + j, ODD(a, b));
        return;
    }
    for (; j < pairs; j++) even[j] = in[2 * j], odd[j] = in[2 * j + 1];
}

static inline __attribute__((always_inline)) void NAME(pack_phases)(const long phases, const cconv_rows *rows,
                                                                    const void *source, void *target) {
    const long step = rows->column_step;
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
    /* Both phases of rows that lie in one piece: e begins with the even elements, the other one with the odd ones. */
    const int e = phases == 2 && from[1] < from[0];
    long pairs = 0;
    if (phases == 2 && step == 2 && rows->column_stride == sizeof(T) && from[!e] == from[e] + 1) {
        pairs = last[0] - first[0];
        if (last[1] - first[1] < pairs) pairs = last[1] - first[1];
    }
    const ptrdiff_t ahead = CHANNELS_AHEAD * rows->channel_stride;
    /* Rows of whole vectors, all but the first and the last of which lie inside the image. */
    const long end = rows->pitch - LANES, inner = (end + LANES - 1) / LANES * LANES;
    const int whole = phases == 1 && stride == sizeof(T) && end >= 0 && first[0] <= LANES && last[0] >= inner;
    const NAME(lanes) head = between(first[0], last[0]), tail = between(first[0] - end, last[0] - end);
    const ptrdiff_t begin = from[0] * rows->column_stride - first[0] * (ptrdiff_t)sizeof(T);
    for (long c = 0; c < rows->channels; c++) {
        const char *channel = (const char *)source + c * rows->channel_stride;
        T *out = (T *)target + c * rows->plane;
        for (long i = 0; i < rows->height; i++, out += rows->pitch) {
            const long row = rows->top + i * rows->row_step;
            const int outside = row < 0 || row >= rows->source_height;
            const char *in = channel + row * rows->row_stride;
            if (whole && !outside) {
                NAME(pack_whole)((const T *)(in + begin), out, rows->pitch, head, tail, ahead);
                continue;
            }
            if (pairs && !outside)
                NAME(pack_pairs)((const T *)(in + from[e] * rows->column_stride), out + e * rows->pair + first[e],
                                 out + !e * rows->pair + first[!e], pairs, ahead);
            for (long f = 0; f < phases; f++) {
                T *to = out + f * rows->pair;
                if (outside || first[f] == last[f]) {
                    memset(to, 0, rows->pitch * sizeof(T));
                    continue;
                }
                for (long j = 0; j < first[f]; j++) to[j] = 0;
                NAME(pack_row)(in + (from[f] + pairs * step) * rows->column_stride, stride, to, first[f] + pairs,
                               last[f], ahead);
                for (long j = last[f]; j < rows->pitch; j++) to[j] = 0;
            }
        }
    }
}

static void NAME(pack_rows)(const cconv_rows *rows, const void *source, void *target) {
    if (rows->pair)
        NAME(pack_phases)(2, rows, source, target);
    else
        NAME(pack_phases)(1, rows, source, target);
}

/* target[c][j] = max(scale[c] * source[c][j] + shift[c], 0); NaN passes. Channels of the source are `channel_stride` bytes
 * apart, those of the target `plane` elements; the two may be the same. */
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

/* panel[k][o] = weight[o][k] for k < depth and o < outputs, whose rows are `pitch` elements apart, 0 for the rest of the
 * width: LANES x LANES at a time, and a cache line of every output before the next one, for rows that lie a power of two
 * apart meet in few sets of a cache. Of longer rows, those that follow are asked for: the pieces are too short for the
 * processor to see where they lead. */
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
