"""Damaged and hostile model files: each must be refused in one line or load whole, in bounded time and memory.

`python -m tests.fuzz [--count 1000] [--seed 0] [--target gguf …]` makes seeded files, reads each in a process of its
own under limits of memory and time, prints one line per target, and keeps the files that failed.
"""
