"""The compiled CPU kernels: C in `source/`, built once per machine, run by threads that share each operation.

`build.py` makes the library, `library.py` is its interface in ctypes, `pool.py` owns the threads, `operations.py`
has one checked function per operation. Everything computes in float32.
"""
