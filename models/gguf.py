"""Reader of GGUF files, version 2 and 3, little endian (format: ggml's docs/gguf.md).

Owns the file: header, key/values and tensor table, every count, length and offset checked against the file before
use, and tensors as views of a memory map. What the keys mean belongs to `gguf_config.py`, what the blocks mean to
`duolocal.quant.gguf`, where tensors go to `loader.py`.

The map is copy-on-write: torch accepts it as writable memory, nothing is ever written, so no page is copied.
"""

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from duolocal.errors import ModelFileError
from duolocal.models.config import label, shown
from duolocal.models.gguf_names import part_of, parts_of
from duolocal.models.stand_ins import stand_in
from duolocal.quant.gguf import GGUF_TYPES, GGUFType

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)

# Limits far above real files (a 405B model: 2,300 tensors, 60 keys, 128,256 tokens, 280,147 merges).
_MAX_TENSORS = 1 << 17
_MAX_KEYS = 1 << 14
_MAX_KEY_BYTES = 1 << 16
_MAX_STRING_BYTES = 1 << 26
_MAX_ARRAY_ITEMS = 1 << 24  # over all arrays of a file
_MAX_DIMS = 4
_MAX_ALIGNMENT = 1 << 20

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}

# For messages only: types of ggml that duolocal does not decode.
_OTHER_TYPES = {
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}


@dataclass(frozen=True)
class GGUFTensor:
    """One entry of the tensor table, its bytes known to lie inside the file."""

    name: str
    shape: tuple[int, ...]  # as in torch: rows first, neighbouring values last
    type: GGUFType
    offset: int  # bytes from the start of the file
    nbytes: int
    part: int = 0  # of a split file: in which of `GGUFFile.parts` it is


@dataclass(frozen=True)
class GGUFPart:
    """A mapped file."""

    path: Path
    header_bytes: int  # header, key/values and tensor table
    data: mmap.mmap


@dataclass(frozen=True)
class GGUFFile:
    """An opened GGUF file, of one part or split; tensors stay valid as long as anything refers to them."""

    path: Path  # of the first part
    metadata: dict[str, Any]  # of the first part
    tensors: dict[str, GGUFTensor]
    parts: tuple[GGUFPart, ...]

    def raw(self, tensor: GGUFTensor) -> Tensor:
        """Return the bytes of `tensor` as [rows, row_bytes] uint8, a view of the file."""
        data = self.parts[tensor.part].data
        flat = torch.frombuffer(data, dtype=torch.uint8, count=tensor.nbytes, offset=tensor.offset)
        return flat.view(-1, tensor.type.row_bytes(tensor.shape[-1]))


def open_gguf(path: Path) -> GGUFFile:
    """Map a GGUF file, or all parts of a split one by the first, and read key/values and tensor tables.

    Raises ModelFileError, one line with the file and the reason, for whatever does not follow the format, is
    truncated, or has a tensor of a type that duolocal does not decode; for a part that is not the first, and where one
    is missing.
    """
    number, count = part_of(path.name)
    names = parts_of(path.name)
    if number != 1:
        raise ModelFileError(f"{path}: part {number} of {count} of a split GGUF; give the first, {names[0]}")
    missing = [name for name in names[1:] if not path.with_name(name).is_file()]
    if missing:
        raise ModelFileError(f"{path}: the first of {count} parts, and {', '.join(missing)} is not beside it: fetch it")
    files = [_open_part(path.with_name(name), index, count) for index, name in enumerate(names)]
    tensors: dict[str, GGUFTensor] = {}
    for file in files:
        twice = tensors.keys() & file.tensors.keys()
        if twice:
            raise ModelFileError(f"{file.path}: the tensor {label(min(twice))} is in another part too: damaged")
        tensors |= file.tensors
    wanted = files[0].metadata.get("split.tensors.count", len(tensors))
    if wanted != len(tensors):
        raise ModelFileError(f"{path}: its parts hold {len(tensors)} tensors, wanted {shown(wanted)}: fetch them again")
    return GGUFFile(path, files[0].metadata, tensors, tuple(file.parts[0] for file in files))


def _open_part(path: Path, index: int, count: int) -> GGUFFile:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if size else None
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror or error})") from error
    if data is None:
        raise ModelFileError(f"{path}: is empty; download it again")
    return _Parser(path, data, index, count).parse()


