"""Floor 1: the operations on tensors, as a plain-torch reference that every faster path is judged by.

Knows nothing of models, caches or files. Attention is in `attention.py`, the bytes of a KV block in `blocks.py`,
the elementwise operations in `pointwise.py`.
"""
