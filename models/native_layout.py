"""How a matrix of any kind is kept in a native file: as which tensors, and back.

A matrix is one to four tensors named `ROLE:PART`; which parts there are says what kind of weight they make:

    (none)                                        F32, F16 or BF16 [rows, columns]
    Q4_1 (or another GGUF type)                   uint8 [rows, row_bytes], as in a GGUF file
    qweight, qzeros, scales                       AWQ, as in AutoAWQ's GEMM layout
    Q4_1.codes, .scales, .minima                  planes for a GPU (`GroupedMatrix`) of a GGUF type;
                                                  Q4_0 and Q8_0 have no minima
    AWQ.codes, .scales, .zeros                    planes of an AWQ weight
    nf4.rows, int8.rows                           uint8 [rows, row_bytes] as the CPU kernels read bitsandbytes' kinds
    nf4.codes, .absmax; int8.codes, .absmax       the same as bitsandbytes has them

Owns these names, shapes and dtypes. What the numbers mean stands in `duolocal.quant`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from duolocal.errors import ModelFileError
from duolocal.kernels.matrix import GROUPED_RUN, GroupedMatrix
from duolocal.quant.awq import AWQWeight
from duolocal.quant.bitsandbytes import BLOCK_SIZE, InRows, Int8Weight, NF4Weight
from duolocal.quant.gguf import GGUF_TYPES, GGUFType, GGUFWeight
from duolocal.quant.grouped import GroupedWeight
from duolocal.quant.weight import DenseWeight, Weight

SEPARATOR = ":"
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_FLOATS = ("F32", "F16", "BF16")
_PLANES = {"Q4_0": (4, 8), "Q4_1": (4, 0), "Q8_0": (8, 128), "AWQ": (4, 0)}  # bits, zero

Shape = tuple[int, ...]
Wanted = Mapping[str, tuple[tuple[str, ...], Shape]]  # part -> dtypes it may have, shape


@dataclass(frozen=True)
class Kind:
    """One way of keeping a matrix.

    `wanted` gives dtype and shape of every part from (rows, columns, groups), None where the matrix has no such form;
    groups is the size of the dimension `groups_dim` of the part `scales`, 0 where there are none.
    """

    parts: tuple[str, ...]
    wanted: Callable[[int, int, int], Wanted | None]
    build: Callable[[Mapping[str, Tensor], int], Weight]  # from parts and columns
    scales: str | None = None
    groups_dim: int = 0


def parts_of(weight: Weight) -> dict[str, Tensor]:
    """Return the tensors that `weight` is kept as, by part. Raises ModelFileError for a kind that has no form here."""
    if isinstance(weight, DenseWeight):
        return {"": weight.tensor}
    if isinstance(weight, GGUFWeight):
        return {weight.type.name: weight.raw}
    if isinstance(weight, AWQWeight):
        return {"qweight": weight.qweight, "qzeros": weight.qzeros, "scales": weight.scales}
    if isinstance(weight, GroupedWeight):
        matrix = weight.matrix
        name = "AWQ" if matrix.zeros is not None else weight.format
        planes = {"codes": matrix.codes, "scales": matrix.scales, "zeros": matrix.zeros, "minima": matrix.minima}
        return {f"{name}.{part}": plane for part, plane in planes.items() if plane is not None}
    if isinstance(weight, InRows):
        return {f"{weight.kind}.rows": weight.raw}
    if isinstance(weight, NF4Weight | Int8Weight):
        return {f"{weight.format}.codes": weight.codes, f"{weight.format}.absmax": weight.absmax}
    raise ModelFileError(f"weights in {weight.format} have no form in the native format")


def find_kind(found: Mapping[str, Shape], rows: int, columns: int, where: str) -> tuple[Kind, Wanted]:
    """Return what kind of matrix the parts `found` (with their shapes) make, and what each part must be.

    Raises ModelFileError, beginning with `where`, where they make none.
    """
    kind = _KINDS.get(frozenset(found))
    if kind is None:
        seen = ", ".join(sorted(part or "(whole)" for part in found)[:6]) or "nothing"
        raise ModelFileError(f"{where} consists of {seen[:120]}, which is no kind of weight that duolocal knows")
    groups = 0
    if kind.scales is not None:
        shape = found[kind.scales]
        groups = shape[kind.groups_dim] if len(shape) == 2 else 0
        if groups < 1 or columns % groups:
            raise ModelFileError(f"{where} has {groups} groups of scales for {columns} columns, wanted a divisor")
    wanted = kind.wanted(rows, columns, groups)
    if wanted is None:
        raise ModelFileError(f"{where} is {rows} x {columns}, which its format cannot hold")
    return kind, wanted


def _dense(rows: int, columns: int, _: int) -> Wanted:
    return {"": (_FLOATS, (rows, columns))}


def _gguf(kind: GGUFType) -> Kind:
    def wanted(rows: int, columns: int, _: int) -> Wanted | None:
        if columns % kind.block_size:
            return None
        return {kind.name: (("U8",), (rows, kind.row_bytes(columns)))}

    return Kind((kind.name,), wanted, lambda parts, columns: GGUFWeight(parts[kind.name], kind, columns))


def _awq_wanted(rows: int, columns: int, groups: int) -> Wanted | None:
    if rows % 8:
        return None
    return {
        "qweight": (("I32",), (columns, rows // 8)),
        "qzeros": (("I32",), (groups, rows // 8)),
        "scales": (("F16",), (groups, rows)),
    }


def _planes(name: str) -> Kind:
    bits, zero = _PLANES[name]
    offsets = {"Q4_1": "minima", "AWQ": "zeros"}.get(name)

    def wanted(rows: int, columns: int, groups: int) -> Wanted | None:
        group_size = columns // groups
        if group_size % GROUPED_RUN or (name != "AWQ" and group_size != GROUPED_RUN) or (name == "AWQ" and rows % 8):
            return None
        shapes: dict[str, tuple[tuple[str, ...], Shape]] = {
            f"{name}.codes": (("U8",), (rows, columns * bits // 8)),
            f"{name}.scales": (("F16",), (rows, groups)),
        }
        if offsets is not None:
            shapes[f"{name}.{offsets}"] = (("U8",) if offsets == "zeros" else ("F16",), (rows, groups))
        return shapes

    def build(parts: Mapping[str, Tensor], columns: int) -> Weight:
        scales = parts[f"{name}.scales"]
        matrix = GroupedMatrix(
            codes=parts[f"{name}.codes"],
            scales=scales,
            bits=bits,
            zero=zero,
            zeros=parts.get(f"{name}.zeros"),
            minima=parts.get(f"{name}.minima"),
        )
        return GroupedWeight(matrix, f"awq-int4-g{columns // scales.shape[1]}" if name == "AWQ" else name)

    names = tuple(f"{name}.{part}" for part in ("codes", "scales", *((offsets,) if offsets else ())))
    return Kind(names, wanted, build, scales=f"{name}.scales", groups_dim=1)


def _nf4_rows(rows: int, columns: int, _: int) -> Wanted | None:
    if columns % BLOCK_SIZE:
        return None
    return {"nf4.rows": (("U8",), (rows, columns // BLOCK_SIZE * (4 + BLOCK_SIZE // 2)))}


def _nf4(rows: int, columns: int, _: int) -> Wanted | None:
    if columns % BLOCK_SIZE:
        return None
    return {"nf4.codes": (("U8",), (rows, columns // 2)), "nf4.absmax": (("F32",), (rows, columns // BLOCK_SIZE))}


def _int8(rows: int, columns: int, _: int) -> Wanted:
    return {"int8.codes": (("I8",), (rows, columns)), "int8.absmax": (("F32",), (rows,))}


_ALL = (
    Kind(("",), _dense, lambda parts, _: DenseWeight(parts[""])),
    *(_gguf(kind) for kind in GGUF_TYPES.values() if kind.name not in _FLOATS),
    Kind(
        ("qweight", "qzeros", "scales"),
        _awq_wanted,
        lambda parts, _: AWQWeight(parts["qweight"], parts["qzeros"], parts["scales"]),
        scales="scales",
    ),
    *(_planes(name) for name in _PLANES),
    Kind(("nf4.rows",), _nf4_rows, lambda parts, columns: InRows(parts["nf4.rows"], "nf4", columns)),
    Kind(
        ("int8.rows",),
        lambda rows, columns, _: {"int8.rows": (("U8",), (rows, 4 + columns))},
        lambda parts, columns: InRows(parts["int8.rows"], "int8", columns),
    ),
    Kind(("nf4.codes", "nf4.absmax"), _nf4, lambda parts, _: NF4Weight(parts["nf4.codes"], parts["nf4.absmax"])),
    Kind(("int8.codes", "int8.absmax"), _int8, lambda parts, _: Int8Weight(parts["int8.codes"], parts["int8.absmax"])),
)
_KINDS = {frozenset(kind.parts): kind for kind in _ALL}
