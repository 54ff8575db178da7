/* Matmul: y[b] = x[b] @ other[b] for matrices (M, K) and (K, N).
 *
 * In: T.  Out: y, images * matrices of them. A block has a tile of TILE x TILE of one product, a thread SIDE x SIDE of
 * it; DEPTH products of it at a time go through shared memory. Products are summed in chains of `chain` steps, as in
 * conv.cu.
 */
#include "cc.cuh"

#define MOST_LOOPS 8
#define TILE 64
#define SIDE 4
#define DEPTH 16
#define THREADS 256

struct MatMul {
    const T *x;
    const T *other;
    T *y;
    long long matrices, x_size, other_size; /* other_size 0: all images share one */
    int M, K, N, chain, tiles_down, tiles_across, loops;
    long long size[MOST_LOOPS], source[MOST_LOOPS], target[MOST_LOOPS]; /* steps in x and other, in matrices */
};

CC_KERNEL(THREADS) matmul(const MatMul p) {
    CC_SHARED(A, rows, [DEPTH][TILE + 1]);
    CC_SHARED(A, columns, [DEPTH][TILE]);
    const int t = cc_thread(), tile_row = t / (TILE / SIDE), tile_column = t % (TILE / SIDE);
    const unsigned tiles = (unsigned)p.tiles_down * p.tiles_across, tile = cc_block() % tiles;
    const long long product = cc_block() / tiles, image = product / p.matrices;
    long long rest = product % p.matrices, left = 0, right = 0;
    for (int loop = p.loops - 1; loop >= 0; loop--) {
        const long long at = rest % p.size[loop];
        rest /= p.size[loop];
        left += at * p.source[loop];
        right += at * p.target[loop];
    }
    const T *x = p.x + image * p.x_size + left * p.M * p.K;
    const T *other = p.other + image * p.other_size + right * p.K * p.N;
    const int top = (int)(tile / p.tiles_across) * TILE, first = (int)(tile % p.tiles_across) * TILE;

    A sums[SIDE][SIDE], total[SIDE][SIDE];
    CC_UNROLL for (int i = 0; i < SIDE; i++)
        CC_UNROLL for (int j = 0; j < SIDE; j++) sums[i][j] = total[i][j] = 0;
    int left_of_chain = p.chain;
    for (int k0 = 0; k0 < p.K; k0 += DEPTH) {
        CC_UNROLL for (int i = 0; i < DEPTH * TILE / THREADS; i++) {
            const int e = t + i * THREADS, k = e % DEPTH, m = e / DEPTH;
            rows[k][m] = k0 + k < p.K && top + m < p.M ? (A)x[(long long)(top + m) * p.K + k0 + k] : A(0);
            const int n = e % TILE, l = e / TILE;
            columns[l][n] = k0 + l < p.K && first + n < p.N ? (A)other[(long long)(k0 + l) * p.N + first + n] : A(0);
        }
        cc_barrier();
        CC_UNROLL for (int k = 0; k < DEPTH; k++)
            CC_UNROLL for (int i = 0; i < SIDE; i++)
                CC_UNROLL for (int j = 0; j < SIDE; j++)
                    sums[i][j] = cc_fma(rows[k][tile_row * SIDE + i], columns[k][j * (TILE / SIDE) + tile_column],
                                        sums[i][j]);
        if (--left_of_chain == 0) {
            left_of_chain = p.chain;
            CC_UNROLL for (int i = 0; i < SIDE; i++)
                CC_UNROLL for (int j = 0; j < SIDE; j++) {
                    total[i][j] += sums[i][j];
                    sums[i][j] = 0;
                }
        }
        cc_barrier();
    }
    CC_UNROLL for (int i = 0; i < SIDE; i++)
        CC_UNROLL for (int j = 0; j < SIDE; j++) {
            const int m = top + tile_row * SIDE + i, n = first + j * (TILE / SIDE) + tile_column;
            if (m < p.M && n < p.N) p.y[(product * p.M + m) * p.N + n] = total[i][j] + sums[i][j];
        }
}
