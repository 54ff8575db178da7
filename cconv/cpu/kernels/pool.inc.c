/* Pool: maximum or average over the windows of one map.
 *
 * In: T, NAME.  Out: pool. `scratch` holds one row of the map, in double for an average.
 * First down the columns of a window (contiguous, so it vectorises), then along the row; the order of a sum depends on
 * the window alone. Averages sum in double: a global one has too many terms for a float.
 */
static void NAME(pool_max)(const cconv_pool *how, const T *source, T *row, T *y) {
    for (long p = 0; p < how->outputs_high; p++) {
        const T *x = source + how->row_start[p] * how->width;
        memcpy(row, x, how->width * sizeof(T));
        for (long h = how->row_start[p] + how->row_step; h < how->row_stop[p]; h += how->row_step) {
            x += how->row_step * how->width;
            for (long w = 0; w < how->width; w++) row[w] = x[w] > row[w] || x[w] != x[w] ? x[w] : row[w]; /* NaN wins */
        }
        for (long q = 0; q < how->outputs_wide; q++) {
            T value = row[how->column_start[q]];
            for (long w = how->column_start[q] + how->column_step; w < how->column_stop[q]; w += how->column_step)
                value = row[w] > value || row[w] != row[w] ? row[w] : value;
            *y++ = value;
        }
    }
}

static void NAME(pool_average)(const cconv_pool *how, const T *source, double *row, T *y) {
    for (long p = 0; p < how->outputs_high; p++) {
        const T *x = source + how->row_start[p] * how->width;
        for (long w = 0; w < how->width; w++) row[w] = x[w];
        for (long h = how->row_start[p] + how->row_step; h < how->row_stop[p]; h += how->row_step) {
            x += how->row_step * how->width;
            for (long w = 0; w < how->width; w++) row[w] += x[w];
        }
        for (long q = 0; q < how->outputs_wide; q++) {
            double sum = 0;
            for (long w = how->column_start[q]; w < how->column_stop[q]; w += how->column_step) sum += row[w];
            *y++ = (T)(sum / ((double)how->row_extent[p] * how->column_extent[q]));
        }
    }
}

static void NAME(pool)(const cconv_pool *how, const void *source, void *scratch, void *target) {
    if (how->average)
        NAME(pool_average)(how, source, scratch, target);
    else
        NAME(pool_max)(how, source, scratch, target);
}
