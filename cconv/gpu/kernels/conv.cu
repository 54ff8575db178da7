/* Conv: y = activation(conv(x, weight) + bias + residual) as a product of matrices that is never written out.
 *
 * In: T, and A, in which it computes; DEPTH, products of a step; OUTPUTS x PIXELS, a block's tile; ROWS x COLUMNS of
 * it, a thread's; ACTIVATE.
 * PREACTIVATED, 0 or 1: x is read as max(before[0][c] * x + before[1][c], 0); only for 1x1 kernels without padding, in
 * one group, where k = c, taps are maps apart, and all are inside.
 * Out: maps (N, K, P, Q).
 *
 *     weight, packed: [unit][k][OUTPUTS]        a unit is OUTPUTS output channels of a group, zeros behind the last
 *     pixel g = (n, p, q), over all images      k = (c, r, s);  taps[k]: where it lies, relative to a window's corner
 *
 *                         PIXELS of all N*P*Q           sums[ROWS][COLUMNS] of a thread: LANES neighbours, then LANES
 *               k   [ inputs: gathered, 0 outside ]     neighbours PIXELS / (COLUMNS / LANES) further on; so 16 bytes
 *     OUTPUTS [ k ] [                             ]     are loaded at a time and no two threads meet in a bank
 *             [   ] [   sums += filter * input    ]
 *
 * Products are summed in chains of `chain` steps of DEPTH, which are then added up: rounding errors grow with the
 * chain, not with the depth, and in the same order whatever the tile, so no bit depends on it.
 * While a step is multiplied the next one is on its way: global memory -> registers -> the other half of shared memory.
 *
 * Assumptions: (OUTPUTS / ROWS) * (PIXELS / COLUMNS) = THREADS >= PIXELS, and THREADS / PIXELS divides DEPTH; ROWS and
 * COLUMNS are multiples of LANES; `weight` is 16-byte aligned; if `vector`, so are y and residual, and P*Q is a
 * multiple of LANES.
 */
#include "cc.cuh"

#define THREADS ((OUTPUTS / ROWS) * (PIXELS / COLUMNS))
#define VECTORS (DEPTH * OUTPUTS / LANES)

/* Of product k: the offset of its input from a window's corner, in elements, rows and columns. */
struct alignas(16) Tap {
    long long offset;
    int row, column;
};

struct Conv {
    const T *x;
    const A *weight;
    const T *bias;
    const T *before;
    const T *residual;
    T *y;
    const Tap *taps;
    long long pixels, map, image, group_inputs;
    int H, W, Q, K, outputs, depth, steps, chain, panels, units, vector;
    int stride_down, stride_across, top, left;
    double alpha;
};

