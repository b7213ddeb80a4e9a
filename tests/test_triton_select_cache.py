"""Selected decode through a cache with GPU kernels: against the torch path, and the decoder's graphs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from duolocal.cache import DuoCache, Placement
from duolocal.cache.selection import SelectionPolicy
from duolocal.engine.decoder import GpuDecoder
from duolocal.heads import HeadPlan
from duolocal.kernels.digest import DigestChannels, make_digests
from duolocal.kernels.gpu import decode
from duolocal.kernels.gpu.operations import TritonKernels
from duolocal.kernels.interface import Rotation, StepTraits
from duolocal.quant.kv import kv_layout
from duolocal.settings import Sampling
from tests.pool_checks import check_table
from tests.test_triton_select import same_digests
from tests.triton_device import DEVICE, INTERPRETED

# The newest complete block may be poison.
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice")

PLAN = HeadPlan(((True,), (True,)), 6, 20, "test")
LAYOUT = kv_layout("int4", head_dim=32, dtype=torch.float32, block_size=16)


def make_cache(kernels: TritonKernels | None, *, reuse: int, slots: int | None) -> DuoCache:
    generator = torch.Generator().manual_seed(3)
    channels = torch.stack([torch.randperm(32, generator=generator)[:16] for _ in range(2)])
    room = 2 * (24 * 8 + (slots or 0) * (LAYOUT.record_bytes + 8)) + 7
    cache = DuoCache(
        PLAN,
        LAYOUT,
        num_heads=2,
        context=384,
        device=DEVICE,
        dtype=torch.float32 if INTERPRETED else torch.bfloat16,
        kernels=kernels,
        placement=Placement(None if slots is None else room),
        select=SelectionPolicy(48, DigestChannels(channels.int(), torch.randn(2, 16, generator=generator)), reuse),
    )
    cache.pool.poison(0xFF)
    assert cache.selection is not None and cache.pool.num_slots == (24 if slots is None else slots)
    cache.selection.digests.fill_(0xFF)
    return cache


def feed(cache: DuoCache, count: int, *, seed: int = 1, prompt: bool = False) -> Tensor:
    """Append tokens, each made from its position, without RoPE; return what they saw [tokens, layers, heads, dim]."""
    start = cache.num_tokens
    x = torch.stack(
        [torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(1000 * seed + start + i)) for i in range(count)]
    )
    x[:, :, :2] *= 3
    x = x.to(DEVICE, cache.dtype)
    still = Rotation(torch.ones(count, 16, device=DEVICE), torch.zeros(count, 16, device=DEVICE))
    cache.begin(count, decode=count == 1 and not prompt)
    rotation = still if cache.traits.rotates else None
    seen = []
    for layer in range(2):
        q, k, v = (part.contiguous() for part in x[:, layer].split((2, 1, 1), dim=1))
        cache.append(layer, k, v, rotation)
        seen.append(cache.attend(layer, q, torch.arange(start, start + count, device=DEVICE), rotation))
    return torch.stack(seen, dim=1)


def step(caches: list[DuoCache], count: int, *, commit: bool = True, prompt: bool = False) -> bool:
    """Feed both; judge lists and results by the torch path; return whether the GPU made lists."""
    wanted, got = (feed(cache, count, prompt=prompt) for cache in caches)
    reference, ours = caches
    assert reference.selection is not None and ours.selection is not None
    chose = ours.traits.kind == "reselects"
    if count == 1 and not prompt and ours.num_tokens - ours.exact_recent >= PLAN.sink_size:
        assert torch.equal(reference.selection.lists, ours.selection.lists), ours.num_tokens
        assert torch.equal(reference.selection.made_at, ours.selection.made_at)
    near = 1e-4 if INTERPRETED else 3e-2  # weights in float16 on the values of int4 blocks: 2^-11 of sizes up to 4
    torch.testing.assert_close(got, wanted, rtol=20 * near, atol=20 * near)
    for cache in caches:
        if commit:
            cache.commit()
        else:
            cache.rollback()
    if ours.pool.tiered:
        check_table(ours.pool)
    return chose


def check_digests(cache: DuoCache) -> None:
    """Every complete block has its digest."""
    selection, pool = cache.selection, cache.pool
    assert selection is not None
    for row in range(pool.num_rows):
        records = pool.take(pool.table[row, : pool.num_blocks])
        wanted = make_digests(records, LAYOUT, selection.channels[row], selection.centre[row])
        same_digests(selection.digests[row, : pool.num_blocks], wanted, 16)


@pytest.mark.skipif(not INTERPRETED, reason="in 16 bits two scores may be too near to compare lists")
@pytest.mark.parametrize(("reuse", "slots"), [pytest.param(1, None, marks=pytest.mark.full), (4, 3)])
def test_a_cache_is_the_torch_path(reuse: int, slots: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through chunks, single tokens, an undo and a reload: the same lists, and near results."""
    monkeypatch.setattr(decode, "HOST_SPLITS", 1)
    kernels = TritonKernels(torch.float32)
    caches = [make_cache(None, reuse=reuse, slots=None), make_cache(kernels, reuse=reuse, slots=slots)]
    step(caches, 130)
    for _ in range(6):  # the first block comes into sight at 134, in the middle of what would share a list
        step(caches, 1)
    step(caches, 110)
    made = [step(caches, 1) for _ in range(6)]  # from 246
    assert made == ([True] * 6 if reuse == 1 else [True, False, True, False, False, False])
    step(caches, 1, commit=False)
    assert step(caches, 1) and step(caches, 1) == (reuse == 1)
    snapshots = [cache.snapshot() for cache in caches]
    while caches[0].num_tokens < 256:  # a block is completed by a step that need not make lists
        step(caches, 1)
    step(caches, 33)
    step(caches, 1, prompt=True)
    check_digests(caches[1])
    step(caches, 1)
    for cache, snapshot in zip(caches, snapshots, strict=True):
        cache.restore(snapshot)
    assert step(caches, 1)
    step(caches, 40)
    step(caches, 1)
    for cache in caches:
        assert cache.selection is not None
        ring, columns = cache.read_ring(), cache.pool.read(0, cache.pool.num_blocks)
        num_tokens = cache.num_tokens
        cache.reset()
        cache.selection.digests.fill_(0xFF)
        cache.resume(ring, num_tokens=num_tokens, first_block=0, columns=[columns])
    assert step(caches, 1)


