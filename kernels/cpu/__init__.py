"""The compiled CPU kernels: C in `source/`, built once per machine, run by threads that share each operation.

`build.py` makes the library, `structs.py` mirrors its structures, `pool.py` and `threads.py` own the threads,
`operations.py` and `attention.py` have one checked function per operation. Everything computes in float32.
"""
