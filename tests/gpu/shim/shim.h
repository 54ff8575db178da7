/* Shim: runs a kernel's own source on the host, so that it can be tested without a GPU.
 *
 * In: a .cu file of cconv/gpu/kernels, included behind this file; its -D macros.  Out: run(), of host.py.
 * Needs g++ on x86-64, or another machine with ucontext, which SHIM_UCONTEXT asks for on any (slower).
 *
 * The threads of a block are fibers of one thread of the host: each runs until a barrier or its end, then another one
 * does, in an order drawn anew for every round; so are the blocks. What that shows:
 *   a missing barrier     some order reads what is not there yet: shared memory begins as NaN (all bits set)
 *   a barrier that not all threads of a block reach: an error
 *   a wrong index         under AddressSanitizer: every shared array is a piece of memory of its own
 * What it cannot show: races within a round (fibers do not interleave there), warps, how fast anything is.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_UNPOISON_MEMORY_REGION(begin, size)
#endif

#define CC_HOST
#define CC_KERNEL(...) static void
#define CC_DEVICE static inline
#define CC_MEMBER inline
#define CC_UNROLL
#define CC_SHARED(type, name, dimensions)                                                                              \
    typedef type name##_type dimensions;                                                                               \
    name##_type &name = *static_cast<name##_type *>(shim_shared(sizeof(name##_type)))

enum { SHIM_THREADS = 1024, SHIM_ARRAYS = 8, SHIM_STACK = 1 << 16 };
enum Shim_state { RUNNABLE, AT_BARRIER, ENDED };

/* A place to go on from: the stack pointer, everything else lies on the stack. */
struct Shim_fiber {
    void *place;
    Shim_state state;
    int arrays; /* shared arrays that it has come across in this block */
};

static Shim_fiber shim_fibers[SHIM_THREADS];
static char *shim_stacks;
static void *shim_scheduler, *shim_arrays[SHIM_ARRAYS];
static size_t shim_sizes[SHIM_ARRAYS];
static int shim_thread;
static unsigned shim_block_index;
static void (*shim_body)();
static const char *shim_error;

/* Leave one stack, remember where, and go on with another. */
#if defined __x86_64__ && !defined SHIM_UCONTEXT
extern "C" void shim_switch(void **from, void *to);
asm(".text\n"
    ".globl shim_switch\n.hidden shim_switch\n.type shim_switch, @function\n"
    "shim_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size shim_switch, .-shim_switch\n");
static void *shim_begin(char *stack, void (*entry)()) {
    void **top = (void **)(stack + SHIM_STACK) - 2; /* where a call would have left its return address */
    top[0] = (void *)entry;
    memset(top - 6, 0, 6 * sizeof(void *));
    return top - 6;
}
#else
#include <ucontext.h>
static ucontext_t shim_contexts[SHIM_THREADS + 1];
static void *shim_begin(char *stack, void (*entry)()) {
    ucontext_t *context = &shim_contexts[(stack - shim_stacks) / SHIM_STACK];
    getcontext(context);
    context->uc_stack.ss_sp = stack;
    context->uc_stack.ss_size = SHIM_STACK;
    context->uc_link = NULL;
    makecontext(context, entry, 0);
    return context;
}
static void shim_switch(void **from, void *to) {
    ucontext_t *self = &shim_contexts[from == &shim_scheduler ? (int)SHIM_THREADS : shim_thread];
    *from = self;
    swapcontext(self, (ucontext_t *)to);
}
#endif

