/* Machine: loops that show what the processor and its memory can do at most.
 *
 * In: how often, or which memory.  Out: nothing but the time they take, which machine.py measures.
 *
 * No threads here: machine.py calls each loop from as many threads as it asks about.
 */

#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define UNROLLED _Pragma("GCC unroll 12")

/* Twelve sums that wait for nobody: more than latency times throughput of every core known, and AVX2's sixteen
 * registers still hold them. The empty asm keeps the compiler from summing in closed form. */
#define FMA_LOOP(name, bytes, isa)                                                                                   \
    __attribute__((target(isa), noinline)) void name(long steps) {                                                  \
        typedef float vector __attribute__((vector_size(bytes)));                                                   \
        vector sum[12], factor = {0}, addend = {0};                                                                 \
        UNROLLED for (int i = 0; i < 12; i++) sum[i] = (vector){0} + (float)i;                                       \
        factor += 0.5f;                                                                                              \
        addend += 1.0f;                                                                                              \
        __asm__ volatile("" : "+v"(factor), "+v"(addend));                                                           \
        for (long step = 0; step < steps; step++) {                                                                  \
            UNROLLED for (int i = 0; i < 12; i++) sum[i] = sum[i] * factor + addend;                                 \
            UNROLLED for (int i = 0; i < 12; i++) __asm__ volatile("" : "+v"(sum[i]));                               \
        }                                                                                                            \
    }

#if defined(__x86_64__)
FMA_LOOP(fma_avx2, 32, "avx2,fma")
FMA_LOOP(fma_avx512, 64, "avx512f,fma")

/* The widest vectors that this processor multiplies, in bytes; 0: no FMA loop here runs on it. */
int vector_bytes(void) {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f"))
        return 64;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 32 : 0;
}
#else
int vector_bytes(void) { return 0; }
#endif

/* Reads every byte once. */
void read_all(const uint64_t *from, size_t bytes) {
    typedef uint64_t vector __attribute__((vector_size(64), aligned(8)));
    const vector *at = (const vector *)from, *end = at + bytes / sizeof(vector);
    vector a = {0}, b = {0}, c = {0}, d = {0};
    for (; at + 4 <= end; at += 4) {
        a ^= at[0];
        b ^= at[1];
        c ^= at[2];
        d ^= at[3];
    }
    a ^= b ^ c ^ d;
    __asm__ volatile("" : : "m"(a));
}

void copy_all(void *to, const void *from, size_t bytes) { memcpy(to, from, bytes); }

/* Seconds for the first write to each `page` of fresh memory, in all; negative if there is none. `huge` asks the system
 * for pages of 2 MB, which it may refuse without a word. */
double fault_seconds(size_t bytes, size_t page, int huge) {
    const size_t alignment = 2u << 20;
    struct timespec begin, end;
    char *whole = mmap(NULL, bytes + alignment, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (whole == MAP_FAILED)
        return -1;
    char *memory = (char *)(((uintptr_t)whole + alignment - 1) / alignment * alignment);
    int refused = madvise(memory, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (size_t at = 0; at < bytes; at += page)
        ((volatile char *)memory)[at] = 1;
    clock_gettime(CLOCK_MONOTONIC, &end);
    munmap(whole, bytes + alignment);
    if (refused && huge)
        return -1;
    return (double)(end.tv_sec - begin.tv_sec) + 1e-9 * (double)(end.tv_nsec - begin.tv_nsec);
}
