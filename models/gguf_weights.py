"""The weights of a GGUF file as the tensors a ModelConfig asks for.

Owns GGUF's tensor names and the order of query and key rows. Files of the architecture llama hold those rows
permuted for RoPE over neighbouring pairs (2i, 2i + 1); ours rotates halves (i, i + head_dim / 2), so the rows are
put back, as raw bytes. Files of qwen2 and qwen3 are not permuted.
"""

import mmap
import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from duolocal.errors import ModelFileError
from duolocal.models.assemble import Role, roles
from duolocal.models.config import ModelConfig, label, shown
from duolocal.models.gguf import GGUFFile, GGUFTensor
from duolocal.models.gguf_config import config_from_gguf
from duolocal.quant.gguf import GGUFWeight
from duolocal.quant.weight import DenseWeight, Weight

_OUTER_NAMES = {"embedding": "token_embd", "norm": "output_norm", "lm_head": "output"}
_LAYER_NAMES = {
    "attention_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
_ROPE_FREQS = "rope_freqs.weight"  # read into the config
_MAX_ROPE_FREQS_BYTES = 1 << 14
_UNUSED = re.compile(r"blk\.\d+\.attn_rot_embd(\.weight)?")  # rotary tables in old files
_DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def gguf_name(role: Role) -> str:
    """Return the name that GGUF gives to `role`."""
    name, _, ending = role.name.partition(".")
    if role.layer is None:
        return f"{_OUTER_NAMES[name]}.{ending}"
    return f"blk.{role.layer}.{_LAYER_NAMES[name]}.{ending}"


def read_config(file: GGUFFile) -> ModelConfig:
    """Return the ModelConfig of an opened file; raise ModelFileError or ConfigError where it has none."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelFileError(f"{file.path}: tensor token_embd.weight is missing: this is no language model")
    factors = None
    if _ROPE_FREQS in file.tensors:
        if file.tensors[_ROPE_FREQS].nbytes > _MAX_ROPE_FREQS_BYTES:
            raise ModelFileError(
                f"{file.path}: tensor {_ROPE_FREQS} has {file.tensors[_ROPE_FREQS].nbytes} bytes, wanted at most "
                f"{_MAX_ROPE_FREQS_BYTES}; the file is damaged"
            )
        factors = tuple(_vector(file, file.tensors[_ROPE_FREQS]).tolist())
    return config_from_gguf(
        file.metadata,
        str(file.path),
        vocab_size=embedding.shape[0],
        tensor_names=file.tensors.keys(),
        rope_freq_factors=factors,
    )


def main_format(file: GGUFFile) -> str:
    """Return the type that holds most bytes of the layers' matrices: the name people know the file by."""
    sizes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            sizes[tensor.type.name] += tensor.nbytes
    return sizes.most_common(1)[0][0] if sizes else "F32"


@dataclass(frozen=True)
class GGUFWeights:
    """A TensorSource over an opened GGUF file; its tensor table has been checked against `config`."""

    file: GGUFFile
    config: ModelConfig

    def __post_init__(self) -> None:
        wanted = {}
        for role in roles(self.config):
            name = gguf_name(role)
            wanted[name] = role
            tensor = self.file.tensors.get(name)
            if tensor is None:
                raise ModelFileError(
                    f"{self.file.path}: tensor {name} is missing, wanted shape {list(role.shape)}; "
                    "the file is incomplete: download it again"
                )
            if tensor.shape != role.shape:
                raise ModelFileError(
                    f"{self.file.path}: tensor {name} has shape {shown(list(tensor.shape))}, wanted "
                    f"{list(role.shape)} from the file's own keys; the file is damaged"
                )
        for name in self.file.tensors:
            if name not in wanted and name != _ROPE_FREQS and not _UNUSED.fullmatch(name):
                raise ModelFileError(
                    f"{self.file.path}: tensor {label(name)} belongs to no {self.config.architecture} model that "
                    "duolocal knows; choose another file of this model"
                )

    def weight(self, role: Role, device: torch.device) -> Weight:
        """Return a matrix in its own bits; on the CPU a view of the file, rows of llama's Q and K excepted."""
        tensor = self.file.tensors[gguf_name(role)]
        raw = self.file.raw(tensor)
        order = self._row_order(role)
        if order is not None:
            raw = raw[order]
        raw = raw.to(device)
        if tensor.type.name in _DENSE:
            return DenseWeight(_as_dense(raw, tensor))
        return GGUFWeight(raw, tensor.type, tensor.shape[1])

    def vector(self, role: Role, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return a norm weight or a bias in `dtype` on `device`."""
        values = _vector(self.file, self.file.tensors[gguf_name(role)])
        order = self._row_order(role)
        if order is not None:
            values = values[order]
        return values.to(device=device, dtype=dtype, copy=True)

    def dense_bytes(self, role: Role) -> int | None:
        """Return the bytes of a tensor in the file, None where it is quantized."""
        tensor = self.file.tensors[gguf_name(role)]
        return tensor.nbytes if tensor.type.name in _DENSE else None

    def release(self, role: Role) -> None:
        """Give back the pages of the file that are in memory; they are read again where something still uses them."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for part in self.file.parts:
                part.data.madvise(mmap.MADV_DONTNEED)  # nothing has been written: no page of ours is lost

    def _row_order(self, role: Role) -> Tensor | None:
        if self.config.architecture != "llama":
            return None
        heads = {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}.get(role.name.split(".")[0])
        return None if heads is None else half_split_order(heads, self.config.head_dim)


def half_split_order(num_heads: int, head_dim: int) -> Tensor:
    """Return [num_heads * head_dim] int64: which row of an interleaved Q or K belongs at each half-split row."""
    rows = torch.arange(num_heads * head_dim).view(num_heads, head_dim // 2, 2)
    return rows.transpose(1, 2).reshape(-1)


def _vector(file: GGUFFile, tensor: GGUFTensor) -> Tensor:
    """Return a one-dimensional tensor as float32."""
    if len(tensor.shape) != 1:
        raise ModelFileError(
            f"{file.path}: tensor {label(tensor.name)} has shape {shown(list(tensor.shape))}, wanted one dimension"
        )
    return GGUFWeight(file.raw(tensor), tensor.type, tensor.shape[0]).dequantize(torch.float32)[0]


def _as_dense(raw: Tensor, tensor: GGUFTensor) -> Tensor:
    dtype = _DENSE[tensor.type.name]
    if raw.data_ptr() % dtype.itemsize:  # a file with an alignment below 4
        raw = raw.clone()
    return raw.view(dtype)
