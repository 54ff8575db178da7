/* Pool: maximum or average over the windows of one map.
 *
 * In: T, NAME, simd.h.  Out: pool; larger (NaN wins). `scratch` holds one row of the map, continued on both sides, and
 * one of outputs, in double for an average, with room for four vectors of T more.
 * First down the columns of the windows, then along the row. The order of a sum depends on the window alone, and
 * averages sum in double: a global one has too many terms for a float.
 */
/* b where one of the two is NaN by the maximum alone, which is one instruction; a set mask, too, is NaN. */
static inline __attribute__((always_inline)) V NAME(larger)(V a, V b) {
    return (V)((NAME(comparison))select(a > b, a, b) | (a != a));
}
static inline __attribute__((always_inline)) T NAME(larger_one)(T a, T b) {
    return a > b || a != a ? a : b; /* NaN wins */
}

/* row[w] = the maximum of `rows` rows, `pitch` apart. */
static inline __attribute__((always_inline)) void NAME(largest_rows)(long rows, long pitch, long width, const T *x,
                                                                     T *row) {
    long w = 0;
    for (; width >= LANES && w < width; w += LANES) {
        if (w > width - LANES) w = width - LANES; /* the last vector begins earlier */
        V most = load(x + w);
        for (long i = 1; i < rows; i++) most = NAME(larger)(load(x + i * pitch + w), most);
        store(row + w, most);
    }
    if (width >= LANES) return;
    const NAME(lanes) some = between(0, width);
    V most = load_lanes(x, some);
    for (long i = 1; i < rows; i++) most = NAME(larger)(load_lanes(x + i * pitch, some), most);
    store_lanes(row, most, some);
}

/* y[q] = the maximum of row[q * stride + tap * step] over the taps. Reads whole vectors of the row. */
static inline __attribute__((always_inline)) void NAME(largest_along)(const int stride, long count, long taps,
                                                                      long step, const T *row, T *y) {
    for (long q = 0; q < count; q += LANES) {
        if (q > count - LANES && count >= LANES) q = count - LANES;
        const T *at = row + q * stride;
        V most = stride == 1 ? load(at) : EVEN(load(at), load(at + LANES));
        for (long tap = 1; tap < taps; tap++) {
            at += step;
            most = NAME(larger)(stride == 1 ? load(at) : EVEN(load(at), load(at + LANES)), most);
        }
        if (count >= LANES)
            store(y + q, most);
        else
            store_lanes(y, most, between(0, count));
    }
}

static void NAME(pool_max)(const cconv_pool *how, const T *source, T *scratch, T *y) {
    const long width = how->width, outputs = how->outputs_wide, step = how->column_step;
    T *row = scratch + how->left;
    for (long i = 0; i < how->left; i++) scratch[i] = -INFINITY;
    for (long i = 0; i < how->right + 2 * LANES; i++) row[width + i] = -INFINITY;
    for (long p = 0; p < how->outputs_high; p++, y += outputs) {
        const long rows = (how->row_stop[p] - how->row_start[p] + how->row_step - 1) / how->row_step;
        const T *first = source + how->row_start[p] * width;
        /* Loops of two or three turns cost as much as what they repeat: these are unrolled. */
        if (rows == 3)
            NAME(largest_rows)(3, how->row_step * width, width, first, row);
        else if (rows == 2)
            NAME(largest_rows)(2, how->row_step * width, width, first, row);
        else
            NAME(largest_rows)(rows, how->row_step * width, width, first, row);
        if (how->stride == 1 && how->taps == 3)
            NAME(largest_along)(1, outputs, 3, step, scratch, y);
        else if (how->stride == 1)
            NAME(largest_along)(1, outputs, how->taps, step, scratch, y);
        else if (how->stride == 2 && how->taps == 3)
            NAME(largest_along)(2, outputs, 3, step, scratch, y);
        else if (how->stride == 2)
            NAME(largest_along)(2, outputs, how->taps, step, scratch, y);
        else
            for (long q = 0; q < outputs; q++) {
                T most = row[how->column_start[q]];
                for (long w = how->column_start[q] + step; w < how->column_stop[q]; w += step)
                    most = NAME(larger_one)(row[w], most);
                y[q] = most;
            }
    }
}

