"""The bytes of a model's weights: exact from the tables of its file, or by arithmetic for a model that is not here.

Owns sizes only; nothing is read but headers. A matrix has a size in the file and one where it is loaded: on a GPU some
formats are regrouped in planes (`quant/grouped.py`), where AWQ's zero points take a byte each.
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch

from duolocal.errors import SettingsError
from duolocal.kernels.matrix import GROUPED_RUN
from duolocal.models.assemble import Role, roles
from duolocal.models.config import ModelConfig
from duolocal.models.gguf_weights import GGUFWeights, gguf_name
from duolocal.models.loader import ModelSource
from duolocal.models.outer_weights import ROW_FORMATS, OuterQuantized
from duolocal.models.quantized import QuantizedOnLoad
from duolocal.models.safetensors_folder import FolderWeights
from duolocal.quant.bitsandbytes import quantized_bytes, quantizes
from duolocal.quant.gguf import GGUF_TYPES

_GGUF = {kind.name: kind for kind in GGUF_TYPES.values()}
_DENSE = {"F32": 4, "F16": 2, "BF16": 2}
AWQ_GROUP = 128  # input features that share a scale, of the AWQ models that have a name

# How the matrices of models with a name are kept: those of the layers, and embedding and lm_head.
NAMED_FORMATS: Mapping[str, tuple[str, str]] = {
    "qwen2.5-coder-1.5b": ("Q4_K", "Q6_K"),
    "smollm2-135m": ("Q4_1", "Q8_0"),
    "llama3-8b-awq": ("AWQ", "F16"),
    "llama3.1-8b-awq": ("AWQ", "F16"),
    **dict.fromkeys(("llama3-8b-1m", "llama3.2-1b", "llama3.2-3b"), ("BF16", "BF16")),
    **dict.fromkeys(("qwen3-0.6b", "qwen3-4b", "smollm2-1.7b"), ("BF16", "BF16")),
}


@dataclass(frozen=True)
class MatrixSize:
    """One matrix [rows, columns]: its format ("Q4_1", "AWQ", "BF16", "NF4" …) and its bytes in the file."""

    rows: int
    columns: int
    format: str
    nbytes: int
    in_layer: bool
    is_embedding: bool = False
    group: int = AWQ_GROUP  # of AWQ

    @property
    def elements(self) -> int:
        return self.rows * self.columns

    def loaded(self, kernels: str, itemsize: int) -> int:
        """Return the bytes once it is loaded for `kernels` that compute in numbers of `itemsize` bytes."""
        if kernels != "triton":
            return self.nbytes
        if self.format in _DENSE:
            return self.elements * itemsize
        if self.format == "AWQ" and self.group % GROUPED_RUN == 0:
            return self.elements // 2 + self.elements // self.group * 3
        return self.nbytes


@dataclass(frozen=True)
class Weights:
    """What the weights of a model take where they are loaded.

    nbytes: matrices, and on a CPU the rest of the file, which is mapped with them. copies: norms and biases, and on a
    CPU rows that cannot be used where they lie, and the keys of a file. layer_bytes, outer_bytes (embedding and
    lm_head), output_bytes (lm_head): of matrices. host_bytes: of an embedding beside a GPU, which is in none of the
    others: where it is not lm_head too, it is read by rows and stays in host memory. exact: from a file; else by
    arithmetic.
    """

    nbytes: int
    copies: int
    layer_bytes: int
    outer_bytes: int
    output_bytes: int
    layer_elements: int
    layer_format: str
    outer_format: str
    exact: bool
    host_bytes: int = 0


def weights_of_size(nbytes: int) -> Weights:
    """Return weights of which nothing is known but their size."""
    return Weights(nbytes, 0, nbytes, 0, 0, 0, "", "", exact=False)


def weights_of(source: ModelSource, *, kernels: str, dtype: torch.dtype, device: str = "cpu") -> Weights:
    """Return the sizes of an opened model, as `--weights` and `--outer-weights` have changed it."""
    tensors = source.tensors
    sizes = list(_sizes(source.config, tensors))
    copied = 0
    if isinstance(tensors, OuterQuantized):
        tensors = tensors.source
    if device == "cpu" and isinstance(tensors, GGUFWeights):
        copied = sum(
            tensors.file.tensors[gguf_name(role)].nbytes
            for role in roles(source.config)
            if len(role.shape) == 2 and tensors._row_order(role) is not None
        )
    if device == "cpu":
        copied += sum(_python_bytes(value) for value in source.metadata.values() if isinstance(value, list))
    whole_file = source.size_bytes if device == "cpu" else None
    return _sum(
        source.config,
        sizes,
        kernels=kernels,
        dtype=dtype,
        device=device,
        copied=copied,
        file_bytes=whole_file,
        exact=True,
    )


def weights_by_arithmetic(
    config: ModelConfig,
    *,
    layers: str,
    outer: str,
    kernels: str,
    dtype: torch.dtype,
    device: str = "cpu",
    weights: str = "auto",
    outer_weights: str = "auto",
    group: int = AWQ_GROUP,
) -> Weights:
    """Return the sizes of a model that is not here, its layers' matrices in format `layers`, the others in `outer`.

    weights, outer_weights: as `--weights` and `--outer-weights`. Raises SettingsError where those cannot be applied.
    """
    if weights != "auto" and layers not in _DENSE:
        raise SettingsError(
            f"--weights {weights} makes {weights} of 16-bit weights, and this model is {layers} already: leave it out"
        )
    sizes = []
    for role in roles(config):
        if len(role.shape) != 2:
            continue
        rows, columns = role.shape
        inside = role.layer is not None
        name = layers if inside else outer
        if inside and weights != "auto" and quantizes(columns):
            size = MatrixSize(rows, columns, weights.upper(), quantized_bytes(weights, rows, columns), True)  # type: ignore[arg-type]
        else:
            size = _matrix(role, name, _file_bytes(name, rows, columns, group), group)
            if not inside and outer_weights != "auto":
                smaller = _file_bytes(ROW_FORMATS[outer_weights], rows, columns, group)
                if smaller < size.nbytes:
                    size = _matrix(role, ROW_FORMATS[outer_weights], smaller, group)
        sizes.append(size)
    return _sum(config, sizes, kernels=kernels, dtype=dtype, device=device, copied=0, file_bytes=None, exact=False)


def _sizes(config: ModelConfig, tensors: object) -> Iterable[MatrixSize]:
    for role in roles(config):
        if len(role.shape) == 2:
            yield _size(role, tensors)


def _size(role: Role, tensors: object) -> MatrixSize:
    if isinstance(tensors, OuterQuantized):
        change = tensors.changes.get(role.name) if role.layer is None else None
        if change is not None:
            return _matrix(role, change.after, change.bytes_after)
        return _size(role, tensors.source)
    if isinstance(tensors, QuantizedOnLoad):
        rows, columns = role.shape
        if role.layer is not None and quantizes(columns):
            return _matrix(role, tensors.kind.upper(), quantized_bytes(tensors.kind, rows, columns))
        return _size(role, tensors.source)
    if isinstance(tensors, GGUFWeights):
        tensor = tensors.file.tensors[gguf_name(role)]
        return _matrix(role, tensor.type.name, tensor.nbytes)
    if isinstance(tensors, FolderWeights):
        dense = tensors.dense_bytes(role)
        if dense is not None:
            names = {4: "F32", 2: "BF16"}
            return _matrix(role, names.get(dense // prod(role.shape), "F32"), dense)
        assert tensors.settings is not None
        group = role.shape[1] if tensors.settings.group_size == -1 else tensors.settings.group_size
        return _matrix(role, "AWQ", _file_bytes("AWQ", role.shape[0], role.shape[1], group), group)
    # A native file keeps matrices as they are loaded; opening one is a view of the map.
    weight = tensors.weight(role, torch.device("cpu"))  # type: ignore[attr-defined]
    name = weight.format.upper()
    group = int(name.rpartition("-G")[2]) if name.startswith("AWQ") and "-G" in name else AWQ_GROUP
    return _matrix(role, "AWQ" if name.startswith("AWQ") else name, weight.nbytes, group)


def _matrix(role: Role, name: str, nbytes: int, group: int = AWQ_GROUP) -> MatrixSize:
    rows, columns = role.shape
    return MatrixSize(rows, columns, name, nbytes, role.layer is not None, role.name == "embedding.weight", group)


def _file_bytes(name: str, rows: int, columns: int, group: int) -> int:
    if name == "AWQ":
        if columns % group or rows % 8:
            raise SettingsError(f"a matrix of {rows} x {columns} cannot be AWQ with groups of {group}")
        return rows * columns // 2 + columns // group * (rows // 2 + 2 * rows)
    if name in _DENSE:
        return rows * columns * _DENSE[name]
    return rows * _GGUF[name].row_bytes(columns)


def _python_bytes(values: list[object]) -> int:
    """Return what a list of a file's key/values takes: a vocabulary is a hundred thousand strings."""
    return sum(map(sys.getsizeof, values)) + 8 * len(values)


