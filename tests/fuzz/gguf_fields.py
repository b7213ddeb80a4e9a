"""Where the numbers of a GGUF file stand: lengths, counts, types, dimensions, offsets. Independent of the reader."""

import struct
from dataclasses import dataclass

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


@dataclass(frozen=True)
class Field:
    """One number of the header."""

    at: int
    size: int  # bytes
    kind: str  # "count", "length", "type", "value", "dimension", "offset"


class _Walk:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 4
        self.fields: list[Field] = []

    def number(self, size: int, kind: str) -> int:
        value = int.from_bytes(self.data[self.at : self.at + size], "little")
        self.fields.append(Field(self.at, size, kind))
        self.at += size
        return value

    def text(self) -> None:
        length = self.number(8, "length")  # which moves on itself
        self.at += length

    def value(self, kind: int) -> None:
        if kind == 8:
            self.text()
        elif kind == 9:
            inner, count = self.number(4, "type"), self.number(8, "count")
            for _ in range(count):
                if inner == 8:
                    self.text()
                else:
                    self.at += _SIZES[inner]
        else:
            self.number(_SIZES[kind], "value")


def gguf_fields(data: bytes) -> tuple[list[Field], int]:
    """Return the fields of a whole file in order, and where its header ends."""
    assert data[:4] == b"GGUF" and struct.unpack_from("<I", data, 4)[0] == 3
    walk = _Walk(data)
    walk.number(4, "type")
    num_tensors, num_keys = walk.number(8, "count"), walk.number(8, "count")
    for _ in range(num_keys):
        walk.text()
        walk.value(walk.number(4, "type"))
    for _ in range(num_tensors):
        walk.text()
        for _ in range(walk.number(4, "count")):
            walk.number(8, "dimension")
        walk.number(4, "type")
        walk.number(8, "offset")
    return walk.fields, walk.at
