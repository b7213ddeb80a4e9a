"""Model files for tests: tiny GGUF files, AWQ layers packed from plain numbers, and changes to files on disk.

GGUF files are written by the `gguf` package from transformers' tensors, with the row order of llama.cpp's
converter; AWQ is packed by loops written from the layout alone, so both stay independent of the readers.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GGMLType

_SUFFIXES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_tensor_name(name: str) -> str:
    """Translate a transformers tensor name."""
    module, ending = name.rsplit(".", 1)
    if module in _OUTER:
        return f"{_OUTER[module]}.{ending}"
    _, _, layer, suffix = module.split(".", 3)
    return f"blk.{layer}.{_SUFFIXES[suffix]}.{ending}"


def interleave_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Permute Q or K rows as llama.cpp's converter does for the architecture llama."""
    split = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: Any,
    architecture: str,
    *,
    kind: GGMLType = GGMLType.F32,
    keys: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    drop: tuple[str, ...] = (),
    part: tuple[int, int, int] | None = None,
) -> None:
    """Write a transformers model as GGUF, matrices in `kind`; `keys` replaces or adds (None removes) own keys.

    `keys` are named without the architecture; `extra` adds float32 tensors, `drop` leaves tensors out. part: which of
    how many parts this is, from 0, and the tensors of all.
    """
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.dimension_count": head_dim,
        "vocab_size": config.vocab_size,
    } | (keys or {})
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(f"{architecture}.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"{architecture}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"{architecture}.{key}", value)
        elif isinstance(value, list):
            writer.add_array(f"{architecture}.{key}", value)
    writer.add_array("tokenizer.ggml.tokens", [f"<{i}>é" for i in range(config.vocab_size)])
    writer.add_array("tokenizer.ggml.token_type", [1] * config.vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if part is not None:
        writer.add_uint16("split.no", part[0])
        writer.add_uint16("split.count", part[1])
        writer.add_int32("split.tensors.count", part[2])
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name in drop or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        array = tensor.float().numpy()
        part = name.split(".")[-2]
        if architecture == "llama" and part in heads:
            array = interleave_rows(array, heads[part])
        if array.ndim == 2 and kind != GGMLType.F32:
            writer.add_tensor(gguf_tensor_name(name), gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_tensor_name(name), np.ascontiguousarray(array))
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_CHANNEL_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_awq(codes: np.ndarray) -> torch.Tensor:
    """Pack codes [n, out], 0 … 15, as int32 [n, out / 8], one number at a time."""
    n, out = codes.shape
    packed = np.zeros((n, out // 8), dtype=np.uint32)
    for row in range(n):
        for column in range(out // 8):
            for i, channel in enumerate(_CHANNEL_OF_NIBBLE):
                packed[row, column] |= np.uint32(int(codes[row, 8 * column + channel]) << (4 * i))
    return torch.from_numpy(packed.view(np.int32))


def random_awq(
    seed: int, in_features: int, out_features: int, group: int
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Return packed random tensors and the float32 matrix [out, in] they stand for, made by a plain loop."""
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 16, (in_features, out_features))
    z = rng.integers(0, 16, (in_features // group, out_features))
    s = rng.uniform(0.001, 0.1, (in_features // group, out_features)).astype(np.float16)
    dense = np.empty((out_features, in_features), dtype=np.float32)
    for i in range(in_features):
        for o in range(out_features):
            dense[o, i] = np.float32(q[i, o] - z[i // group, o]) * np.float32(s[i // group, o])
    parts = {"qweight": pack_awq(q), "qzeros": pack_awq(z), "scales": torch.from_numpy(s)}
    return parts, dense