def _sum(
    config: ModelConfig,
    sizes: list[MatrixSize],
    *,
    kernels: str,
    dtype: torch.dtype,
    device: str,
    copied: int,
    file_bytes: int | None,
    exact: bool,
) -> Weights:
    on_host = [size for size in sizes if size.is_embedding and device == "cuda" and not config.tie_embeddings]
    inside = sum(size.loaded(kernels, dtype.itemsize) for size in sizes if size.in_layer)
    outside = sum(size.loaded(kernels, dtype.itemsize) for size in sizes if not size.in_layer and size not in on_host)
    head = next(
        size for size in sizes if not size.in_layer and (config.tie_embeddings or not size.is_embedding)
    )  # lm_head
    vectors = sum(prod(role.shape) for role in roles(config) if len(role.shape) == 1) * dtype.itemsize
    largest = max((size for size in sizes if size.in_layer), key=lambda size: size.elements)
    return Weights(
        nbytes=inside + outside if file_bytes is None else file_bytes,
        copies=vectors + copied,
        layer_bytes=inside,
        outer_bytes=outside,
        output_bytes=head.loaded(kernels, dtype.itemsize),
        layer_elements=sum(size.elements for size in sizes if size.in_layer),
        layer_format=largest.format,
        outer_format=head.format,
        exact=exact,
        host_bytes=sum(size.nbytes for size in on_host),
    )
