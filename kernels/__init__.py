"""Floor 1: the operations on tensors, a plain-torch reference that judges every faster path, and compiled CPU kernels.

Knows nothing of models, caches or files. `interface.py` is what a model asks for; `torch_kernels.py` answers with
`attention.py` (attention), `blocks.py` (the bytes of a KV block) and `pointwise.py`; `cpu/` holds the compiled path.
`matrix.py` is how a weight shows its bytes to a kernel.
"""
