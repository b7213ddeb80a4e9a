"""The GPU suite: correctness on the device, then kernels, decode and prefill beside what the device can do.

`suite.py` runs one child process per section (`child.py`) and writes one JSON; `measure.py` is what a section
measures with, `sizes.py` how large everything is, `floors.py` what the figures are compared with. The sections:
`device.py`, `correctness.py`, `products.py`, `decode_kernels.py`, `prefill_kernels.py`, `pointwise.py`, `decode.py`,
`selected.py`, `prefill.py`, `capped.py`, `sweep.py`. Importing the package loads neither torch nor triton.
"""
