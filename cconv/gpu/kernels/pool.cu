/* Pool: the maximum or average of the windows of maps. NaN wins a maximum; averages are summed in double.
 *
 * In: T; AVERAGE, 0 or 1; tables of the windows' rows and columns.  Out: maps (N, C, P, Q).
 * `pool`: a thread per output. `pool_wide`: a block per output, for large windows; its threads' parts are joined as a
 * tree, always in the same order.
 */
#include "cc.cuh"

#define THREADS 256
#define WIDE_THREADS 128

struct Pool {
    const T *x;
    T *y;
    const int *row_start;
    const int *row_stop;
    const int *row_extent;
    const int *column_start;
    const int *column_stop;
    const int *column_extent;
    long long maps;
    int H, W, P, Q, row_step, column_step, span, blocks_per_map, maps_per_block;
};

#if AVERAGE
typedef double Sum;
CC_DEVICE Sum joined(Sum a, Sum b) { return a + b; }
#else
typedef A Sum;
CC_DEVICE Sum joined(Sum a, Sum b) { return b > a || b != b ? b : a; }
#endif

CC_DEVICE A finished(const Pool &p, Sum sum, int row, int column) {
#if AVERAGE
    return (A)(sum / ((double)p.row_extent[row] * p.column_extent[column]));
#else
    return sum;
#endif
}

CC_KERNEL(THREADS) pool(const Pool p) {
    long long map;
    int place;
    if (!cc_place(THREADS, p.span, p.blocks_per_map, p.maps_per_block, p.maps, &map, &place)) return;
    const int row = place / p.Q, column = place % p.Q;
    const int top = p.row_start[row], bottom = p.row_stop[row], left = p.column_start[column];
    const int right = p.column_stop[column];
    const T *x = p.x + map * p.H * p.W;
    Sum sum = x[(long long)top * p.W + left];
    /* Unsigned: a position and a step are less than 2^31 each, and their sum may be more. */
    for (unsigned h = top; h < (unsigned)bottom; h += p.row_step)
        for (unsigned w = h == (unsigned)top ? (unsigned)left + p.column_step : left; w < (unsigned)right;
             w += p.column_step)
            sum = joined(sum, x[(long long)h * p.W + w]);
    p.y[(map * p.P + row) * p.Q + column] = finished(p, sum, row, column);
}

CC_KERNEL(WIDE_THREADS) pool_wide(const Pool p) {
    CC_SHARED(Sum, parts, [WIDE_THREADS]);
    const int t = cc_thread(), place = (int)(cc_block() % p.span), row = place / p.Q, column = place % p.Q;
    const long long map = cc_block() / p.span;
    const int top = p.row_start[row], left = p.column_start[column];
    const int across = ((unsigned)p.column_stop[column] - left - 1) / p.column_step + 1;
    const int down = ((unsigned)p.row_stop[row] - top - 1) / p.row_step + 1;
    const T *x = p.x + (map * p.H + top) * p.W + left;
    Sum sum = AVERAGE ? Sum(0) : Sum(x[0]);
    /* Every WIDE_THREADS-th position, row after row, without a division for each. */
    const int rows_on = WIDE_THREADS / across, columns_on = WIDE_THREADS % across;
    int h = t / across, w = t % across;
    while (h < down) {
        sum = joined(sum, x[(long long)h * p.row_step * p.W + (long long)w * p.column_step]);
        h += rows_on;
        w += columns_on;
        if (w >= across) {
            w -= across;
            h++;
        }
    }
    parts[t] = sum;
    for (int half = WIDE_THREADS / 2; half; half /= 2) {
        cc_barrier();
        if (t < half) parts[t] = joined(parts[t], parts[t + half]);
    }
    if (t == 0) p.y[map * p.span + place] = finished(p, parts[0], row, column);
}