CC_KERNEL(THREADS, OUTPUTS == 16 && sizeof(A) == 4 ? 5 : 0) conv(const Conv p) {
    CC_SHARED(A, filters, [2][DEPTH][OUTPUTS]);
    CC_SHARED(A, inputs, [2][DEPTH][PIXELS]);
    constexpr int filter_vectors = (VECTORS + THREADS - 1) / THREADS, rows_apart = THREADS / PIXELS;
    constexpr int input_rows = DEPTH / rows_apart;
    const int t = cc_thread(), unit = cc_block() % p.units, group = unit / p.panels;
    const int panel_of_group = unit - group * p.panels;
    const long long first = (long long)(cc_block() / p.units) * PIXELS;
    const A *panel = p.weight + (long long)unit * p.steps * DEPTH * OUTPUTS;

    /* The window that this thread gathers inputs of. */
    const int column = t % PIXELS, row = t / PIXELS;
    const bool gathers = THREADS % PIXELS == 0 || row < rows_apart, exists = gathers && first + column < p.pixels;
    const long long n = (first + column) / p.map, place = (first + column) - n * p.map;
    const int down = (int)(place / p.Q) * p.stride_down - p.top, across = (int)(place % p.Q) * p.stride_across - p.left;
    const long long corner = n * p.image + group * p.group_inputs + (long long)down * p.W + across;

    Vector filter[filter_vectors];
    A input[input_rows];
    const auto fetch = [&](int step) {
        const A *from = panel + (long long)step * DEPTH * OUTPUTS;
        CC_UNROLL for (int i = 0; i < filter_vectors; i++) {
            const int v = t + i * THREADS;
            if (VECTORS % THREADS == 0 || v < VECTORS) filter[i] = cc_load(from + v * LANES);
        }
        CC_UNROLL for (int i = 0; i < input_rows; i++) {
            const int k = step * DEPTH + row + i * rows_apart;
            A value = 0;
            if (exists && k < p.depth) {
                if (PREACTIVATED) {
                    value = p.x[corner + k * p.map];
                    value = cc_relu(cc_fma((A)p.before[k], value, (A)p.before[p.depth + k]), 0);
                } else {
                    const Tap tap = p.taps[k];
                    if ((unsigned)(down + tap.row) < (unsigned)p.H && (unsigned)(across + tap.column) < (unsigned)p.W)
                        value = p.x[corner + tap.offset];
                }
            }
            input[i] = value;
        }
    };
    const auto keep = [&](int half) {
        CC_UNROLL for (int i = 0; i < filter_vectors; i++) {
            const int v = t + i * THREADS;
            if (VECTORS % THREADS == 0 || v < VECTORS) cc_store(&filters[half][0][0] + v * LANES, filter[i]);
        }
        if (!gathers) return;
        CC_UNROLL for (int i = 0; i < input_rows; i++) inputs[half][row + i * rows_apart][column] = input[i];
    };

    const int tile_row = t / (PIXELS / COLUMNS), tile_column = t % (PIXELS / COLUMNS);
    A sums[ROWS][COLUMNS], total[ROWS][COLUMNS];
    CC_UNROLL for (int i = 0; i < ROWS; i++)
        CC_UNROLL for (int j = 0; j < COLUMNS; j++) sums[i][j] = total[i][j] = 0;

    fetch(0);
    keep(0);
    cc_barrier();
    int left_of_chain = p.chain;
    for (int step = 0; step < p.steps; step++) {
        const int half = step & 1;
        const bool more = step + 1 < p.steps;
        if (more) fetch(step + 1);
        CC_UNROLL for (int k = 0; k < DEPTH; k++) {
            Vector a[ROWS / LANES], b[COLUMNS / LANES];
            CC_UNROLL for (int i = 0; i < ROWS / LANES; i++)
                a[i] = cc_load(&filters[half][k][(i * (OUTPUTS / ROWS) + tile_row) * LANES]);
            CC_UNROLL for (int j = 0; j < COLUMNS / LANES; j++)
                b[j] = cc_load(&inputs[half][k][(j * (PIXELS / COLUMNS) + tile_column) * LANES]);
            CC_UNROLL for (int i = 0; i < ROWS; i++)
                CC_UNROLL for (int j = 0; j < COLUMNS; j++)
                    sums[i][j] = cc_fma(a[i / LANES].lane[i % LANES], b[j / LANES].lane[j % LANES], sums[i][j]);
        }
        if (--left_of_chain == 0) {
            left_of_chain = p.chain;
            CC_UNROLL for (int i = 0; i < ROWS; i++)
                CC_UNROLL for (int j = 0; j < COLUMNS; j++) {
                    total[i][j] += sums[i][j];
                    sums[i][j] = 0;
                }
        }
        if (more) {
            keep(half ^ 1);
            cc_barrier();
        }
    }

    /* All of them first: then half of the registers are free. */
    CC_UNROLL for (int i = 0; i < ROWS; i++)
        CC_UNROLL for (int j = 0; j < COLUMNS; j++) sums[i][j] = total[i][j] + sums[i][j];
    const A alpha = (A)p.alpha;
    CC_UNROLL for (int j = 0; j < COLUMNS / LANES; j++) {
        const long long g = first + (j * (PIXELS / COLUMNS) + tile_column) * LANES;
        if (g >= p.pixels) continue;
        /* Where these pixels lie in the first map of their image, divided once and not for every row; how many of them
         * are in that image, and how many in each that follows. */
        const long long image = g / p.map, place = g - image * p.map, from = image * p.K * p.map + place;
        const int here = p.map - place < LANES ? (int)(p.map - place) : LANES;
        const int each = p.map < LANES ? (int)p.map : LANES;
        CC_UNROLL for (int i = 0; i < ROWS; i++) {
            const int place_of_row = (i / LANES * (OUTPUTS / ROWS) + tile_row) * LANES + i % LANES;
            const int output = panel_of_group * OUTPUTS + place_of_row;
            if (output >= p.outputs) continue;
            const int k = group * p.outputs + output;
            const A bias = p.bias ? (A)p.bias[k] : A(0);
            long long at = from + k * p.map;
            if (p.vector) {
                Vector v, r;
                if (p.residual) r = cc_load(p.residual + at);
                CC_UNROLL for (int l = 0; l < LANES; l++) {
                    A value = sums[i][j * LANES + l] + bias;
                    if (p.residual) value += r.lane[l];
                    v.lane[l] = ACTIVATE(value, alpha);
                }
                cc_store(p.y + at, v);
                continue;
            }
            int left = here;
            CC_UNROLL for (int l = 0; l < LANES; l++, at++, left--) {
                if (left == 0) {
                    at += (p.K - 1LL) * p.map;
                    left = each;
                }
                if (g + l >= p.pixels) continue;
                A value = sums[i][j * LANES + l] + bias;
                if (p.residual) value += p.residual[at];
                p.y[at] = ACTIVATE(value, alpha);
            }
        }
    }
}
