/* Arithmetic: two operands, one or both of which spread over axes that they lack; a thread per element of y.
 *
 * In: T; KIND, a kind of arithmetic, SWAPPED, 0 or 1, and ACTIVATE.  Out: y = ACTIVATE(KIND(x, other)), or of (other,
 * x) if SWAPPED. Comparisons are written so that NaN passes through.
 */
#include "cc.cuh"

#define THREADS 256
#define MOST_LOOPS 8

struct Arithmetic {
    const T *x;
    const T *other;
    T *y;
    long long count, images, x_size, other_size; /* other_size 0: all images share one */
    int loops;
    long long size[MOST_LOOPS], source[MOST_LOOPS], target[MOST_LOOPS]; /* steps in x and in other */
    double alpha;
};

/* Kinds of planning/tensors.py, under their names; cc_max is in cc.cuh, since softmax has it too. */
CC_DEVICE A cc_add(A a, A b) { return a + b; }
CC_DEVICE A cc_sub(A a, A b) { return a - b; }
CC_DEVICE A cc_mul(A a, A b) { return a * b; }
CC_DEVICE A cc_div(A a, A b) { return a / b; }
CC_DEVICE A cc_min(A a, A b) { return a < b || a != a ? a : b; }
CC_DEVICE A cc_prelu(A x, A slope) { return x < 0 ? slope * x : x; }

CC_KERNEL(THREADS) arithmetic(const Arithmetic p) {
    const long long i = (long long)cc_block() * THREADS + cc_thread();
    if (i >= p.count * p.images) return;
    const long long image = i / p.count;
    long long rest = i - image * p.count, left = image * p.x_size, right = image * p.other_size;
    CC_UNROLL for (int loop = MOST_LOOPS - 1; loop >= 0; loop--) {
        if (loop >= p.loops) continue;
        const long long outer = rest / p.size[loop], at = rest - outer * p.size[loop];
        rest = outer;
        left += at * p.source[loop];
        right += at * p.target[loop];
    }
    const A a = p.x[left], b = p.other[right];
    p.y[i] = ACTIVATE(SWAPPED ? KIND(b, a) : KIND(a, b), (A)p.alpha);
}
