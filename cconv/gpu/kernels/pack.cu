/* Pack: weights (K, C/G, R, S) in the order in which conv.cu reads them: [unit][k][width], zeros where there are none.
 *
 * In: T.  Out: `packed`, in A, one element per thread.
 */
#include "cc.cuh"

#define THREADS 256

struct Pack {
    const T *weight;
    A *packed;
    long long count;
    int width, rows, depth, outputs, panels;
};

CC_KERNEL(THREADS) pack(const Pack p) {
    const long long i = (long long)cc_block() * THREADS + cc_thread();
    if (i >= p.count) return;
    const int o = (int)(i % p.width), k = (int)(i / p.width % p.rows);
    const long long unit = i / p.width / p.rows;
    const long long group = unit / p.panels;
    const int output = (int)(unit % p.panels) * p.width + o;
    A value = 0;
    if (output < p.outputs && k < p.depth) value = p.weight[(group * p.outputs + output) * p.depth + k];
    p.packed[i] = value;
}
