"""The structures of `source/*.h` as ctypes, field by field; `check` compares their sizes with the library's."""

import ctypes
from ctypes import c_double, c_int64, c_void_p

from duolocal.kernels.matrix import PACKINGS, PackedMatrix

MAX_MATRICES = 4
MAX_THREADS = 256
MAX_DIM = 256
MAX_GROUP = 32
KEY_TILE = 64
MOST_AHEAD = 5  # tokens of a decode step
MAX_CHANNELS = 64
CACHE_LINE = 128

OPERATIONS = (
    "rms_norm",
    "linear",
    "rope",
    "silu_mul",
    "embed",
    "close_blocks",
    "write_ring",
    "decode_attention",
    "merge",
    "prefill_attention",
    "digest_blocks",
    "score_blocks",
    "choose_candidates",
    "weigh_blocks",
    "choose_blocks",
    "estimate_blocks",
    "quantize_rows",
    "accept",
)
PLANE_KINDS = ("f32", "f16", "bf16", "fp8", "int8", "int4")


def _line(name: str) -> tuple[str, type]:
    return name, c_int64 * (CACHE_LINE // 8)  # a number alone on its cache line


class Pool(ctypes.Structure):
    _fields_ = (
        ("num_threads", c_int64),
        ("yield_", c_void_p),
        ("linger", c_int64),
        ("times", c_void_p),
        ("ops", c_void_p),
        ("num_ops", c_int64),
        ("_pad", c_int64 * (CACHE_LINE // 8 - 6)),
        _line("generation"),
        ("busy", c_int64),
        ("stop", c_int64),
        ("_pad2", c_int64 * (CACHE_LINE // 8 - 2)),
        _line("arrived"),
        _line("epoch"),
        _line("next"),
        ("asleep", c_int64 * MAX_THREADS),
    )


class Op(ctypes.Structure):
    _fields_ = (("run", c_void_p), ("args", c_void_p))


class Matrix(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("format", c_int64),
        ("rows", c_int64),
        ("cols", c_int64),
        ("row_bytes", c_int64),
        ("zeros", c_void_p),
        ("scales", c_void_p),
        ("group", c_int64),
    )

    @classmethod
    def of(cls, packed: PackedMatrix) -> "Matrix":
        return cls(
            packed.data.data_ptr(),
            PACKINGS.index(packed.packing),
            packed.out_features,
            packed.in_features,
            packed.row_bytes,
            None if packed.zeros is None else packed.zeros.data_ptr(),
            None if packed.scales is None else packed.scales.data_ptr(),
            packed.group_size,
        )


class CodesOfX(ctypes.Structure):
    _fields_ = (
        ("codes", c_void_p),
        ("rests", c_void_p),
        ("scales", c_void_p),
        ("sums", c_void_p),
        ("offsets", c_void_p),
        ("fine", c_void_p),
        ("unbounded", c_void_p),
        ("values", c_void_p),
    )


class QuantizeArgs(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p),
        ("codes", CodesOfX),
        ("num_rows", c_int64),
        ("cols", c_int64),
        ("fine_from", c_double),
    )


class LinearArgs(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p),
        ("num_rows", c_int64),
        ("count", c_int64),
        ("residual", c_void_p),
        ("w", Matrix * MAX_MATRICES),
        ("y", c_void_p * MAX_MATRICES),
        ("bias", c_void_p * MAX_MATRICES),
        ("codes", CodesOfX),
    )


class RmsNormArgs(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p),
        ("weight", c_void_p),
        ("y", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("eps", c_double),
    )


class RopeArgs(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("y", c_void_p),
        ("tokens", c_int64),
        ("heads", c_int64),
        ("head_dim", c_int64),
    )


class SiluArgs(ctypes.Structure):
    _fields_ = (("gate", c_void_p), ("up", c_void_p), ("y", c_void_p), ("count", c_int64))


class EmbedArgs(ctypes.Structure):
    _fields_ = (("w", Matrix), ("ids", c_void_p), ("y", c_void_p), ("count", c_int64))


class PlaneArgs(ctypes.Structure):
    _fields_ = (
        ("kind", c_int64),
        ("groups", c_int64),
        ("rotate", c_int64),
        ("codes_at", c_int64),
        ("scales_at", c_int64),
        ("minima_at", c_int64),
    )


class LayerCache(ctypes.Structure):
    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("records", c_void_p),
        ("table", c_void_p),
        ("rows", c_void_p),
        ("widths", c_void_p),
        ("start", c_void_p),
        ("table_stride", c_int64),
        ("record_bytes", c_int64),
        ("block_size", c_int64),
        ("kv_heads", c_int64),
        ("query_group", c_int64),
        ("dim", c_int64),
        ("sink", c_int64),
        ("recent", c_int64),
        ("key", PlaneArgs),
        ("value", PlaneArgs),
        ("advise", c_void_p),
        ("first_home", c_int64),
        ("num_slots", c_int64),
        ("next_row", c_int64),
        ("next_rows", c_int64),
        ("tags", c_void_p),
        ("integers", c_int64),
        ("selection", c_void_p),
    )


class StoreArgs(ctypes.Structure):
    _fields_ = (("cache", c_void_p), ("k", c_void_p), ("v", c_void_p), ("count", c_int64))


class AcceptArgs(ctypes.Structure):
    _fields_ = (("layers", c_void_p), ("num_layers", c_int64), ("row", c_int64))


class DecodeArgs(ctypes.Structure):
    _fields_ = (
        ("cache", c_void_p),
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("out", c_void_p),
        ("partial", c_void_p),
        ("count", c_int64),
        ("max_spans", c_int64),
    )


class PrefillArgs(ctypes.Structure):
    _fields_ = (
        ("cache", c_void_p),
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("out", c_void_p),
        ("scratch", c_void_p),
        ("scratch_stride", c_int64),
        ("count", c_int64),
        ("tile", c_int64),
        ("chosen", c_void_p),
        ("chosen_tile", c_int64),
        ("first_chosen", c_int64),
        ("chosen_tiles", c_int64),
        ("chosen_blocks", c_int64),
        ("weights", c_void_p),
    )


class SelectionArgs(ctypes.Structure):
    _fields_ = (
        ("budget", c_int64),
        ("reuse", c_int64),
        ("channels", c_void_p),
        ("centre", c_void_p),
        ("num_channels", c_int64),
        ("digests", c_void_p),
        ("digest_bytes", c_int64),
        ("lists", c_void_p),
        ("made_at", c_void_p),
        ("scores", c_void_p),
        ("num_candidates", c_int64),
        ("candidates", c_void_p),
        ("weights", c_void_p),
    )


class DigestArgs(ctypes.Structure):
    _fields_ = (("cache", c_void_p), ("count", c_int64), ("first", c_int64), ("last", c_int64))


class SelectArgs(ctypes.Structure):
    _fields_ = (("cache", c_void_p), ("q", c_void_p))


class EstimateArgs(ctypes.Structure):
    _fields_ = (
        ("cache", c_void_p),
        ("q", c_void_p),
        ("k", c_void_p),
        ("out", c_void_p),
        ("scratch", c_void_p),
        ("scratch_stride", c_int64),
        ("count", c_int64),
        ("first", c_int64),
        ("step", c_int64),
        ("queries", c_int64),
        ("blocks", c_int64),
    )


# In the order of `duo_size`.
_ALL = (
    Pool,
    Op,
    Matrix,
    LinearArgs,
    RmsNormArgs,
    RopeArgs,
    SiluArgs,
    EmbedArgs,
    PlaneArgs,
    LayerCache,
    StoreArgs,
    DecodeArgs,
    PrefillArgs,
    SelectionArgs,
    DigestArgs,
    SelectArgs,
    EstimateArgs,
    QuantizeArgs,
    AcceptArgs,
)


def check(library: ctypes.CDLL) -> None:
    """Compare every structure's size with the library's: a field forgotten on one side is our own bug."""
    library.duo_size.restype = c_int64
    for number, struct in enumerate(_ALL):
        size = library.duo_size(c_int64(number))
        assert size == ctypes.sizeof(struct), (struct.__name__, size, ctypes.sizeof(struct))
