"""A model and a context of random numbers in the shapes of real ones: for speed and memory, never for text.

Owns random weights in the formats of files, as a TensorSource, and a cache that holds many tokens without a prefill.
Nothing that is generated with either means anything, and what prints a figure taken with them says so. No command that
answers a user imports this.
"""

import torch
from torch import Tensor

from duolocal.cache import DuoCache
from duolocal.kernels.blocks import BlockLayout, encode_blocks
from duolocal.kernels.matrix import GroupedMatrix
from duolocal.models.assemble import Role
from duolocal.quant.awq import AWQWeight
from duolocal.quant.gguf_pack import quantize_rows
from duolocal.quant.grouped import GroupedWeight
from duolocal.quant.weight import DenseWeight, Weight

DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Uniform 4-bit codes have a standard deviation of 4.6: the weights get 0.02, a usual size, so that hidden states stay
# of size 1 through all layers.
_WEIGHT_STD, _CODE_STD = 0.02, 4.6

DISTINCT_BLOCKS = 1024  # encoded once each; every record of the pool is a copy of one of them
_ENCODED_AT_ONCE = 256  # blocks
_COPIED_BYTES = 1 << 28  # at a time
_OUTLIERS = 16  # one channel in so many is 8 times larger, as keys of real models have them


class RandomTensors:
    """A TensorSource of random tensors, made where they are asked for: matrices of all layers, and of none, by format.

    Formats are those of `random_weight`; group_size: of INT4 and AWQ, all input features where it does not divide them.
    """

    def __init__(self, layer_format: str, outer_format: str, *, group_size: int, device: torch.device, seed: int = 0):
        self._layer_format, self._outer_format, self._group_size = layer_format, outer_format, group_size
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self._seed = seed

    def weight(self, role: Role, device: torch.device) -> Weight:
        """Return a random matrix."""
        rows, columns = role.shape
        generator = self._generator
        if generator.device.type != device.type:  # an embedding in host memory
            generator = torch.Generator(device=device).manual_seed(self._seed)
        return random_weight(
            self._outer_format if role.layer is None else self._layer_format,
            rows,
            columns,
            group_size=self._group_size if columns % self._group_size == 0 else columns,
            std=1.0 if role.name == "embedding.weight" else columns**-0.5,
            generator=generator,
        )

    def vector(self, role: Role, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return a norm about 1, or a bias of 0."""
        x = torch.zeros(role.shape, device=device)
        return (x if role.name.endswith("bias") else x.uniform_(0.8, 1.2, generator=self._generator)).to(dtype)


def random_weight(
    name: str, rows: int, columns: int, *, group_size: int, std: float, generator: torch.Generator
) -> Weight:
    """Return a random weight [rows, columns] on the generator's device.

    name: INT4, AWQ, a key of DENSE, or a format of GGUF; those that nobody packs here are as fast as the one of as many
    bits that somebody does. std: of dense and GGUF weights.
    """
    device = generator.device
    if name == "INT4":
        return random_int4(rows, columns, group_size, generator)
    if name == "AWQ":
        qweight, qzeros = (
            torch.randint(-(2**31), 2**31, (n, rows // 8), generator=generator, dtype=torch.int64, device=device).int()
            for n in (columns, columns // group_size)
        )
        return AWQWeight(qweight, qzeros, torch.full((columns // group_size, rows), std / 8, device=device).half())
    values = torch.empty(rows, columns, dtype=DENSE.get(name, torch.float32), device=device)
    dense = DenseWeight(values.normal_(std=std, generator=generator))
    if name in DENSE:
        return dense
    return quantize_rows(dense, "Q8_0" if name in ("Q8_0", "Q6_K", "INT8") else "Q4_1", device=device)


def random_int4(rows: int, columns: int, group_size: int, generator: torch.Generator) -> GroupedWeight:
    """Return a random 4-bit weight with zero points, as AWQ has them, on the generator's device."""
    device, groups = generator.device, columns // group_size
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=device).random_(generator=generator)
    scales = torch.empty(rows, groups, device=device).uniform_(0.5, 1.5, generator=generator)
    zeros = torch.randint(7, 9, (rows, groups), dtype=torch.uint8, device=device, generator=generator)
    scales = scales.mul_(_WEIGHT_STD / _CODE_STD).to(torch.float16)
    matrix = GroupedMatrix(codes=codes, scales=scales, bits=4, zeros=zeros)
    return GroupedWeight(matrix, f"random-int4-g{group_size}")


def fill_with_random_tokens(
    cache: DuoCache, num_tokens: int, *, seed: int, distinct_blocks: int = DISTINCT_BLOCKS
) -> None:
    """Bring an empty cache to `num_tokens` tokens of random keys and values, for a decode benchmark.

    Takes records from the pool as a prefill does and writes all of them, so that memory is really held and a reader
    meets as many different addresses; their contents are copies, in random order, of `distinct_blocks` encoded
    blocks whose scales differ. Every slot of the ring is random. Seconds for many gigabytes. `num_tokens` must fit
    the cache's context.
    """
    assert cache.num_tokens == 0, f"the cache holds {cache.num_tokens} tokens: reset it first"
    assert 0 <= num_tokens <= cache.context, (num_tokens, cache.context)
    generator = torch.Generator(device=cache.device).manual_seed(seed)
    layout, pool = cache.layout, cache.pool
    num_blocks = num_tokens // layout.block_size
    pool.grow(num_blocks)
    targets = pool.table[:, :num_blocks].reshape(-1)
    if targets.shape[0]:
        blocks = _random_blocks(layout, min(distinct_blocks, targets.shape[0]), generator)
        step = max(1, _COPIED_BYTES // layout.record_bytes)
        for part in targets.split(step):
            chosen = torch.randint(blocks.shape[0], part.shape, generator=generator, device=cache.device)
            pool.put(part, blocks[chosen])
        pool.settle(0)
        cache.make_digests(0)
    ring = cache.ring.data
    for half in ring:  # keys, then values
        shape = (*half.shape[:2], 1, half.shape[3])
        half.copy_(_scaled(torch.randn(half.shape, generator=generator, device=cache.device), shape, generator))
    cache.num_tokens = num_tokens


def _random_blocks(layout: BlockLayout, count: int, generator: torch.Generator) -> Tensor:
    """Return uint8 [count, record_bytes]: random keys and values, encoded."""
    parts = []
    for start in range(0, count, _ENCODED_AT_ONCE):
        shape = (min(_ENCODED_AT_ONCE, count - start), layout.block_size, layout.head_dim)
        keys, values = (
            _scaled(
                torch.randn(shape, generator=generator, device=generator.device),
                (shape[0], 1, shape[2]),
                generator,
            )
            for _ in range(2)
        )
        parts.append(encode_blocks(keys, values, layout))
    return torch.cat(parts)


def _scaled(x: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Multiply x with a random size per channel (`shape` broadcasts to x), a few of them outliers."""
    sizes = torch.randn(shape, generator=generator, device=x.device).mul_(0.5).exp_()
    outlier = torch.randint(_OUTLIERS, shape, generator=generator, device=x.device) == 0
    return x * torch.where(outlier, 8 * sizes, sizes)
