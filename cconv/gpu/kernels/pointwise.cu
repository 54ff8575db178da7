/* Pointwise: what treats every element alike: activations, sums of two maps, functions with parameters, filling.
 *
 * In: T; ACTIVATE, or FUNCTION with its parameters.  Out: y. If `vector`, x, other and y are 16-byte aligned.
 */
#include "cc.cuh"

#define THREADS 256

struct Pointwise {
    const T *x;
    const T *other;
    T *y;
    long long count;
    int vector;
    double alpha;
    double parameters[4];
};

/* Functions of planning/tensors.py, under their names. */
CC_DEVICE A cc_ramp(A x, const double *with) {
    const A v = (A)with[0] * x + (A)with[1];
    return v < (A)with[2] ? (A)with[2] : v > (A)with[3] ? (A)with[3] : v;
}
CC_DEVICE A cc_clip(A x, const double *with) {
    const A v = x < (A)with[0] ? (A)with[0] : x;
    return v > (A)with[1] ? (A)with[1] : v;
}
/* (1 + tanh u) / 2 = 1 / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3). */
CC_DEVICE A cc_gelu_tanh(A x, const double *) {
    const A slope = x * x * A(-0.071354816272600248776) + A(-1.5957691216057307118);
    return x / (A(1) + cc_exp(slope * x));
}
CC_DEVICE A cc_swish(A x, const double *with) { return x / (A(1) + cc_exp(-(A)with[0] * x)); }

#ifdef FUNCTION
#define FORMULA(v, r) FUNCTION(v, p.parameters)
#else
#define FORMULA(v, r) ACTIVATE(p.other ? (v) + (r) : (v), (A)p.alpha)
#endif

CC_KERNEL(THREADS) pointwise(const Pointwise p) {
    const long long first = ((long long)cc_block() * THREADS + cc_thread()) * LANES;
    if (p.vector && first + LANES <= p.count) {
        Vector v = cc_load(p.x + first), r;
        if (p.other) r = cc_load(p.other + first);
        else r = v;
        CC_UNROLL for (int l = 0; l < LANES; l++) v.lane[l] = FORMULA(v.lane[l], r.lane[l]);
        cc_store(p.y + first, v);
        return;
    }
    CC_UNROLL for (int l = 0; l < LANES; l++)
        if (first + l < p.count) {
            const A v = p.x[first + l], r = p.other ? (A)p.other[first + l] : A(0);
            p.y[first + l] = FORMULA(v, r);
        }
}

/* y = alpha, everywhere. */
CC_KERNEL(THREADS) fill(const Pointwise p) {
    const long long i = (long long)cc_block() * THREADS + cc_thread();
    if (i < p.count) p.y[i] = (A)p.alpha;
}
