/* Pool: maximum or average over the windows of one map.
 *
 * In: T, NAME.  Out: pool. `scratch` holds one row of the map.
 * First down the columns of a window (contiguous, so it vectorises), then along the row; the order of a sum depends on
 * the window alone.
 */
static void NAME(pool)(const cconv_pool *how, const void *source, void *scratch, void *target) {
    T *row = scratch, *y = target;
    long width = how->width;
    for (long p = 0; p < how->outputs_high; p++) {
        const T *x = (const T *)source + how->row_start[p] * width;
        memcpy(row, x, width * sizeof(T));
        for (long h = how->row_start[p] + how->row_step; h < how->row_stop[p]; h += how->row_step) {
            x += how->row_step * width;
            if (how->average)
                for (long w = 0; w < width; w++) row[w] += x[w];
            else /* NaN wins */
                for (long w = 0; w < width; w++) row[w] = x[w] > row[w] || x[w] != x[w] ? x[w] : row[w];
        }
        for (long q = 0; q < how->outputs_wide; q++) {
            long w = how->column_start[q], stop = how->column_stop[q], step = how->column_step;
            T value = row[w];
            if (how->average) {
                for (w += step; w < stop; w += step) value += row[w];
                value /= (T)how->row_extent[p] * (T)how->column_extent[q];
            } else {
                for (w += step; w < stop; w += step) value = row[w] > value || row[w] != row[w] ? row[w] : value;
            }
            *y++ = value;
        }
    }
}