/* A vector of doubles, made of as many T. */
#define WIDE_LANES (VECTOR_BYTES / 8)
typedef double NAME(wide) __attribute__((vector_size(VECTOR_BYTES)));
typedef double NAME(unaligned_wide) __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
typedef T NAME(narrow) __attribute__((vector_size(WIDE_LANES * sizeof(T))));
static inline __attribute__((always_inline)) NAME(wide) NAME(widened)(const T *p) {
    NAME(narrow) v;
    memcpy(&v, p, sizeof v); /* through an unaligned type GCC 12 takes a conversion to the same type for aligned */
    return __builtin_convertvector(v, NAME(wide));
}

/* row[w] = the sum of `rows` rows, `pitch` apart. */
static void NAME(sum_rows)(long rows, long pitch, long width, const T *x, double *row) {
    if (width < WIDE_LANES) {
        for (long w = 0; w < width; w++) {
            double sum = x[w];
            for (long i = 1; i < rows; i++) sum += x[i * pitch + w];
            row[w] = sum;
        }
        return;
    }
    for (long w = 0; w < width; w += WIDE_LANES) {
        if (w > width - WIDE_LANES) w = width - WIDE_LANES;
        NAME(wide) sum = NAME(widened)(x + w);
        for (long i = 1; i < rows; i++) sum += NAME(widened)(x + i * pitch + w);
        *(NAME(unaligned_wide) *)(row + w) = sum;
    }
}

static inline __attribute__((always_inline)) NAME(wide) NAME(apart)(const int stride, const double *p) {
    if (stride == 1) return *(const NAME(unaligned_wide) *)p;
    NAME(wide) entries;
    for (int i = 0; i < WIDE_LANES; i++) entries[i] = p[i * stride];
    return entries;
}

/* sums[q] = the sum of row[q * stride + tap * step] over the taps. Reads and writes whole vectors. */
static inline __attribute__((always_inline)) void NAME(sums_along)(const int stride, long count, long taps, long step,
                                                                   const double *row, double *sums) {
    for (long q = 0; q < count; q += WIDE_LANES) {
        const double *at = row + q * stride;
        NAME(wide) sum = NAME(apart)(stride, at);
        for (long tap = 1; tap < taps; tap++) sum += NAME(apart)(stride, at += step);
        *(NAME(unaligned_wide) *)(sums + q) = sum;
    }
}

static void NAME(pool_average)(const cconv_pool *how, const T *source, double *scratch, T *restrict y) {
    const long width = how->width, outputs = how->outputs_wide, step = how->column_step;
    double *row = scratch + how->left, *sums = row + width + how->right + 2 * WIDE_LANES;
    for (long i = 0; i < how->left; i++) scratch[i] = 0;
    for (long i = 0; i < how->right + 2 * WIDE_LANES; i++) row[width + i] = 0;
    for (long p = 0; p < how->outputs_high; p++, y += outputs) {
        const long rows = (how->row_stop[p] - how->row_start[p] + how->row_step - 1) / how->row_step;
        NAME(sum_rows)(rows, how->row_step * width, width, source + how->row_start[p] * width, row);
        if (how->stride == 1)
            NAME(sums_along)(1, outputs, how->taps, step, scratch, sums);
        else if (how->stride == 2)
            NAME(sums_along)(2, outputs, how->taps, step, scratch, sums);
        else
            for (long q = 0; q < outputs; q++) {
                double sum = row[how->column_start[q]];
                for (long w = how->column_start[q] + step; w < how->column_stop[q]; w += step) sum += row[w];
                sums[q] = sum;
            }
        const double high = how->row_extent[p];
        for (long q = 0; q < outputs; q++) y[q] = (T)(sums[q] / (high * how->column_extent[q]));
    }
}

static void NAME(pool)(const cconv_pool *how, const void *source, void *scratch, void *target) {
    if (how->average)
        NAME(pool_average)(how, source, scratch, target);
    else
        NAME(pool_max)(how, source, scratch, target);
}
#undef WIDE_LANES
