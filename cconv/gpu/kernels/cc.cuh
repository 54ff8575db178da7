/* cc: what every kernel is written with, so that one source compiles for a device and, without one, for the host.
 *
 * In: T (float, double, Half or Bfloat), a macro like all that a kernel is compiled with.
 * Out: A, the type that arithmetic is done in; vectors, places in maps, activations, of which ACTIVATE names one.
 * Nothing is included from outside: NVRTC needs no header path. What is not C++ (launching, shared memory, barriers,
 * PTX if there is any) stands here behind CC_* and cc_*; a host defines CC_HOST and its own before this file.
 */
#ifndef CC_HOST
/* Threads of a block; then, unless it is 0, how many blocks a multiprocessor must have registers for: left alone, ptxas
 * spills some kernels to make room for one more. */
#define CC_KERNEL(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__)
#define CC_DEVICE static __device__ __forceinline__
#define CC_MEMBER __device__ __forceinline__
#define CC_SHARED(type, name, dimensions) __shared__ __align__(16) type name dimensions
#define CC_UNROLL _Pragma("unroll")
CC_DEVICE int cc_thread() { return threadIdx.x; }
CC_DEVICE unsigned cc_block() { return blockIdx.x; }
/* All threads of the block come here before any goes on; what they wrote to shared memory is then there. */
CC_DEVICE void cc_barrier() { __syncthreads(); }
CC_DEVICE unsigned cc_bits(float x) { return __float_as_uint(x); }
CC_DEVICE float cc_float(unsigned bits) { return __uint_as_float(bits); }
/* IEEE's numbers of 16 bits; the nearest one, ties to even. */
CC_DEVICE float cc_from_half(unsigned short bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
CC_DEVICE unsigned short cc_to_half(float x) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
#endif

/* Numbers kept in 16 bits and computed with in 32: every sum is a float's, and rounded once, when it is stored. */
struct Half {
    unsigned short bits;
    Half() = default;
    CC_MEMBER Half(float x) : bits(cc_to_half(x)) {}
    CC_MEMBER operator float() const { return cc_from_half(bits); }
};
/* The upper half of a float; rounded to the nearest, ties to even; NaN stays NaN. */
struct Bfloat {
    unsigned short bits;
    Bfloat() = default;
    CC_MEMBER Bfloat(float x) {
        const unsigned whole = cc_bits(x);
        bits = (unsigned short)(x != x ? (whole >> 16 | 0x40) : (whole + 0x7FFF + (whole >> 16 & 1)) >> 16);
    }
    CC_MEMBER operator float() const { return cc_float((unsigned)bits << 16); }
};
template <class Kept> struct Wide {
    typedef float type;
};
template <> struct Wide<double> {
    typedef double type;
};
typedef Wide<T>::type A;

/* What a thread loads and stores at once: 16 bytes of A, the widest there is; in memory half as many of a Half. */
#define LANES (16 / (int)sizeof(A))
struct alignas(16) Vector {
    A lane[LANES];
};
template <class Kept> struct alignas(LANES * sizeof(Kept)) Stored {
    Kept lane[LANES];
};
template <class Kept> CC_DEVICE Vector cc_load(const Kept *p) {
    const Stored<Kept> from = *reinterpret_cast<const Stored<Kept> *>(p);
    Vector v;
    CC_UNROLL for (int l = 0; l < LANES; l++) v.lane[l] = from.lane[l];
    return v;
}
template <class Kept> CC_DEVICE void cc_store(Kept *p, const Vector &v) {
    Stored<Kept> to;
    CC_UNROLL for (int l = 0; l < LANES; l++) to.lane[l] = (Kept)v.lane[l];
    *reinterpret_cast<Stored<Kept> *>(p) = to;
}
CC_DEVICE void cc_copy(T *to, const T *from) {
    *reinterpret_cast<Stored<T> *>(to) = *reinterpret_cast<const Stored<T> *>(from);
}

/* Which map, and which place in it, a thread has: a map of `span` places is cut into blocks, or a block has several
 * maps, so that 32-bit numbers are divided. */
CC_DEVICE bool cc_place(int threads, int span, int blocks_per_map, int maps_per_block, long long maps, long long *map,
                        int *place) {
    const unsigned group = cc_block() / blocks_per_map;
    const int item = (int)(cc_block() % blocks_per_map) * threads + cc_thread();
    const int local = item / span;
    *place = item - local * span;
    *map = (long long)group * maps_per_block + local;
    return local < maps_per_block && *map < maps;
}

/* Fused by name and not by the compiler's leave: then no bit depends on the shape of the code around it. */
CC_DEVICE float cc_fma(float a, float b, float c) { return fmaf(a, b, c); }
CC_DEVICE double cc_fma(double a, double b, double c) { return fma(a, b, c); }
CC_DEVICE float cc_exp(float x) { return expf(x); }
CC_DEVICE double cc_exp(double x) { return exp(x); }
CC_DEVICE float cc_tanh(float x) { return tanhf(x); }
CC_DEVICE double cc_tanh(double x) { return tanh(x); }
CC_DEVICE float cc_erfc(float x) { return erfcf(x); }
CC_DEVICE double cc_erfc(double x) { return erfc(x); }
CC_DEVICE float cc_sqrt(float x) { return sqrtf(x); }
CC_DEVICE double cc_sqrt(double x) { return sqrt(x); }
CC_DEVICE float cc_pow(float x, float y) { return powf(x, y); }
CC_DEVICE double cc_pow(double x, double y) { return pow(x, y); }
CC_DEVICE A cc_max(A a, A b) { return a > b || a != a ? a : b; }

/* Activations, under the names of planning/specs.py. Comparisons are written so that NaN passes through. */
CC_DEVICE A cc_none(A x, A) { return x; }
CC_DEVICE A cc_relu(A x, A) { return x < 0 ? A(0) : x; }
CC_DEVICE A cc_relu6(A x, A) { return x < 0 ? A(0) : x > 6 ? A(6) : x; }
CC_DEVICE A cc_leaky_relu(A x, A alpha) { return x < 0 ? alpha * x : x; }
CC_DEVICE A cc_sigmoid(A x, A) { return A(1) / (A(1) + cc_exp(-x)); }
CC_DEVICE A cc_silu(A x, A) { return x / (A(1) + cc_exp(-x)); }
CC_DEVICE A cc_hardswish(A x, A) { return x * (x < -3 ? A(0) : x > 3 ? A(6) : x + A(3)) / A(6); }
CC_DEVICE A cc_tanh(A x, A) { return cc_tanh(x); }
/* 1 + erf(x / sqrt 2) without its cancellation. */
CC_DEVICE A cc_gelu(A x, A) { return x * A(0.5) * cc_erfc(x * A(-0.70710678118654752440)); }