def _is_prose(key: str) -> bool:
    return key.startswith("general.") and key != "general.architecture"


class _TruncatedError(ModelFileError):
    """The file ends before what it says it holds."""


def first_value(beginning: bytes, key: str, where: str) -> Any:
    """Return the value of a key by the first bytes of a file, None where it is not in them.

    `where` names the file in errors. Raises ModelFileError for what is no GGUF, or a damaged one.
    """
    try:
        return _Parser(Path(where), beginning, 0, 1).find(key)
    except _TruncatedError:
        return None


class _Parser:
    """Reads the file from front to back; `self._at` never passes the end."""

    def __init__(self, path: Path, data: mmap.mmap | bytes, index: int, count: int) -> None:
        self._path = path
        self._index, self._count = index, count  # which part of how many, by the name
        self._data = data
        self._size = len(data)
        self._at = 0
        self._array_items = 0

    def parse(self) -> GGUFFile:
        num_tensors, num_keys = self._header()
        metadata: dict[str, Any] = {}
        for key, value in self._key_values(num_keys):
            if key in metadata:
                raise self._error(f"the key {label(key)} appears twice")
            metadata[key] = value
        index, count = metadata.get("split.no", 0), metadata.get("split.count", 0) or 1
        if (index, count) != (self._index, self._count):
            raise self._error(
                f"says it is part {shown(index)} (from 0) of {shown(count)} of a split GGUF, wanted {self._index} of "
                f"{self._count} by its name: give the parts the names they came with, NAME-00001-of-0000N.gguf"
            )
        table = self._table(num_tensors)
        tensors = self._place(table, self._alignment(metadata))
        assert isinstance(self._data, mmap.mmap)
        return GGUFFile(self._path, metadata, tensors, (GGUFPart(self._path, self._at, self._data),))

    def find(self, wanted: str) -> Any:
        """Return the value of a key, None where there is none."""
        _, num_keys = self._header()
        return next((value for key, value in self._key_values(num_keys) if key == wanted), None)

    def _key_values(self, count: int) -> Iterator[tuple[str, Any]]:
        for _ in range(count):
            key = self._string("a key", _MAX_KEY_BYTES)
            yield key, self._value(self._unpack("<I", key), key)

    def _error(self, reason: str) -> ModelFileError:
        return ModelFileError(f"{self._path}: {reason}")

    def _unpack(self, layout: str, what: str) -> Any:
        return struct.unpack_from(layout, self._data, self._take(struct.calcsize(layout), what))[0]

    def _take(self, count: int, what: str) -> int:
        """Return where `count` bytes begin and step over them."""
        start = self._at
        if count > self._size - start:
            raise _TruncatedError(
                f"{self._path}: truncated: {label(what)} needs {count} bytes at byte {start}, the file has "
                f"{self._size}; download it again"
            )
        self._at = start + count
        return start

    def _header(self) -> tuple[int, int]:
        if self._data[:4] != _MAGIC:
            if (instead := stand_in(bytes(self._data[:64]))) is not None:
                raise self._error(instead)
            raise self._error(f"not a GGUF file: begins with {bytes(self._data[:4])!r}, wanted {_MAGIC!r}")
        self._at = 4
        version = self._unpack("<I", "the version")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            reason = "big endian" if swapped in _VERSIONS else f"GGUF version {version}"
            raise self._error(f"{reason}, wanted little-endian version 2 or 3; convert the model again")
        num_tensors = self._unpack("<Q", "the tensor count")
        num_keys = self._unpack("<Q", "the key count")
        for what, count, limit in (("tensors", num_tensors, _MAX_TENSORS), ("keys", num_keys, _MAX_KEYS)):
            if count > limit:
                raise self._error(f"says it has {count} {what}, more than the {limit} of any real file: damaged")
        return num_tensors, num_keys

    def _string(self, what: str, limit: int = _MAX_STRING_BYTES) -> str:
        length = self._unpack("<Q", what)
        if length > limit:
            raise self._error(f"{label(what)} has a string of {length} bytes, more than {limit}: damaged")
        start = self._take(length, what)
        try:
            # What is written for people, in whatever encoding, is no reason to refuse a model.
            return self._data[start : start + length].decode("utf-8", "replace" if _is_prose(what) else "strict")
        except UnicodeDecodeError as error:
            raise self._error(f"{label(what)} has a string that is not UTF-8 at byte {start}: damaged") from error

    def _value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self._unpack(_SCALARS[kind], key)
        if kind == _STRING:
            return self._string(key)
        if kind == _ARRAY:
            return self._array(key)
        raise self._error(f"the key {label(key)} has value type {kind}, wanted 0 to 12: damaged")

    def _array(self, key: str) -> list[Any]:
        kind = self._unpack("<I", key)
        count = self._unpack("<Q", key)
        self._array_items += count
        if self._array_items > _MAX_ARRAY_ITEMS:
            raise self._error(f"the array {label(key)} has {count} items, more than any real file: damaged")
        if kind == _STRING:
            self._fits(count * 8, key)
            return self._strings(key, count)
        if kind not in _SCALARS:
            raise self._error(f"the array {label(key)} has items of type {kind}, wanted numbers or strings")
        layout = np.dtype(_SCALARS[kind])
        start = self._take(count * layout.itemsize, key)
        return np.frombuffer(self._data[start : self._at], dtype=layout).tolist()

    def _strings(self, key: str, count: int) -> list[str]:
        """Return `count` strings; a vocabulary has a hundred thousand, so what is sound takes no call for each."""
        data, size, strings = self._data, self._size, []
        length_at = struct.Struct("<Q").unpack_from
        for _ in range(count):
            at = self._at
            end = at + 8 + (length_at(data, at)[0] if size - at >= 8 else size)
            try:
                if end > size or end - at > _MAX_STRING_BYTES:
                    raise ValueError
                strings.append(data[at + 8 : end].decode("utf-8"))
            except ValueError:  # a UnicodeDecodeError is one
                strings.append(self._string(key))  # raises what is wrong
            self._at = end
        return strings

    def _fits(self, count: int, what: str) -> None:
        start = self._at
        self._take(count, what)
        self._at = start

    def _alignment(self, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._error(f"general.alignment is {shown(alignment)}, wanted a power of two: damaged")
        return alignment

    def _table(self, count: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
        table: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self._string("a tensor name", _MAX_KEY_BYTES)
            if name in table:
                raise self._error(f"the tensor {label(name)} appears twice: damaged")
            num_dims = self._unpack("<I", name)
            if not 1 <= num_dims <= _MAX_DIMS:
                raise self._error(f"tensor {label(name)} has {num_dims} dimensions, wanted 1 to {_MAX_DIMS}: damaged")
            shape = tuple(self._unpack("<Q", name) for _ in range(num_dims))[::-1]
            table[name] = (shape, self._unpack("<I", name), self._unpack("<Q", name))
        return table

    def _place(self, table: dict[str, tuple[tuple[int, ...], int, int]], alignment: int) -> dict[str, GGUFTensor]:
        data_start = -(-self._at // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, (shape, type_id, offset) in table.items():
            kind = GGUF_TYPES.get(type_id)
            if kind is None:
                raise self._error(
                    f"tensor {label(name)} has type {_OTHER_TYPES.get(type_id, type_id)}; duolocal reads "
                    f"{', '.join(sorted(t.name for t in GGUF_TYPES.values()))}: choose another file of this model"
                )
            elements = 1
            for size in shape:
                elements *= size  # Python integers: no overflow
            if elements < 1 or shape[-1] % kind.block_size:
                raise self._error(
                    f"tensor {label(name)} has shape {shown(shape)}, wanted rows of a multiple of {kind.block_size} "
                    f"values for {kind.name}: damaged"
                )
            nbytes = kind.row_bytes(elements)
            if offset % alignment:
                raise self._error(f"tensor {label(name)} begins at {offset}, wanted a multiple of {alignment}: damaged")
            if data_start + offset + nbytes > self._size:
                raise self._error(
                    f"truncated: tensor {label(name)} ends at byte {data_start + offset + nbytes}, "
                    f"the file has {self._size}; download it again"
                )
            tensors[name] = GGUFTensor(name, shape, kind, data_start + offset, nbytes, self._index)
        return tensors
