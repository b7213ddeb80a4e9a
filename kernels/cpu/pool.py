"""The threads that run compiled operations together. How they wait for each other stands in `source/pool.h`."""

import atexit
import ctypes
import os
import threading
from collections.abc import Sequence
from ctypes import byref, c_int64, c_void_p
from functools import cache

from duolocal.errors import KernelError
from duolocal.kernels.cpu.build import build, load
from duolocal.kernels.cpu.structs import MAX_THREADS, OPERATIONS, Op, Pool, check
from duolocal.kernels.cpu.threads import bind, bound, cpu_of

# Turns that a worker waits for more work before it sleeps: some milliseconds, what sampling a token takes.
_LINGER = 60_000


class ThreadPool:
    """`num_threads` threads, the caller being the first, each bound to its own core.

    Invariant: one program runs at a time. A worker is inside the library or asleep on its semaphore.
    """

    def __init__(self, library: ctypes.CDLL, num_threads: int) -> None:
        assert 1 <= num_threads <= MAX_THREADS, num_threads
        check(library)
        library.duo_operation.restype = c_void_p
        library.duo_claim.restype = library.duo_worker.restype = library.duo_ticks.restype = c_int64
        library.duo_claim.argtypes = (c_void_p,)
        library.duo_run.argtypes = (c_void_p, c_void_p, c_int64)
        library.duo_run.restype = None
        library.duo_worker.argtypes = (c_void_p, c_int64, c_int64)
        self.num_threads = num_threads
        self.functions = {name: library.duo_operation(c_int64(i)) for i, name in enumerate(OPERATIONS)}
        self._library = library
        self._storage = ctypes.create_string_buffer(ctypes.sizeof(Pool) + 128)
        aligned = -(-ctypes.addressof(self._storage) // 128) * 128
        self._pool = Pool.from_address(aligned)
        self._address = aligned
        self._pool.num_threads = num_threads
        self._pool.linger = _LINGER
        self._pool.yield_ = _yield_function()
        self._lock = threading.Lock()
        self._wake = [threading.Semaphore(0) for _ in range(num_threads)]
        self._threads = [
            threading.Thread(target=self._work, args=(number,), name=f"duolocal-{number}", daemon=True)
            for number in range(1, num_threads)
        ]
        for number, thread in enumerate(self._threads, 1):
            self._pool.asleep[number] = 1
            thread.start()
        self._caller_cpu = cpu_of(0)
        self._process = os.getpid()

    def run(self, ops: ctypes.Array, count: int, *, times: ctypes.Array | None = None) -> None:
        """Run the first `count` operations of an array of `Op`, each by all threads.

        times: [count + 1] int64 for the clock's ticks at the start and after every operation. Raises KernelError in a
        forked child, where the other threads do not exist.
        """
        if os.getpid() != self._process:
            raise KernelError("the kernels' threads did not survive fork(): load the engine in the child process")
        assert not self._pool.stop, "the pool is closed"
        with self._lock, bound(self._caller_cpu):
            self._pool.times = None if times is None else ctypes.addressof(times)
            try:
                if self._library.duo_claim(self._address):
                    for number in range(1, self.num_threads):
                        if self._pool.asleep[number]:
                            self._wake[number].release()
                self._library.duo_run(self._address, byref(ops), count)
            except BaseException:  # Ctrl-C before the start: the workers may sleep again
                self._pool.busy = 0
                raise

    def timed(self, ops: ctypes.Array, count: int) -> Sequence[int]:
        """Run like `run` and return the ticks of the clock before the first and after every operation."""
        times = (c_int64 * (count + 1))()
        self.run(ops, count, times=times)
        return list(times)

    def ticks(self) -> int:
        """Read the clock of `timed`."""
        return self._library.duo_ticks()

    def close(self) -> None:
        """End the workers."""
        self._pool.stop = 1
        for semaphore in self._wake:
            semaphore.release()
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _work(self, number: int) -> None:
        bind(number)
        seen = 0
        while seen >= 0:
            seen = self._library.duo_worker(self._address, number, seen)
            if seen >= 0:
                self._wake[number].acquire()


def thread_pool(num_threads: int) -> ThreadPool:
    """Return the process's pool of that many threads; raises KernelError where the kernels cannot be built."""
    return _pool_of(num_threads, os.getpid())


@cache
def _pool_of(num_threads: int, _process: int) -> ThreadPool:
    pool = ThreadPool(load(build()), num_threads)
    atexit.register(pool.close)
    return pool


def _yield_function() -> int | None:
    try:
        return ctypes.cast(ctypes.CDLL(None).sched_yield, c_void_p).value
    except (AttributeError, OSError):
        return None


def program(pool: ThreadPool, calls: Sequence[tuple[str, ctypes.Structure]]) -> ctypes.Array:
    """Return the array of `Op` for (operation, arguments) pairs; the caller keeps the arguments alive."""
    return (Op * len(calls))(*(Op(pool.functions[name], ctypes.addressof(args)) for name, args in calls))
