"""The children of a benchmark: one small program per runtime, each in a process of its own.

`python -m duolocal.bench.runners.<name>` answers JSON lines (see `serve`) and waits idle in between. A runner imports
its own runtime and nothing of the others, so that its peak memory is that of the runtime.
"""
