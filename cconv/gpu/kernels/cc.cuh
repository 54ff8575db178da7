/* cc: what every kernel is written with, so that one source compiles for a device and, without one, for the host.
 *
 * In: T (float or double), a macro like all that a kernel is compiled with.
 * Out: vectors of 16 bytes, places in maps, activations, of which ACTIVATE names one.
 * Nothing is included from outside: NVRTC needs no header path. What is not C++ (launching, shared memory, barriers, PTX
 * if there is any) stands here behind CC_* and cc_*; a host defines CC_HOST and its own before this file.
 */
#ifndef CC_HOST
#define CC_KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
#define CC_DEVICE static __device__ __forceinline__
#define CC_SHARED(type, name, dimensions) __shared__ __align__(16) type name dimensions
#define CC_UNROLL _Pragma("unroll")
CC_DEVICE int cc_thread() { return threadIdx.x; }
CC_DEVICE unsigned cc_block() { return blockIdx.x; }
/* All threads of the block come here before any goes on; what they wrote to shared memory is then there. */
CC_DEVICE void cc_barrier() { __syncthreads(); }
#endif

/* 16 bytes: the widest load and store. */
#define LANES (16 / (int)sizeof(T))
struct alignas(16) Vector {
    T lane[LANES];
};
CC_DEVICE Vector cc_load(const T *p) { return *reinterpret_cast<const Vector *>(p); }
CC_DEVICE void cc_store(T *p, Vector v) { *reinterpret_cast<Vector *>(p) = v; }

/* Which map, and which place in it, a thread has. A map of `span` places is cut into blocks, or a block has several
 * maps, so that 64-bit numbers are divided once per block and not per thread. */
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

/* Activations, under the names of planning/specs.py. Comparisons are written so that NaN passes through. */
CC_DEVICE T cc_none(T x, T) { return x; }
CC_DEVICE T cc_relu(T x, T) { return x < 0 ? T(0) : x; }
CC_DEVICE T cc_relu6(T x, T) { return x < 0 ? T(0) : x > 6 ? T(6) : x; }
CC_DEVICE T cc_leaky_relu(T x, T alpha) { return x < 0 ? alpha * x : x; }
CC_DEVICE T cc_sigmoid(T x, T) { return T(1) / (T(1) + cc_exp(-x)); }
CC_DEVICE T cc_silu(T x, T) { return x / (T(1) + cc_exp(-x)); }
CC_DEVICE T cc_hardswish(T x, T) { return x * (x < -3 ? T(0) : x > 3 ? T(6) : x + T(3)) / T(6); }
CC_DEVICE T cc_tanh(T x, T) { return cc_tanh(x); }
/* 1 + erf(x / sqrt 2) without its cancellation. */
CC_DEVICE T cc_gelu(T x, T) { return x * T(0.5) * cc_erfc(x * T(-0.70710678118654752440)); }
