"""Triton kernels for one NVIDIA GPU (sm_80 and newer), behind the same operations as the torch reference.

`operations.py` answers what a model asks of its kernels: `linear.py` with `linear_vector.py`, `linear_rows.py` and
`dequantize.py`, and `pointwise.py`. What a cache asks stands beside it, one layer at a time (`layer_cache.py`): a
decode step is `append.py` (RoPE, ring, blocks), then `decode.py` with `decode_blocks.py` and `decode_merge.py`; a
prefill chunk is `store.py` and `prefill.py`, which reads blocks with `library_attention.py` or `fused_attention.py`.
`planes.py` knows the codes of a block as numbers.

Importing any of them imports triton; without a GPU they run under TRITON_INTERPRET=1, set before that import.
"""