static inline unsigned cc_bits(float x) {
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
static inline float cc_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
static inline float cc_from_half(unsigned short bits) {
    _Float16 x;
    memcpy(&x, &bits, sizeof x);
    return (float)x;
}
static inline unsigned short cc_to_half(float x) {
    const _Float16 near = (_Float16)x;
    unsigned short bits;
    memcpy(&bits, &near, sizeof bits);
    return bits;
}

static inline int cc_thread() { return shim_thread; }
static inline unsigned cc_block() { return shim_block_index; }

static void shim_leave(Shim_state state) {
    Shim_fiber *fiber = &shim_fibers[shim_thread];
    fiber->state = state;
    shim_switch(&fiber->place, shim_scheduler);
}
static inline void cc_barrier() { shim_leave(AT_BARRIER); }

static void shim_entry() {
    shim_body();
    shim_leave(ENDED);
}

/* The next shared array of this thread: the same memory for all threads of a block. */
static void *shim_shared(size_t bytes) {
    const int index = shim_fibers[shim_thread].arrays++;
    if (index >= SHIM_ARRAYS) abort();
    if (shim_sizes[index] != bytes) {
        free(shim_arrays[index]);
        shim_arrays[index] = malloc(bytes);
        shim_sizes[index] = bytes;
        memset(shim_arrays[index], 0xFF, bytes);
    }
    return shim_arrays[index];
}

static uint64_t shim_random(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state >> 11;
}

/* An order of 0 .. count - 1: begin, and step on by a number that shares no divisor with the count. */
struct Shim_order {
    unsigned long long at, step, count;
    Shim_order(uint64_t *random, unsigned long long n) : at(shim_random(random) % n), count(n) {
        unsigned long long a, b;
        do {
            step = 1 + shim_random(random) % n;
            for (a = step, b = n; b;) {
                const unsigned long long rest = a % b;
                a = b;
                b = rest;
            }
        } while (a != 1);
    }
    unsigned long long next() {
        at = (at + step) % count;
        return at;
    }
};

static const char *shim_run_block(int threads, uint64_t *random) {
    for (int i = 0; i < SHIM_ARRAYS && shim_arrays[i]; i++) memset(shim_arrays[i], 0xFF, shim_sizes[i]);
    for (int i = 0; i < threads; i++) {
        char *stack = shim_stacks + (size_t)i * SHIM_STACK;
        ASAN_UNPOISON_MEMORY_REGION(stack, SHIM_STACK);
        shim_fibers[i] = {shim_begin(stack, shim_entry), RUNNABLE, 0};
    }
    for (int ended = 0; ended < threads;) {
        Shim_order order(random, threads);
        int waiting = 0;
        for (int i = 0; i < threads; i++) {
            shim_thread = (int)order.next();
            Shim_fiber *fiber = &shim_fibers[shim_thread];
            if (fiber->state == ENDED) continue;
            fiber->state = RUNNABLE;
            shim_switch(&shim_scheduler, fiber->place);
            ended += fiber->state == ENDED;
            waiting += fiber->state == AT_BARRIER;
        }
        if (waiting && ended) return "a barrier that not all threads of a block reach";
    }
    return NULL;
}

/* NULL, or what went wrong. `stacks` has room for SHIM_THREADS. */
static const char *shim_run(void (*body)(), long long blocks, int threads, uint64_t seed, char *stacks) {
    uint64_t random = seed * 2654435761u + 88172645463325252u;
    if (threads > SHIM_THREADS) return "a block of too many threads";
    shim_stacks = stacks;
    shim_body = body;
    Shim_order order(&random, blocks);
    for (long long i = 0; i < blocks; i++) {
        shim_block_index = (unsigned)order.next();
        if (const char *error = shim_run_block(threads, &random)) return error;
    }
    return NULL;
}

/* What host.py calls. */
#define SHIM_EXPORT(kernel, Parameters)                                                                                \
    static Parameters shim_parameters;                                                                                 \
    static void shim_call() { kernel(shim_parameters); }                                                               \
    extern "C" size_t size() { return sizeof(Parameters); }                                                            \
    extern "C" size_t room() { return (size_t)SHIM_THREADS * SHIM_STACK; }                                             \
    extern "C" const char *run(const void *parameters, long long blocks, int threads, uint64_t seed, char *stacks) {   \
        memcpy(&shim_parameters, parameters, sizeof(Parameters));                                                      \
        return shim_run(shim_call, blocks, threads, seed, stacks);                                                     \
    }
