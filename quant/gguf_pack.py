"""Making GGUF blocks: a 16- or 32-bit matrix rounded to Q8_0 or Q4_1, in groups of 32 input features.

Owns the arithmetic of the rounding; the layout of a block stands in `gguf.py`, and every backend decodes both formats.

- Q8_0 (8.5 bits per weight): scale d = max |w| / 127, code = round(w / d), value = d · code
- Q4_1 (5 bits per weight): minimum m and scale d, code = round((w − m) / d) in 0 … 15, value = d · code + m. It begins
  with m = min w and d = (max w − min w) / 15; then least squares finds the d and m that fit the codes best and the
  codes are rounded anew, `_REFITS` times (Lloyd's iteration), and a group keeps what has the smallest squared error.

d and m are float16, and the codes are those for the d and m that are stored: what is judged is what is packed.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from duolocal.errors import ModelFileError
from duolocal.quant.gguf import GGUF_TYPES, GGUFWeight
from duolocal.quant.weight import Weight

RowFormat = Literal["Q8_0", "Q4_1"]
GROUP_SIZE = 32  # input features; rows must be a multiple of it
_REFITS = 2  # of relative error 8.7% on SmolLM2's embedding 8.3% and 8.2% are left; two more would reach 8.1%
_SMALLEST = 2.0**-24  # of float16; for groups that are 0 throughout, or nearly
_CHUNK_ELEMENTS = 1 << 20  # rounded at a time: bounds the temporaries to about 40 MB
_TYPES = {kind.name: kind for kind in GGUF_TYPES.values()}


def quantize_rows(
    weight: Weight,
    kind: RowFormat,
    *,
    device: torch.device,
    name: str = "a matrix",
    on_progress: Callable[[int, int], None] | None = None,
) -> GGUFWeight:
    """Return `weight` rounded to `kind`, on `device`, reading a bounded number of its rows at a time.

    in_features must be a multiple of 32. `on_progress` gets (rows done, rows in all). Raises ModelFileError, naming
    the matrix `name`, where a value is not finite or too large for float16 scales.
    """
    rows, columns = weight.out_features, weight.in_features
    assert columns % GROUP_SIZE == 0, columns
    block_type = _TYPES[kind]
    pack = _q8_0 if kind == "Q8_0" else _q4_1
    raw = torch.empty((rows, block_type.row_bytes(columns)), dtype=torch.uint8, device=device)
    step = max(1, _CHUNK_ELEMENTS // columns)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        groups = weight.row_range(start, stop, torch.float32).to(device).reshape(-1, GROUP_SIZE)
        blocks = pack(groups)
        if blocks is None:
            raise ModelFileError(
                f"{name}: rows {start} to {stop - 1} have values that are not finite, or beyond what {kind} can scale"
            )
        raw[start:stop] = blocks.view(stop - start, -1)
        if on_progress is not None:
            on_progress(stop, rows)
    return GGUFWeight(raw, block_type, columns)


def _q8_0(groups: Tensor) -> Tensor | None:
    """Return blocks [n, 34] uint8 of groups [n, 32] float32, None where a scale is not finite."""
    scale = (groups.abs().amax(dim=1, keepdim=True) / 127).half().clamp_(min=_SMALLEST)
    if not bool(scale.isfinite().all()):
        return None
    codes = (groups / scale.float()).round_().clamp_(-127, 127).to(torch.int8)
    return torch.cat((scale.view(torch.uint8), codes.view(torch.uint8)), dim=1)


def _q4_1(groups: Tensor) -> Tensor | None:
    """Return blocks [n, 20] uint8 of groups [n, 32] float32, None where a scale or minimum is not finite."""
    low, high = groups.aminmax(dim=1, keepdim=True)
    scale, minimum = _stored((high - low) / 15, low)
    if not bool((scale + minimum).isfinite().all()):
        return None
    codes = _codes(groups, scale, minimum)
    error = _error(groups, codes, scale, minimum)
    for _ in range(_REFITS):
        new_scale, new_minimum = _stored(*_fit(groups, codes))
        new_codes = _codes(groups, new_scale, new_minimum)
        new_error = _error(groups, new_codes, new_scale, new_minimum)
        better = new_error < error
        scale, minimum = torch.where(better, new_scale, scale), torch.where(better, new_minimum, minimum)
        codes, error = torch.where(better, new_codes, codes), torch.where(better, new_error, error)
    packed = codes.to(torch.uint8)
    nibbles = packed[:, :16] | packed[:, 16:] << 4
    return torch.cat((scale.half().view(torch.uint8), minimum.half().view(torch.uint8), nibbles), dim=1)


def _stored(scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 numbers that float16 holds."""
    return scale.half().float().clamp_(min=_SMALLEST), minimum.half().float()


def _codes(groups: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    return (groups - minimum).div_(scale).round_().clamp_(0, 15)


def _error(groups: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """Return the squared error of each group, [n, 1]; NaN, which is never better, where a scale is not finite."""
    return (codes * scale).add_(minimum).sub_(groups).square_().sum(dim=1, keepdim=True)


def _fit(groups: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale and minimum [n, 1] with the least squared error for these codes."""
    mean_code, mean = codes.mean(dim=1, keepdim=True), groups.mean(dim=1, keepdim=True)
    centred = codes - mean_code
    variance = centred.square().sum(dim=1, keepdim=True).clamp_(min=_SMALLEST)
    scale = (centred * (groups - mean)).sum(dim=1, keepdim=True) / variance
    return scale, mean - scale * mean_code
