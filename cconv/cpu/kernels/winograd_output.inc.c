/* Winograd's output: products to tiles of the maps, y = A' M A, with the epilogue.
 *
 * In: what winograd.inc.c has defined; activate() of depthwise.inc.c.  Out: winograd_output_pixels,
 * winograd_output_channels.
 *
 * Where vectors of products hold tiles, the horizontal half goes to a strip, the vertical one from there to the map.
 * Where they hold output channels, both halves of a tile stay in such vectors, and its outputs are transposed:
 *
 *     rows            pixel 0: [c0 c1 c2 c3]  pixel 1: [c0 c1 c2 c3]  ...      of all tiles side by side
 *     maps            c0: [pixels 0 1 2 3]    c1: [pixels 0 1 2 3]    ...      by flip()
 */
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

/* Lanes "pixels": the outputs of a run, of which the map has `high` rows and `width` columns: the vertical half of its
 * transform, rows of the strip to rows of the map, and the epilogue. */
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

/* Lanes "channels": the outputs of `count` tiles side by side, with their bias: row i begins at rows[i * row_pitch],
 * its pixels are vectors of output channels. */
static inline __attribute__((always_inline)) void NAME(output_tiles)(const int m_down, const int m, const int r,
                                                                     const int s, const cconv_winograd *how, V bias,
                                                                     long count, const T *points, long pitch,
                                                                     long tile_pitch, T *rows, long row_pitch) {
    const int alpha_down = POINTS(m_down, r, s), alpha = POINTS(m, r, s);
    for (long t = 0; t < count; t++, points += tile_pitch, rows += m * LANES) {
        const T *point = points;
        V half[MOST_OUTPUTS][MOST_POINTS];
        for (int i = 0; i < alpha_down; i++) {
            V v[MOST_POINTS], y[MOST_OUTPUTS];
            _Pragma("GCC unroll 16") for (int j = 0; j < alpha; j++, point += pitch) v[j] = load(point);
            NAME(to_outputs)(m, r, s, how->across.powers, v, y);
            _Pragma("GCC unroll 8") for (int j = 0; j < m; j++) half[j][i] = y[j];
        }
        for (int j = 0; j < m; j++) {
            V y[MOST_OUTPUTS];
            NAME(to_outputs)(m_down, r, s, how->down.powers, half[j], y);
            _Pragma("GCC unroll 8") for (int i = 0; i < m_down; i++)
                store(rows + i * row_pitch + j * LANES, y[i] + bias);
        }
    }
}

/* Such rows, of which the maps have `high` rows and `width` columns, to the maps of LANES channels or less. */
static void NAME(output_maps)(const cconv_winograd *how, const cconv_finish *finish, long maps, long high, long width,
                              const T *rows, long row_pitch, const T *residual, T *target) {
    enum { some = LANES < 8 ? LANES : 8 };
    const long map = how->P * how->Q, row = how->dilation_h * how->Q, wide = how->dilation_w;
    const long span = (width - 1) * wide + 1;
    for (long i = 0; i < high; i++, rows += row_pitch, target += row, residual += residual ? row : 0)
        for (long j = 0; j < width; j += LANES) {
            if (j + LANES > width && j && !residual) j = width - LANES; /* the last vector overlaps the one before */
            V v[LANES];
            _Pragma("GCC unroll 16") for (int l = 0; l < LANES; l++) v[l] = load(rows + (j + l) * LANES);
            flip(v);
            if (residual)
                _Pragma("GCC unroll 16") for (int k = 0; k < LANES; k++) {
                    if (k == maps) break;
                    v[k] += NAME(load_phase)(residual + k * map, j * wide, wide, span);
                }
            _Pragma("GCC unroll 2") for (int k = 0; k < LANES; k += some) NAME(activate)(finish, some, v + k);
            T *to = target + j * wide;
            _Pragma("GCC unroll 16") for (int k = 0; k < LANES; k++, to += map) {
                if (k == maps) break;
                NAME(store_phase)(to, v[k], wide, width - j);
            }
        }
}

#define OUTPUT(MD, MA, R, S)                                                                                           \
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
    }                                                                                                                  \
    static __attribute__((noinline)) void NAME(output_tiles_##MD##_##MA##_##R##_##S)(                                  \
        const cconv_winograd *how, const T *bias, long outputs, long count, const T *points, long pitch,               \
        long tile_pitch, T *rows, long row_pitch) {                                                                    \
        const V b = bias ? load_lanes(bias, between(0, outputs)) : (V){0};                                             \
        NAME(output_tiles)(MD, MA, R, S, how, b, count, points, pitch, tile_pitch, rows, row_pitch);                   \
    }
EACH_WINOGRAD(OUTPUT)

/* Both halves of a tile's transform, that of columns also where they are dilated; and both at once. */
typedef struct {
    void (*rows)(const cconv_winograd *, long, const T *, long, T *);
    void (*columns)(const cconv_winograd *, const cconv_finish *, const T *, long, long, const T *, const T *, T *);
    void (*tiles)(const cconv_winograd *, const T *, long, long, const T *, long, long, T *, long);
} NAME(output_halves);

