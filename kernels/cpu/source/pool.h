// Threads that run a list of operations together, with a barrier after each; the threads themselves are Python's.
//
// A worker enters `duo_worker` and stays, spinning, while there is work; after a while without any it returns, and
// its Python thread waits on a semaphore. `duo_claim` announces work and says who must be woken.
#pragma once
#include "simd.h"

#define MAX_THREADS 256
#define CACHE_LINE 128

typedef struct pool pool;
typedef void (*operation)(const void *args, pool *p, int64_t thread);
typedef struct {
  operation run;
  const void *args;
} op;

struct pool {
  int64_t num_threads;
  void (*yield)(void);    // gives the core to another thread; may be null
  int64_t linger;         // turns of waiting before a worker goes to sleep
  int64_t *times;         // null, or [num_ops + 1] ticks at the start and after each operation
  const op *ops;
  int64_t num_ops;
  _Alignas(CACHE_LINE) int64_t generation;  // programs started so far
  _Alignas(CACHE_LINE) int64_t busy;
  int64_t stop;
  _Alignas(CACHE_LINE) int64_t arrived;
  _Alignas(CACHE_LINE) int64_t epoch;       // barriers passed
  _Alignas(CACHE_LINE) int64_t next;        // the next item of the running operation
  _Alignas(CACHE_LINE) int64_t asleep[MAX_THREADS];
};

INLINE void pause_core(pool *p, int64_t turn) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
  if (turn > 4000 && (turn & 31) == 0 && p->yield) p->yield();
}

INLINE int64_t ticks(void) {
#if defined(__aarch64__)
  int64_t now;
  __asm__ volatile("mrs %0, cntvct_el0" : "=r"(now));
  return now;
#else
  return (int64_t)__builtin_readcyclecounter();
#endif
}

static void barrier(pool *p) {
  int64_t epoch = __atomic_load_n(&p->epoch, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&p->arrived, 1, __ATOMIC_ACQ_REL) == p->num_threads) {
    p->arrived = 0;
    p->next = 0;
    __atomic_store_n(&p->epoch, epoch + 1, __ATOMIC_RELEASE);
    return;
  }
  for (int64_t turn = 0; __atomic_load_n(&p->epoch, __ATOMIC_ACQUIRE) == epoch; turn++) pause_core(p, turn);
}

// Items of an operation go to whichever thread comes first: one slow core does not hold up the others.
INLINE int64_t next_item(pool *p) { return __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED); }

static void execute(pool *p, int64_t thread) {
  const op *ops = p->ops;
  int64_t num_ops = p->num_ops, *times = thread == 0 ? p->times : 0;
  if (times) times[0] = ticks();
  for (int64_t i = 0; i < num_ops; i++) {
    ops[i].run(ops[i].args, p, thread);
    barrier(p);
    if (times) times[i + 1] = ticks();
  }
}

// Announce work; return how many workers sleep. Each of them must be let into `duo_worker` before or during `duo_run`.
int64_t duo_claim(pool *p) {
  __atomic_store_n(&p->busy, 1, __ATOMIC_SEQ_CST);
  int64_t sleeping = 0;
  for (int64_t t = 1; t < p->num_threads; t++) sleeping += __atomic_load_n(&p->asleep[t], __ATOMIC_SEQ_CST);
  return sleeping;
}

void duo_run(pool *p, const op *ops, int64_t num_ops) {
  p->ops = ops;
  p->num_ops = num_ops;
  __atomic_add_fetch(&p->generation, 1, __ATOMIC_SEQ_CST);
  execute(p, 0);
  __atomic_store_n(&p->busy, 0, __ATOMIC_SEQ_CST);
}

// Run programs until there has been nothing to do for a while; `seen` programs are known. Returns how many are now
// known, or -1 when the pool ends.
int64_t duo_worker(pool *p, int64_t thread, int64_t seen) {
  __atomic_store_n(&p->asleep[thread], 0, __ATOMIC_SEQ_CST);
  for (int64_t turn = 0;;) {
    if (__atomic_load_n(&p->stop, __ATOMIC_ACQUIRE)) return -1;
    if (__atomic_load_n(&p->generation, __ATOMIC_ACQUIRE) != seen) {
      seen++;
      execute(p, thread);
      turn = 0;
      continue;
    }
    pause_core(p, turn);
    if (++turn < p->linger) continue;
    __atomic_store_n(&p->asleep[thread], 1, __ATOMIC_SEQ_CST);
    if (!__atomic_load_n(&p->busy, __ATOMIC_SEQ_CST)) return seen;
    __atomic_store_n(&p->asleep[thread], 0, __ATOMIC_SEQ_CST);
    turn = 0;
  }
}
