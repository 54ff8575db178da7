# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Team: the one team of threads of this process, and the phases of tasks that they share.

In: phases, each some tasks, and how many threads may take them.  Out: all tasks done, phase after phase.
The only file with OpenMP in it.

The caller works itself, whichever thread it is, and posts its phases on a board; a leader thread that belongs to nobody
takes what is posted, with as many helpers as were asked for, an OpenMP team of its own. So there is one team, where
libgomp alone keeps one for every thread that ever called. A phase's tasks are handed out one by one, each exactly
once; a thread that gets none waits until those of the others are done, then goes on to the next phase. A whole network
is posted once.

Helpers take tasks from the first on, the caller from the last one back: its core then finds, call after call and step
after step, the same part of every map in its own caches, and the smaller tasks, which are last, are not a helper's, who
comes later.

    caller   --post-->  [ board ]  <--watches--  leader (helper 1)  --prange-->  helpers 2, 3, ... of libgomp
    takes tasks             |                    takes tasks                     take tasks

`state` says where the board is:

    IDLE --caller posts--> POSTED --leader joins--> RUNNING --leader is done--> IDLE
    IDLE --leader waited for long--> ASLEEP --caller posts, and wakes it--> POSTED
    POSTED --caller has done everything before the leader came--> IDLE
    RUNNING --caller waited for long--> AWAITED --leader is done, and wakes it--> IDLE

One caller at a time has the board. The others work alone and do not wait: their threads are there anyway, so the cores
have enough to do; and between two tasks they look whether it is free. (Measured: docs/kernels.md.)

