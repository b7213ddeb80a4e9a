"""Sparse prefill on the GPU: scores and attention over chosen blocks against dense float64, chunks against torch."""

import dataclasses

import pytest
import torch
from torch import Tensor

from duolocal.cache import DuoCache
from duolocal.heads import HeadPlan
from duolocal.kernels.blocks import hadamard
from duolocal.kernels.gpu import sparse_attention
from duolocal.kernels.gpu.operations import TritonKernels
from duolocal.kernels.gpu.prefill import prefill_attention
from duolocal.kernels.gpu.sparse_attention import block_scores, chosen_blocks_attention, sparse_blocks_attention
from duolocal.kernels.interface import Rotation
from duolocal.kernels.sparse import Chosen, SparsePrefill, sparse_block_attention
from duolocal.quant.kv import kv_layout
from tests.test_triton_prefill import Context, at, make, poisoned_empty, stored  # noqa: F401  a fixture of every test here
from tests.triton_device import COMPUTE_DTYPES, DEVICE

POLICY = SparsePrefill(mass=0.8, tile=32, stride=8, least_blocks=1)
# Keys and values are read in 16 bits, products are summed in float32: as the fused route of an exact prefill.
TOLERANCE = 2e-2


def parts(context: Context, start: int, end: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries [heads, group, n, dim], keys, values [heads, kv_len, dim] of retrieval heads, and what is seen."""
    cache = context.cache
    heads = cache.retrieval_heads.long().cpu()
    q = context.q[start:end].double().cpu().unflatten(1, (-1, cache.query_group))[:, heads].permute(1, 2, 0, 3)
    keys, values = (
        stored(context, which, x)[:end, heads].transpose(0, 1)
        for which, x in (("key", context.k), ("value", context.v))
    )
    i, j = torch.arange(start, end)[:, None], torch.arange(end)
    return q * cache.head_dim**-0.5, keys, values, (j >= cache.sink_size) & (i - j >= cache.recent_size)


@pytest.mark.cover(1)
@pytest.mark.parametrize("kv", ["16", "fp8", "k8v4", "int4"])
@pytest.mark.parametrize(("head_dim", "group", "sink_size"), [(64, 3, 0), (128, 4, 16), (80, 1, 70)])
def test_block_scores_against_dense(kv: str, head_dim: int, group: int, sink_size: int) -> None:
    context = make(480, retrieval=(False, True), kv=kv, head_dim=head_dim, group=group, sink_size=sink_size)
    start, end, step = 300, 480, 24
    at(context, start, end)
    queries, num_blocks = 7, 5
    first = start + 12
    rows = slice(12, 12 + step * queries, step)
    lse = block_scores(context.cache, context.q[start:end][rows].contiguous(), first=first, step=step, num_blocks=5)
    assert lse.shape == (1, group, queries, num_blocks)
    q, keys, _, seen = parts(context, start, end)
    scores = (q[:, :, rows] @ keys[:, None].transpose(2, 3)).masked_fill(~seen[rows], float("-inf"))
    wanted = scores[..., : num_blocks * 64].unflatten(-1, (num_blocks, 64)).logsumexp(-1)
    torch.testing.assert_close(lse.double().cpu(), wanted, rtol=0, atol=TOLERANCE)
    assert bool((wanted[..., -1] == float("-inf")).any()) and bool(wanted[..., -1].isfinite().any())


@pytest.mark.cover(1)
@pytest.mark.parametrize("kv", ["16", "fp8", "k8v4", "int4"])
@pytest.mark.parametrize(("head_dim", "group", "tile"), [(64, 3, 32), (128, 4, 16), (96, 2, 64)])
def test_attention_over_any_blocks_against_dense(kv: str, head_dim: int, group: int, tile: int) -> None:
    context = make(512, retrieval=(True, False, True), kv=kv, head_dim=head_dim, group=group, sink_size=16)
    first, tiles = 384, range(384 // tile, 512 // tile)
    at(context, first, 512)
    listed = torch.rand(2, len(tiles), 6, generator=torch.Generator().manual_seed(3)) < 0.5
    listed[0, 0] = False
    listed[1, 0] = True
    out, lse = chosen_blocks_attention(context.cache, context.q[first:], Chosen(tiles, tile, listed.to(DEVICE)))
    q, keys, values, seen = parts(context, first, 512)
    read = torch.zeros(2, 128, 512, dtype=torch.bool)
    read[:, :, :384] = listed.repeat_interleave(tile, 1).repeat_interleave(64, 2)
    scores = (q @ keys[:, None].transpose(2, 3)).masked_fill(~(seen & read)[:, None], float("-inf"))
    wanted_lse = scores.logsumexp(-1)
    weights = (scores - wanted_lse.masked_fill(wanted_lse.isinf(), 0.0)[..., None]).exp()
    # The last blocks are not full yet: their tokens are never seen.
    wanted = weights @ values.nan_to_num()[:, None]
    got = out.unflatten(1, (-1, group)).transpose(1, 2).double().cpu()
    if context.layout.value.rotate:
        got = hadamard(got)
    torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE)
    got_lse = lse.unflatten(1, (-1, group)).transpose(1, 2).double().cpu()
    torch.testing.assert_close(got_lse, wanted_lse, rtol=0, atol=TOLERANCE)
    assert bool((got_lse[0, :, :tile] == float("-inf")).all())


@pytest.mark.cover(1)
@pytest.mark.parametrize("kv", ["k8v4", "int4"])
@pytest.mark.parametrize(("start", "end"), [(256, 480), (301, 470), (0, 300), (470, 490)])
def test_chunks_choose_what_the_torch_reference_does(kv: str, start: int, end: int) -> None:
    context = make(512, retrieval=(True, True), kv=kv, group=2, sink_size=16)
    at(context, start, end)
    cache = context.cache
    generator = torch.Generator().manual_seed(1)
    band_lse = (torch.randn(end - start, cache.num_heads, generator=generator) + 2).to(DEVICE)
    seen, chosen = sparse_blocks_attention(cache, context.q[start:end], start, band_lse, POLICY)
    window = band_lse.cpu().unflatten(1, (2, 2)).permute(1, 2, 0)
    q = context.q[start:end].cpu().float().unflatten(1, (2, 2)).permute(1, 2, 0, 3)
    wanted, wanted_lse, reference = sparse_block_attention(
        q,
        window,
        lambda entries: cache.records.cpu()[entries],
        cache.table.cpu()[:, : end // 64],
        cache.layout,
        POLICY,
        q_positions=torch.arange(start, end),
        sink_size=16,
        recent_size=cache.recent_size,
        scale=cache.head_dim**-0.5,
    )
    assert chosen.tiles == reference.tiles
    if reference.blocks is None:
        assert chosen.blocks is None
    else:
        assert chosen.blocks is not None
        assert torch.equal(chosen.blocks.cpu(), reference.blocks)
        assert not bool(reference.blocks.all())
    if seen is None:
        assert bool((wanted_lse == float("-inf")).all())
        return
    out, lse = (x.unflatten(1, (-1, 2)).transpose(1, 2).cpu() for x in seen)
    out = hadamard(out) if cache.layout.value.rotate else out
    torch.testing.assert_close(out, wanted, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(lse, wanted_lse, rtol=0, atol=TOLERANCE)


def test_a_mass_of_one_is_exact_prefill() -> None:
    context = make(448, kv="k8v4", sink_size=16)
    q, k, v = at(context, 230, 448)
    policy = dataclasses.replace(POLICY, mass=1.0)

    def blocks(band_lse: Tensor) -> tuple[Tensor, Tensor] | None:
        seen, chosen = sparse_blocks_attention(context.cache, q, 230, band_lse, policy)
        assert chosen.tiles == range(8, 14)
        return seen

    wanted = prefill_attention(context.cache, q, k, v, 230, route="fused")
    got = prefill_attention(context.cache, q, k, v, 230, blocks_of=blocks)
    assert got.dtype == COMPUTE_DTYPES[0] and sparse_attention.SPAN_BLOCKS > 1
    torch.testing.assert_close(got.float(), wanted.float(), rtol=0, atol=TOLERANCE)


def test_a_cache_on_the_gpu_equals_the_torch_path() -> None:
    """The same tokens in a cache of Triton kernels and in one of plain torch, with RoPE of no angle."""
    plan = HeadPlan(((True, False),), sink_size=4, recent_size=16, source="test")
    policy = dataclasses.replace(POLICY, tile=64, stride=16)
    layout = kv_layout("k8v4", head_dim=64, dtype=torch.float32)
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(448, heads, 64, generator=generator) for heads in (4, 2, 2))
    k[70:80] += q[400, 0]
    outs, counts = [], []
    for device, kernels in ((DEVICE, TritonKernels(torch.float32)), (torch.device("cpu"), None)):
        cache = DuoCache(
            plan,
            layout,
            num_heads=4,
            context=448,
            device=device,
            dtype=torch.float32,
            kernels=kernels,
            prefill=policy,
        )
        rotation = None
        for start, end in ((0, 256), (256, 448)):
            cache.begin(end - start)
            if cache.traits.rotates:
                shape = (end - start, 32)
                rotation = Rotation(torch.ones(shape, device=device), torch.zeros(shape, device=device))
            cache.append(0, k[start:end].to(device), v[start:end].to(device), rotation)
            out = cache.attend(0, q[start:end].to(device), torch.arange(start, end, device=device), rotation)
            cache.commit()
        outs.append(out.cpu())
        assert cache.sparse_counts is not None
        counts.append((cache.sparse_counts.read.cpu(), cache.sparse_counts.seen.cpu()))
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=TOLERANCE)
    assert torch.equal(counts[0][0], counts[1][0]) and torch.equal(counts[0][1], counts[1][1])
    assert bool((counts[0][0] < counts[0][1]).all())
