"""Compile every GPU kernel ahead of time, for every architecture, as duolocal would launch it. No GPU is needed.

    python -m tests.aot [--matrix few|usual|all]

`record.py` runs the real Python operations and notes each launch in place of running it, `cases.py` says which
operations with which shapes, `build.py` compiles what was noted and reads the resources off the machine code, unless
`known.py` has them of an earlier run, and `limits.py` judges them. `toys.py` holds kernels that must be refused.

The process must not run under TRITON_INTERPRET: tests/test_aot.py starts a child without it.
"""