A child of fork has no leader and starts its own, whose OpenMP team is its own too: libgomp keeps teams by thread, and
waits for ever for the dead ones only in the thread that had them, which is no thread of the child.
"""

from cython.parallel cimport prange

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_t:
        pass
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    int pthread_create(pthread_t *, const void *, void *(*)(void *) noexcept nogil, void *)
    int pthread_detach(pthread_t)
    int pthread_atfork(void (*)() noexcept nogil, void (*)() noexcept nogil, void (*)() noexcept nogil)
    int pthread_mutex_init(pthread_mutex_t *, const void *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int pthread_cond_init(pthread_cond_t *, const void *)
    int pthread_cond_signal(pthread_cond_t *)
    int pthread_cond_broadcast(pthread_cond_t *)
    int pthread_cond_wait(pthread_cond_t *, pthread_mutex_t *)

cdef extern from * nogil:
    """
    #include <signal.h>
    #include <time.h>
    #if defined(__x86_64__) || defined(__i386__)
    #define cconv_pause() __builtin_ia32_pause()
    #elif defined(__aarch64__)
    #define cconv_pause() __asm__ volatile("yield")
    #else
    #define cconv_pause() ((void)0)
    #endif
    static inline long cconv_load_long(long *at) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); }
    static inline int cconv_move(int *at, int from, int to) {
        return __atomic_compare_exchange_n(at, &from, to, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    }
    static inline long cconv_next(long *at) { return __atomic_fetch_add(at, 1, __ATOMIC_RELAXED); }
    static inline long cconv_add(long *at, long n) { return __atomic_add_fetch(at, n, __ATOMIC_SEQ_CST); }
    static __thread int cconv_limit = 0; /* of the runs that this thread begins; 0 is none */
    static inline int cconv_get_limit(void) { return cconv_limit; }
    static inline void cconv_set_limit(int count) { cconv_limit = count; }
    static inline long cconv_nanoseconds(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return now.tv_sec * 1000000000L + now.tv_nsec;
    }
    #ifdef __linux__
    #include <sched.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    static inline int cconv_thread_id(void) { return (int)syscall(SYS_gettid); }
    /* A woken thread is often put behind its waker, and waits there until the scheduler balances, milliseconds later.
     * So a sleeper is woken where its waker is not, and once awake may again run wherever the waker may. */
    static cpu_set_t cconv_allowed;
    static inline void cconv_keep_off(int sleeper) {
        cpu_set_t elsewhere;
        int here = sched_getcpu();
        if (here < 0 || sleeper == 0 || sched_getaffinity(0, sizeof cconv_allowed, &cconv_allowed)) return;
        elsewhere = cconv_allowed;
        CPU_CLR(here, &elsewhere);
        /* If there is nowhere else it fails, and all is as it was. */
        sched_setaffinity(sleeper, sizeof elsewhere, &elsewhere);
    }
    static inline void cconv_roam(void) {
        if (CPU_COUNT(&cconv_allowed)) sched_setaffinity(0, sizeof cconv_allowed, &cconv_allowed);
    }
    #else
    static inline int cconv_thread_id(void) { return 0; }
    static inline void cconv_keep_off(int sleeper) { (void)sleeper; }
    static inline void cconv_roam(void) {}
    #endif
    /* A signal is for the threads that Python knows: it would not wake them here. */
    static inline int cconv_start(pthread_t *thread, void *(*main)(void *)) {
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        int failed = pthread_create(thread, NULL, main, NULL);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        return failed;
    }
    """
    void pause "cconv_pause"()
    bint move "cconv_move"(int *at, int from_, int to)
    long load_long "cconv_load_long"(long *at)
    long take_next "cconv_next"(long *at)
    long add "cconv_add"(long *at, long n)
    int get_limit "cconv_get_limit"()
    void set_limit "cconv_set_limit"(int count)
    long nanoseconds "cconv_nanoseconds"()
    int thread_id "cconv_thread_id"()
    void keep_off "cconv_keep_off"(int sleeper)
    void roam "cconv_roam"()
    int start "cconv_start"(pthread_t *thread, void *(*main)(void *) noexcept nogil)

cdef enum:
    IDLE, POSTED, RUNNING, AWAITED, ASLEEP

cdef enum:
    SERIAL_WORK = 500_000  # below, a second thread costs more than it saves; about 5 microseconds
    SLEEPY_WORK = 4_000_000  # below, waking a second thread costs more than it saves
    SPIN_NS = 100_000  # how long a waiting thread watches before it sleeps
    SPINS = 64  # looks from one reading of the clock to the next

cdef struct Board:
    Phase *phases  # those that are left
    long count
    int helpers
    int stop  # nobody wants the rest
    int sleepers  # whether somebody may sleep until a phase is done

cdef Board board
cdef int state = IDLE
cdef int taken = 0  # whether somebody has the board
cdef bint leading = False  # whether there is a leader; whoever has the board may ask
cdef int leader = 0  # the leader's thread id, once it runs
cdef pthread_mutex_t lock
cdef pthread_cond_t posted, done, turn
cdef int wanted = 1
cdef long last_short = 0  # when a short run began


cdef void begin() noexcept nogil:
    """The state of a process without a leader."""
    global state, taken, leading, leader
    state, taken, leading, leader = IDLE, 0, False, 0
    pthread_mutex_init(&lock, NULL)
    pthread_cond_init(&posted, NULL)
    pthread_cond_init(&done, NULL)
    pthread_cond_init(&turn, NULL)


begin()
pthread_atfork(NULL, NULL, begin)


cdef void watch(int unwanted) noexcept nogil:
    """Until `state` is something else, or for SPIN_NS."""
    cdef long began = nanoseconds()
    cdef int i
    while True:
        for i in range(SPINS):
            if load(&state) != unwanted:
                return
            pause()
        if nanoseconds() - began > SPIN_NS:
            return


cdef bint await_state(int unwanted, int waiting, pthread_cond_t *change) noexcept nogil:
    """Until `state` is neither `unwanted` nor `waiting`, which tells the other one to wake us; whether we slept."""
    cdef bint slept = False
    watch(unwanted)
    if load(&state) != unwanted:
        return slept
    pthread_mutex_lock(&lock)
    if move(&state, unwanted, waiting):
        while load(&state) == waiting:
            slept = True
            pthread_cond_wait(change, &lock)
    pthread_mutex_unlock(&lock)
    return slept


cdef void wake(pthread_cond_t *change) noexcept nogil:
    pthread_mutex_lock(&lock)
    pthread_cond_signal(change)
    pthread_mutex_unlock(&lock)


cdef bint ended(Phase *phase) noexcept nogil:
    return load_long(&phase.done) == phase.tasks or load(&board.stop)


cdef void wake_all() noexcept nogil:
    """Whoever sleeps until a phase is done. (Who goes to sleep says so first and looks once more; who ends a phase
    looks for sleepers afterwards: one of the two sees the other.)"""
    if load(&board.sleepers):
        pthread_mutex_lock(&lock)
        swap(&board.sleepers, 0)
        pthread_cond_broadcast(&turn)
        pthread_mutex_unlock(&lock)


cdef void await_end(Phase *phase) noexcept nogil:
    """Until all tasks of a phase are done, or nobody wants them."""
    cdef long began = nanoseconds()
    cdef int i
    while nanoseconds() - began < SPIN_NS:
        for i in range(SPINS):
            if ended(phase):
                return
            pause()
    pthread_mutex_lock(&lock)
    while True:
        swap(&board.sleepers, 1)
        if ended(phase):
            break
        pthread_cond_wait(&turn, &lock)
    pthread_mutex_unlock(&lock)


cdef void take_tasks(Phase *phases, long count, int thread, Ask ask, void *asked) noexcept nogil:
    """A thread's way through the phases. (The caller, who alone has an `ask`, has asked before the first.)"""
    cdef long p, i, taken
    cdef Phase *phase
    for p in range(count):
        phase = &phases[p]
        if p and phase.asks and ask != NULL and ask(asked):
            swap(&board.stop, 1)
            wake_all()
        taken = 0
        while add(&phase.left, -1) >= 0 and not load(&board.stop):
            if thread:
                i = take_next(&phase.next)
            else:
                phase.behind += 1
                i = phase.tasks - phase.behind
            phase.task(phase.job, i, phase.scratch + thread * phase.scratch_size)
            taken += 1
        if load(&board.stop):
            return
        if p + 1 < count and add(&phase.done, taken) != phase.tasks:
            await_end(phase)
        elif p + 1 < count and taken:
            wake_all()


cdef void *lead(void *nothing) noexcept nogil:
    """The leader's life."""
    global leader
    cdef int i
    leader = thread_id()
    while True:
        if await_state(IDLE, ASLEEP, &posted):
            roam()
        if not move(&state, POSTED, RUNNING):
            continue  # the caller did everything itself
        if board.helpers == 1:
            take_tasks(board.phases, board.count, 1, NULL, NULL)
        else:
            for i in prange(board.helpers, num_threads=board.helpers, schedule="static", chunksize=1):
                take_tasks(board.phases, board.count, i + 1, NULL, NULL)
        if swap(&state, IDLE) == AWAITED:
            wake(&done)
    return NULL


cdef bint have_leader() noexcept nogil:
    global leading
    cdef pthread_t thread
    if not leading and start(&thread, lead) == 0:
        pthread_detach(thread)
        leading = True
    return leading


cdef int allowed() noexcept nogil:
    """How many threads a run of the calling thread may use."""
    return min(wanted, get_limit()) if get_limit() else wanted


cdef void share(Phase *phases, long count, int threads, Ask ask, void *asked) noexcept nogil:
    """Run the phases, one after the other, each of their tasks exactly once; a thread takes the next one when it is
    done with its last.

    The calling thread has the first `scratch_size` bytes of a phase's scratch, each of the other threads the like.
    Before a phase that `asks` the caller does, unless `ask` is NULL: the rest is left undone if the answer is yes."""
    cdef long p, widest = 0
    cdef Phase *phase
    for p in range(count):
        widest = max(widest, phases[p].tasks - phases[p].next)
    threads = <int>min(<long>min(threads, allowed()), widest)
    for p in range(count):
        phase = &phases[p]
        if phase.asks and ask != NULL and ask(asked):
            return
        while phase.next < phase.tasks:
            if (threads > 1 and (phase.next + 1 < phase.tasks or p + 1 < count)
                    and not load(&taken) and not swap(&taken, 1)):
                post(phase, count - p, threads - 1, ask, asked)
                return
            phase.task(phase.job, phase.next, phase.scratch)
            phase.next += 1


cdef void post(Phase *phases, long count, int helpers, Ask ask, void *asked) noexcept nogil:
    """Run what is left with helpers. The board is the caller's."""
    global board
    cdef long p
    for p in range(count):
        phases[p].behind, phases[p].left = 0, phases[p].tasks - phases[p].next
    phases.done = phases.next
    board.phases, board.count, board.helpers, board.stop, board.sleepers = phases, count, helpers, 0, 0
    if have_leader() and swap(&state, POSTED) == ASLEEP:
        keep_off(leader)
        wake(&posted)
    take_tasks(phases, count, 0, ask, asked)
    if leading and not move(&state, POSTED, IDLE):
        await_state(RUNNING, AWAITED, &done)
    swap(&taken, 0)


cdef int threads_for(double work) noexcept:
    """How many threads may share a run of so much work, in floating-point operations of a convolution.

    0 is one that keeps the GIL: of a run that is so short, many callers would spend more on passing it to and fro.
    To wake the leader takes several microseconds. A short run is worth that only if others like it follow closely, so
    that the leader stays awake; if one went before, others are expected."""
    global last_short
    cdef long before = last_short
    cdef int most = allowed()
    if work < SERIAL_WORK:
        return 0
    if work >= SLEEPY_WORK or most == 1:
        return most
    last_short = nanoseconds()
    return most if last_short - before < SPIN_NS else 1


def use_threads(int count):
    """Let a run use so many threads from now on."""
    global wanted
    wanted = count


def limit() -> int:
    """The limit of the calling thread; 0 is none."""
    return get_limit()


def use_limit(int count):
    """Let a run of the calling thread use at most so many threads from now on; 0 is no limit."""
    set_limit(count)