def test_steps_that_reselect_are_a_graph_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of step runs eagerly once, is captured when it comes again, and is replayed from then on."""
    reselects = [True, False, False, False, True, False, True]
    done: list[str] = []

    class Sampler:
        sampling = Sampling(temperature=0)

        def prepare(self) -> None: ...

    cache: Any = SimpleNamespace(traits=StepTraits())
    transformer: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"), embeds_on_host=False)
    decoder = GpuDecoder.__new__(GpuDecoder)
    decoder._transformer, decoder._cache = transformer, cache
    decoder._sampler = Sampler()  # type: ignore[assignment]
    decoder._ids, decoder._warm, decoder._graphs = torch.zeros(1, dtype=torch.int64), set(), {}

    def capture(greedy: bool) -> Any:
        kind = cache.traits.kind
        done.append(f"capture {kind}")
        return SimpleNamespace(replay=lambda: done.append(f"replay {kind}"))

    monkeypatch.setattr(decoder, "_run", lambda greedy: done.append(f"run {cache.traits.kind}"))
    monkeypatch.setattr(decoder, "_capture", capture)
    for kind in map(str, reselects):
        cache.traits = StepTraits(kind=kind)
        decoder.step(5, lambda layer: None)
    assert done == [
        *("run True", "run False", "capture False", "replay False", "replay False"),
        *("capture True", "replay True", "replay False", "replay True"),
    ]
