"""The digests of a block that `measure_selection.py` compares: what is kept of 64 keys, and how a query scores it.

Every kind can be made in other coordinates (`Basis`) and stored in fewer bits (`coded`). Scores are in units of the
logits; only their order over the blocks of a query head counts, so what is the same for all blocks may be left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duolocal.kernels.blocks import decode_blocks, encode_blocks, hadamard
from duolocal.quant.kv import kv_layout

BLOCK = 64  # tokens
EARLY = 1024  # tokens that a basis is made from

# Queries [heads, group, steps, head_dim], scaled, to scores [heads, group, steps, blocks] in units of the logits.
Scorer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Early:
    """What is known of a head before its digests are made."""

    keys: Tensor  # [heads, tokens, head_dim]
    moment: Tensor  # of queries, [heads, head_dim, head_dim]


@dataclass(frozen=True)
class Digest:
    """What is kept of a block, and how a query is scored against it.

    build takes keys [heads, blocks, BLOCK, head_dim].
    """

    name: str
    size: Callable[[int], float]  # bytes per block and KV head, of head_dim
    build: Callable[[Tensor, Early], Scorer]


def coded(x: Tensor, bits: int) -> Tensor:
    """Store vectors [..., n] in `bits`: float16, codes with scale and minimum, or signs with a mean magnitude."""
    if bits == 16:
        return x.half().float()
    if bits == 1:
        return x.sign() * x.abs().mean(-1, keepdim=True).half().float()
    low = x.amin(-1, keepdim=True).half().float()
    scale = ((x.amax(-1, keepdim=True) - low) / (2**bits - 1)).half().float()
    return low + ((x - low) / scale.clamp_min(1e-6)).round().clamp(0, 2**bits - 1) * scale


def vector_bytes(dim: int, bits: int) -> float:
    """Return what `coded` takes for a vector of `dim` numbers."""
    return dim * bits / 8 + {16: 0, 1: 2}.get(bits, 4)


@dataclass(frozen=True)
class Basis:
    """In which coordinates a digest is made: as they are, rotated (as int4 records hold keys), or the `rank` main ones.

    The main directions are those in which early keys and early queries of a head have their products. Keys are taken
    relative to the mean of early ones, which shifts all scores of a query alike.
    """

    rotate: bool = False
    rank: int | None = None
    pairs: bool = False  # whole channels: pairs that RoPE turns together, which stay the same at every distance

    @property
    def name(self) -> str:
        if self.rank:
            return f" in {self.rank} {'channels' if self.pairs else 'directions'}"
        return " rotated" if self.rotate else ""

    def dim(self, head_dim: int) -> int:
        return self.rank or head_dim

    def into(self, keys: Tensor, early: Early) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return keys in these coordinates, and what brings queries [heads, group, steps, head_dim] there."""
        mean = early.keys.mean(1)
        centred = keys - mean[:, None, None]
        if self.rank is None:
            move = hadamard if self.rotate else _same
            return move(centred), move
        first, dim = early.keys - mean[:, None], keys.shape[-1]
        if self.pairs:
            weight = early.moment.diagonal(dim1=-2, dim2=-1) * first.square().mean(1)
            best = weight.unflatten(-1, (2, -1)).sum(1).topk(self.rank // 2, -1).indices  # [heads, rank / 2]
            down = up = torch.nn.functional.one_hot(torch.cat((best, best + dim // 2), -1), dim).float().mT
        else:
            values, vectors = torch.linalg.eigh(early.moment.double())
            root = values.clamp_min(values.amax(-1, keepdim=True) * 1e-6).sqrt()
            half = (vectors * root[:, None] @ vectors.mT).float()
            inverse = (vectors / root[:, None] @ vectors.mT).float()
            seen = first @ half
            main = torch.linalg.eigh((seen.mT @ seen).double())[1][..., -self.rank :].float()  # [heads, head_dim, rank]
            down, up = half @ main, inverse @ main
        return torch.einsum("hbtd,hdr->hbtr", centred, down), lambda q: torch.einsum("hgnd,hdr->hgnr", q, up)


def _same(x: Tensor) -> Tensor:
    return x


PLAIN, ROTATED = Basis(), Basis(rotate=True)


def dots(q: Tensor, vectors: Tensor) -> Tensor:
    """Multiply q [heads, group, steps, dim] with vectors [heads, blocks, sub-blocks, dim]."""
    return torch.einsum("hgnd,hbsd->hgnbs", q, vectors)


def label(kind: str, bits: int, basis: Basis) -> str:
    """Name a digest."""
    return f"{kind} {'f16' if bits == 16 else f'int{bits}'}{basis.name}"


def boxes(
    tokens: int,
    bits: int,
    basis: Basis = PLAIN,
    *,
    reach: float = 1.0,
    width_bits: int | None = None,
    together: bool = False,
    records: bool = False,
) -> Digest:
    """Minimum and maximum of every channel; a block scores as its best sub-block.

    reach: of the half width that counts; with 1 it is the upper bound of Quest (arXiv 2406.10774). width_bits: store
    middle and half width, the latter in so many bits. together: a sub-block's score is the sum over the query heads of
    a KV head, which is one evaluation with the sums of q and of |q|. records: keys as the int4 record of a block gives
    them back.
    """

    def build(keys: Tensor, early: Early) -> Scorer:
        keys, move = basis.into(_from_records(keys) if records else keys, early)
        cut = keys.unflatten(2, (-1, tokens))
        low, high = cut.amin(3), cut.amax(3)
        if width_bits is None:
            low, high = coded(low, bits), coded(high, bits)
        middle, half = (low + high) / 2, (high - low) / 2
        if width_bits is not None:
            middle, half = coded(middle, bits), coded(half, width_bits)

        def score(q: Tensor) -> Tensor:
            q = move(q)
            found = dots(q, middle) + dots(q.abs(), half * reach)
            return (found.sum(1, keepdim=True).expand_as(found) if together else found).amax(-1)

        return score

    def size(head_dim: int) -> float:
        both = (bits, bits if width_bits is None else width_bits)
        return BLOCK // tokens * sum(vector_bytes(basis.dim(head_dim), each) for each in both)

    kind = f"minmax{tokens}" + ("" if reach == 1 else f"*{reach:g}")
    name = label(kind, bits, basis) + ("" if width_bits is None else f"+{width_bits}")
    return Digest(name + " together" * together + " of int4 keys" * records, size, build)


def _from_records(keys: Tensor) -> Tensor:
    layout = kv_layout("int4", head_dim=keys.shape[-1], dtype=torch.float32, block_size=BLOCK)
    records = encode_blocks(keys.flatten(0, 1), keys.flatten(0, 1), layout)
    return hadamard(decode_blocks(records, layout, "key", dtype=torch.float32)).view_as(keys)


def means(tokens: int, bits: int, basis: Basis = PLAIN, *, lse: bool = False) -> Digest:
    """Mean key of every sub-block; a block scores as its best sub-block, or as the sum of their masses (`lse`)."""

    def build(keys: Tensor, early: Early) -> Scorer:
        keys, move = basis.into(keys, early)
        mean = coded(keys.unflatten(2, (-1, tokens)).mean(3), bits)

        def score(q: Tensor) -> Tensor:
            found = dots(move(q), mean)
            return found.logsumexp(-1) if lse else found.amax(-1)

        return score

    return Digest(
        label(f"mean{tokens}{' sum' if lse else ''}", bits, basis),
        lambda head_dim: BLOCK // tokens * vector_bytes(basis.dim(head_dim), bits),
        build,
    )


def spreads(tokens: int, bits: int, basis: Basis = PLAIN, *, by: float | str, lse: bool = False) -> Digest:
    """Mean and per-channel spread: q · mean + by · sqrt(Σ q² var), or by="half": + ½ Σ q² var, the mass of a normal."""

    def build(keys: Tensor, early: Early) -> Scorer:
        keys, move = basis.into(keys, early)
        cut = keys.unflatten(2, (-1, tokens))
        mean, deviation = coded(cut.mean(3), bits), coded(cut.std(3, correction=0), bits)

        def score(q: Tensor) -> Tensor:
            q = move(q)
            var = dots(q.square(), deviation.square()).clamp_min(0.0)
            found = dots(q, mean) + (var / 2 if by == "half" else float(by) * var.sqrt())
            return found.logsumexp(-1) if lse else found.amax(-1)

        return score

    return Digest(
        label(f"mean+spread{tokens}*{by}{' sum' if lse else ''}", bits, basis),
        lambda head_dim: 2 * BLOCK // tokens * vector_bytes(basis.dim(head_dim), bits),
        build,
    )


def landmarks(count: int, bits: int, basis: Basis = PLAIN) -> Digest:
    """Some keys of the block as they are, each next the one farthest from those taken; the first is the mean."""

    def build(keys: Tensor, early: Early) -> Scorer:
        keys, move = basis.into(keys, early)
        taken = [keys.mean(2)]
        nearest = torch.full(keys.shape[:3], torch.inf)
        for _ in range(count - 1):
            nearest = torch.minimum(nearest, (keys - taken[-1][:, :, None]).square().sum(-1))
            far = nearest.argmax(-1)[..., None, None].expand(-1, -1, 1, keys.shape[-1])
            taken.append(keys.gather(2, far)[:, :, 0])
        vectors = coded(torch.stack(taken, 2), bits)
        return lambda q: dots(move(q), vectors).amax(-1)

    return Digest(
        label(f"{count} landmarks", bits, basis),
        lambda head_dim: count * vector_bytes(basis.dim(head_dim), bits),
        build,
    )


def clusters(count: int, bits: int, basis: Basis = PLAIN, *, rounds: int = 4) -> Digest:
    """Mean keys of `count` clusters of the block's keys; a block's mass is the sum of theirs."""

    def build(keys: Tensor, early: Early) -> Scorer:
        keys, move = basis.into(keys, early)
        centres = keys[:, :, :: BLOCK // count]
        for _ in range(rounds):
            near = torch.cdist(keys, centres).argmin(-1)  # [heads, blocks, BLOCK]
            member = torch.nn.functional.one_hot(near, count).float()
            sizes = member.sum(2)
            centres = torch.where(sizes[..., None] > 0, member.mT @ keys / sizes[..., None].clamp_min(1), centres)
        vectors, weight = coded(centres, bits), sizes.log()[:, None, None]

        return lambda q: (dots(move(q), vectors) + weight).logsumexp(-1)

    return Digest(
        label(f"{count} clusters", bits, basis),
        lambda head_dim: count * (vector_bytes(basis.dim(head_dim), bits) + 1),
        build,
    )


CHANNELS = Basis(rank=32, pairs=True)


def few_digests() -> list[Digest]:
    """Return those worth decoding with: the bound of Quest, LServe's pages, and ours in two sizes."""
    return [
        boxes(64, 16),
        boxes(16, 16),
        means(64, 16),
        boxes(64, 4, CHANNELS, reach=0.5),
        boxes(16, 4, CHANNELS, reach=0.5),
    ]


def all_digests() -> list[Digest]:
    """Return everything that was tried."""
    out = []
    for basis in (PLAIN, ROTATED):
        for tokens in (64, 32, 16):
            out += [boxes(tokens, bits, basis) for bits in (16, 8, 4, 2)]
            out += [boxes(tokens, 4, basis, width_bits=2)]
            out += [boxes(tokens, 16, basis, reach=reach) for reach in (0.25, 0.5)]
        for tokens in (64, 32, 16, 8, 4):
            out += [means(tokens, bits, basis) for bits in (16, 8, 4, 2, 1)]
        out += [means(tokens, 16, basis, lse=True) for tokens in (16, 8)]
        out += [spreads(64, bits, basis, by=1.0) for bits in (16, 8, 4)]
        out += [spreads(64, 16, basis, by=by) for by in (0.5, 2.0, "half")]
        out += [spreads(16, bits, basis, by=1.0) for bits in (16, 4)]
        out += [spreads(16, 16, basis, by=by, lse=True) for by in (0.5, "half")]
        out += [landmarks(count, 4, basis) for count in (4, 8)]
        out += [clusters(count, 4, basis) for count in (4, 8)]
    return out + main_digests()


def main_digests() -> list[Digest]:
    """Return those in few directions, and what to compare them with."""
    out = [boxes(64, 16), boxes(64, 4), boxes(16, 16), boxes(16, 16, reach=0.5), boxes(64, 16, reach=0.5)]
    out += [means(64, 16), means(16, 16), spreads(64, 16, by="half"), spreads(64, 4, by="half")]
    for rank in (8, 16, 32, 64):
        basis = Basis(rank=rank)
        out += [boxes(64, bits, basis) for bits in (8, 4)]
        out += [boxes(64, 8, basis, reach=0.5), boxes(16, 4, basis), boxes(16, 4, basis, reach=0.5)]
        out += [means(64, 8, basis), spreads(64, 8, basis, by="half"), spreads(64, 4, basis, by="half")]
        out += [spreads(64, 8, basis, by=2.0), spreads(16, 4, basis, by="half", lse=True)]
        if rank < 64:
            out += [means(tokens, 4, basis, lse=True) for tokens in (1, 2)]
    for rank in (8, 16, 24, 32, 48):
        basis = Basis(rank=rank, pairs=True)
        out += [boxes(tokens, 4, basis, reach=0.5) for tokens in (64, 32, 8)]
        out += [boxes(64, bits, basis) for bits in (8, 4)]
        out += [boxes(16, 4, basis), boxes(16, 4, basis, reach=0.5), spreads(64, 8, basis, by="half")]
    for reach in (0.3, 0.4, 0.6, 0.7):
        out += [boxes(tokens, 4, CHANNELS, reach=reach) for tokens in (64, 16)]
    out += [boxes(16, bits, CHANNELS, reach=0.5) for bits in (8, 3, 2)] + [boxes(64, 2, CHANNELS, reach=0.5)]
    return out


def built_digests() -> list[Digest]:
    """Return the first way that was built, the last one, and the steps to it from the recommended one, the first."""
    steps: list[dict[str, Any]] = [{}, {"width_bits": 4}, {"together": True}, {"records": True}]
    steps += [{"width_bits": 4, "together": True}, {"width_bits": 4, "together": True, "records": True}]
    return [boxes(16, 4, CHANNELS, reach=0.5, **step) for step in steps]


DIGESTS = {"few": few_digests, "built": built_digests, "main": main_digests, "all": all_digests}