static NAME(output_halves) NAME(output_halves_of)(const cconv_winograd *how) {
    NAME(output_halves) halves = {0};
    const int dilated = how->dilation_w > 1;
#define CASE(MD, MA, R, S)                                                                                             \
    if (IS(MD, MA, R, S))                                                                                              \
        halves = (NAME(output_halves)){NAME(output_rows_##MD##_##MA##_##R##_##S),                                      \
                                       dilated ? NAME(output_dilated_##MD##_##MA##_##R##_##S)                          \
                                               : NAME(output_columns_##MD##_##MA##_##R##_##S),                         \
                                       NAME(output_tiles_##MD##_##MA##_##R##_##S)};
    EACH_WINOGRAD(CASE)
#undef CASE
    return halves;
}

/* Of a part of the map that begins with a tile: its rows, and its columns of those of `tiles` tiles. */
static inline long NAME(high_of)(const cconv_winograd *how, long top) {
    const long inside = (how->P - top + how->dilation_h - 1) / how->dilation_h;
    return inside < how->down.m ? inside : how->down.m;
}
static inline long NAME(width_of)(const cconv_winograd *how, long left, long tiles) {
    const long inside = (how->Q - left + how->dilation_w - 1) / how->dilation_w;
    return inside < tiles * how->across.m ? inside : tiles * how->across.m;
}

/* Tiles first .. first+count-1 of some output maps from their products points[(i * alpha' + j) * pitch + output *
 * channel_pitch + t], with the epilogue; scratch holds a strip. */
static void NAME(winograd_output_pixels)(const cconv_winograd *how, const cconv_finish *finish, const void *bias,
                                         long first, long count, long outputs, const void *points, long pitch,
                                         long channel_pitch, void *scratch, const void *residual, void *target) {
    const NAME(output_halves) halves = NAME(output_halves_of)(how);
    const long map = how->P * how->Q, m = how->across.m;
    const T *from = points, *biases = bias, *second = residual;
    T *strip = scratch, *y = target;
    NAME(run) runs[STRIP_TILES];
    const long found = NAME(runs_of)(how, first, count, how->down.m, m, how->map_stride, runs);
    for (long output = 0; output < outputs; output++, from += channel_pitch) {
        long place = 0;
        halves.rows(how, count, from, pitch, strip);
        for (const NAME(run) *run = runs; run < runs + found; place += run++->tiles * m) {
            const long at = output * map + run->image + run->top * how->Q + run->left;
            halves.columns(how, finish, biases ? biases + output : NULL, NAME(high_of)(how, run->top),
                           NAME(width_of)(how, run->left, run->tiles), strip + place, second ? second + at : NULL,
                           y + at);
        }
    }
}

/* The same from points[(i * alpha' + j) * pitch + t * tile_pitch + output]; scratch holds rows of CCONV_RUN tiles.
 * Lines of so many maps at once are seldom whole: what is too large for the caches does not go past them, but is asked
 * for. */
static void NAME(winograd_output_channels)(const cconv_winograd *how, const cconv_finish *finish, const void *bias,
                                           long first, long count, long outputs, const void *points, long pitch,
                                           long tile_pitch, void *scratch, const void *residual, void *target) {
    const NAME(output_halves) halves = NAME(output_halves_of)(how);
    const long map = how->P * how->Q, row = how->dilation_h * how->Q, m = how->across.m;
    const long row_pitch = (CCONV_RUN * m + LANES) * LANES;
    const T *biases = bias, *second = residual;
    T *rows = scratch, *y = target;
    NAME(run) runs[STRIP_TILES];
    const long found = NAME(runs_of)(how, first, count, how->down.m, m, how->map_stride, runs);
    for (long output = 0; output < outputs; output += LANES) {
        const long maps = outputs - output < LANES ? outputs - output : LANES;
        const T *from = (const T *)points + output;
        for (const NAME(run) *run = runs; run < runs + found; run++) {
            const long high = NAME(high_of)(how, run->top);
            for (long t = 0, some; t < run->tiles; t += some, from += some * tile_pitch) {
                some = run->tiles - t < CCONV_RUN ? run->tiles - t : CCONV_RUN;
                const long left = run->left + t * m * how->dilation_w;
                const long at = output * map + run->image + run->top * how->Q + left;
                const long width = NAME(width_of)(how, left, some);
                if (finish->past)
                    for (long k = 0; k < maps; k++) NAME(expect)(high, width * how->dilation_w, y + at + k * map, row);
                halves.tiles(how, biases ? biases + output : NULL, maps, some, from, pitch, tile_pitch, rows,
                             row_pitch);
                NAME(output_maps)(how, finish, maps, high, width, rows, row_pitch, second ? second + at : NULL, y + at);
            }
        }
    }
}
