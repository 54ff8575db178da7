/* Tensors: what moves and normalises: operators of planning/tensors.py, a thread per element of y.
 *
 * In: T.  Out: y. Comparisons are written so that NaN passes through.
 * Softmax and averages of it are summed in double: a chain may be as long as an axis.
 */
#include "cc.cuh"

#define THREADS 256
#define MOST_LOOPS 8

/* Loops of a nest, outermost first; a table replaces i * source. */
struct Move {
    const T *x;
    T *y;
    long long count, images, source_size, target_size, begin, at;
    int loops;
    long long size[MOST_LOOPS], source[MOST_LOOPS], target[MOST_LOOPS];
    const int *tables;
    long long table[MOST_LOOPS]; /* where a loop's table begins in `tables`; -1: it has none */
};

CC_KERNEL(THREADS) move(const Move p) {
    const long long i = (long long)cc_block() * THREADS + cc_thread();
    if (i >= p.count * p.images) return;
    const long long image = i / p.count;
    long long rest = i - image * p.count, from = image * p.source_size + p.begin, to = image * p.target_size + p.at;
    CC_UNROLL for (int loop = MOST_LOOPS - 1; loop >= 0; loop--) {
        if (loop >= p.loops) continue;
        const long long outer = rest / p.size[loop], at = rest - outer * p.size[loop];
        rest = outer;
        from += p.table[loop] < 0 ? at * p.source[loop] : p.tables[p.table[loop] + at];
        to += at * p.target[loop];
    }
    p.y[to] = p.x[from];
}

struct Piece {
    const T *x;
    T *y;
    long long count, target_size, at; /* of an image */
    int blocks_per_image, vector;
};

/* What a map of neighbours is in a larger one: Concat. */
CC_KERNEL(THREADS) piece(const Piece p) {
    const unsigned image = cc_block() / p.blocks_per_image;
    const long long first = ((long long)(cc_block() % p.blocks_per_image) * THREADS + cc_thread()) * LANES;
    const T *x = p.x + image * p.count + first;
    T *y = p.y + image * p.target_size + p.at + first;
    if (p.vector) {
        if (first < p.count) cc_copy(y, x);
        return;
    }
    CC_UNROLL for (int l = 0; l < LANES; l++)
        if (first + l < p.count) y[l] = x[l];
}

struct Softmax {
    const T *x;
    T *y;
    long long rows, inner; /* rows: images * inner */
    int channels;
};

/* A distribution per thread, neighbours in neighbouring threads. */
CC_KERNEL(THREADS) softmax(const Softmax p) {
    const long long i = (long long)cc_block() * THREADS + cc_thread();
    if (i >= p.rows) return;
    const long long begin = i / p.inner * p.channels * p.inner + i % p.inner;
    const T *x = p.x + begin;
    T *y = p.y + begin;
    A most = x[0];
    for (int c = 1; c < p.channels; c++) most = cc_max(x[c * p.inner], most);
    double sum = 0;
    for (int c = 0; c < p.channels; c++) sum += cc_exp(x[c * p.inner] - most);
    /* Again, and not kept in y, where it would be rounded. */
    for (int c = 0; c < p.channels; c++) y[c * p.inner] = cc_exp(x[c * p.inner] - most) / (A)sum;
}

/* A distribution of neighbouring elements (inner = 1) per block. Parts are joined as a tree, always in one order. */
CC_KERNEL(THREADS, 4) softmax_row(const Softmax p) {
    CC_SHARED(A, maxima, [THREADS]);
    CC_SHARED(double, sums, [THREADS]);
    const int t = cc_thread();
    const T *x = p.x + (long long)cc_block() * p.channels;
    T *y = p.y + (long long)cc_block() * p.channels;
    A most = x[0];
    for (int c = t; c < p.channels; c += THREADS) most = cc_max(x[c], most);
    maxima[t] = most;
    for (int half = THREADS / 2; half; half /= 2) {
        cc_barrier();
        if (t < half) maxima[t] = cc_max(maxima[t], maxima[t + half]);
    }
    cc_barrier();
    most = maxima[0];
    double sum = 0;
    for (int c = t; c < p.channels; c += THREADS) sum += cc_exp(x[c] - most);
    sums[t] = sum;
    for (int half = THREADS / 2; half; half /= 2) {
        cc_barrier();
        if (t < half) sums[t] += sums[t + half];
    }
    cc_barrier();
    for (int c = t; c < p.channels; c += THREADS) y[c] = cc_exp(x[c] - most) / (A)sums[0];
}

struct Lrn {
    const T *x;
    T *y;
    long long count, inner;
    int channels, size;
    double alpha, beta, bias;
};

CC_KERNEL(THREADS) lrn(const Lrn p) {
    const long long i = (long long)cc_block() * THREADS + cc_thread();
    if (i >= p.count) return;
    const int channel = (int)(i / p.inner % p.channels);
    const int first = channel - (p.size - 1) / 2, behind = channel + p.size / 2;
    const int begin = first < 0 ? 0 : first, end = behind >= p.channels ? p.channels - 1 : behind;
    A sum = 0;
    for (int c = begin; c <= end; c++) {
        const A other = p.x[i + (long long)(c - channel) * p.inner];
        sum += other * other;
    }
    /* The powers of the published networks need no logarithm. */
    const A base = (A)p.bias + (A)(p.alpha / p.size) * sum, root = cc_sqrt(base);
    const A power = p.beta == 0.75 ? root * cc_sqrt(root) : p.beta == 0.5 ? root : cc_pow(base, (A)p.beta);
    p.y[i] = (A)p.x[i] / power;
}

struct Resize {
    const T *x;
    T *y;
    const int *row_low;
    const int *row_high;
    const double *row_weight;
    const int *column_low;
    const int *column_high;
    const double *column_weight;
    long long maps;
    int H, W, P, Q, span, blocks_per_map, maps_per_block;
};

CC_KERNEL(THREADS) resize(const Resize p) {
    long long map;
    int place;
    if (!cc_place(THREADS, p.span, p.blocks_per_map, p.maps_per_block, p.maps, &map, &place)) return;
    const int row = place / p.Q, column = place % p.Q, left = p.column_low[column], right = p.column_high[column];
    const T *low = p.x + (map * p.H + p.row_low[row]) * p.W, *high = p.x + (map * p.H + p.row_high[row]) * p.W;
    const A down = (A)p.row_weight[row], across = (A)p.column_weight[column];
    const A a = low[left] * (1 - down) + high[left] * down, b = low[right] * (1 - down) + high[right] * down;
    p.y[map * p.span + place] = a * (1 - across) + b * across;
}
