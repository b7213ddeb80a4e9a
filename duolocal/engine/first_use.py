"""The first use of a model that nobody has measured: start at once, or rank its heads and measure KV formats first.

Owns the estimate of what both take, and the rule: where it is more than LONGEST_S and a tenth of the reading, every
head keeps the whole context and KV is int8, measured to be indistinguishable from 16 bits (docs/kv-formats.md), if
memory allows it; `duolocal tune` does both later. A share of heads that was asked for is a ranking asked for.
"""

import time
from dataclasses import dataclass, replace

import torch

from duolocal.cache import DuoCache
from duolocal.engine.events import LoadEvents
from duolocal.engine.head_choice import DRIFT_POSITIONS, ranking_context
from duolocal.engine.kv_choice import CANDIDATES, FIRST_USE_TOKENS
from duolocal.engine.resolve import SAFE_KV, Resolved
from duolocal.heads import UNMEASURED_RATIO, uniform_plan
from duolocal.models.config import ModelConfig
from duolocal.models.transformer import Transformer
from duolocal.plan.fitting import Free
from duolocal.plan.memory import GIB, plan_memory
from duolocal.quant.kv import KV_FORMATS, kv_layout
from duolocal.settings import FirstUse

LONGEST_S = 20.0  # that a first answer waits for a measurement
READING_SHARE = 0.1  # of the time that the documents take anyway
WORTH_SAYING = 0.1  # of the memory, from which on a saving is told
_CHUNK = 128  # tokens that are timed
_ATTENTION_COST = 2.5  # of a multiplication, beside one of the matrices' products
_TIMED_ELEMENTS = 64_000_000  # of matrices of layers: a whole large model would take seconds itself
_DRIFT_TEXTS, _ECHO_DRAWS = 1, 3  # as in duolocal.identify, which is not imported until it is needed


@dataclass(frozen=True)
class Estimate:
    """Seconds that both measurements would take (0: not needed), and a token of reading."""

    ranking_s: float
    measuring_s: float
    token_s: float

    @property
    def total_s(self) -> float:
        return self.ranking_s + self.measuring_s


def settle_first_use(
    resolved: Resolved,
    fitted: Resolved,
    transformer: Transformer,
    free: Free,
    wish: FirstUse,
    *,
    reading: int,
    events: LoadEvents,
) -> Resolved:
    """Return `resolved` with what need not be measured settled as it is; what is still undecided is to be measured.

    fitted: what would be run unmeasured in the memory there is; transformer: its weights, loaded; free: before they
    were; reading: tokens of the documents that are given. `events` are told what was decided and what it costs.
    """
    if wish.tune or not resolved.undecided:
        return resolved
    settled = replace(resolved, heads=replace(resolved.heads, unranked=False), unmeasured=False)
    splits = fitted.heads.unranked and fitted.heads.plan.num_streaming > 0
    expected = estimate(resolved, transformer)
    if not wish.quick and expected.total_s <= max(LONGEST_S, READING_SHARE * reading * expected.token_s):
        return resolved
    duration = _about(expected.total_s)
    needed = plan_memory(resolved.request()).total
    if resolved.heads.ratio is not None and splits:
        events.announce(f"--heads {resolved.settings.heads} needs a ranking of the heads: {duration}, once")
        return replace(resolved, unmeasured=False)
    rounds = resolved.unmeasured and fitted.kv != resolved.kv
    if splits or (rounds and not wish.quick):
        plan = resolved.heads.plan
        share = plan.num_retrieval / (plan.num_retrieval + plan.num_streaming)
        which = "all heads" if share == 1 else f"{share:.0%} of the heads"
        events.announce(
            f"{which} and {resolved.kv} KV need {needed / GIB:.1f} GiB of {free.device / GIB:.1f}: "
            f"this model is measured first, {duration}, once"
        )
        return replace(resolved, unmeasured=resolved.unmeasured and not wish.quick)
    what = [f"{fitted.kv} KV"] if resolved.unmeasured else []
    if resolved.heads.unranked:
        what.insert(0, "every KV head with the whole context")
    saved = _saved(resolved)
    worth = (
        f": {needed / GIB:.1f} GiB may become {(needed - saved) / GIB:.1f}" if saved >= WORTH_SAYING * needed else ""
    )
    events.announce(
        f"this model is not measured: it starts with {' and '.join(what)}; "
        f"`duolocal tune --model {resolved.settings.model}` ({duration}, once) measures it{worth}"
    )
    return settled


def _saved(resolved: Resolved) -> int:
    """Return what the smallest result of both measurements would save."""
    heads = resolved.heads
    if heads.unranked:
        heads = replace(heads, plan=resolved.cut(UNMEASURED_RATIO))
    tuned = replace(resolved, heads=heads, kv=KV_FORMATS[-1] if resolved.unmeasured else resolved.kv)
    return plan_memory(resolved.request()).total - plan_memory(tuned.request()).total


def estimate(resolved: Resolved, transformer: Transformer) -> Estimate:
    """Return what the measurements that `resolved` lacks would take here, from a chunk of some layers that is timed."""
    config = transformer.config
    elements = resolved.weights.layer_elements // config.num_layers
    layers_s, logits_s = _timed(transformer, elements)

    def pass_s(length: int) -> float:
        """Return the seconds of one forward pass without logits; a token attends to half of the text on average."""
        attended = 2 * config.num_heads * config.head_dim * length / 2  # multiplications per token
        return length * layers_s * (1 + _ATTENTION_COST * attended / elements)

    ranking_s = 0.0
    if resolved.heads.unranked:
        length = ranking_context(config)
        passes = _DRIFT_TEXTS if length == DRIFT_POSITIONS else _ECHO_DRAWS
        ranking_s = passes * pass_s(length)
    measuring_s = 0.0
    if resolved.unmeasured:
        measuring_s = len(CANDIDATES) * (pass_s(FIRST_USE_TOKENS) + FIRST_USE_TOKENS * logits_s)
    return Estimate(ranking_s, measuring_s, layers_s)


@torch.inference_mode()
def _timed(transformer: Transformer, elements: int) -> tuple[float, float]:
    """Return the seconds per token of a chunk that all layers take, and logits with their softmax.

    elements: of a layer's matrices.
    """
    config, weights = transformer.config, transformer.weights
    count = min(config.num_layers, max(1, _TIMED_ELEMENTS // elements))
    cut: ModelConfig = replace(config, num_layers=count)
    device, dtype, kernels = transformer.device, transformer.dtype, transformer.kernels
    short = Transformer(
        cut,
        replace(weights, layers=weights.layers[:count]),
        context=_CHUNK,
        device=device,
        dtype=dtype,
        kernels=kernels,
    )
    heads = uniform_plan(num_layers=count, num_kv_heads=config.num_kv_heads, retrieval=True)
    layout = kv_layout(SAFE_KV, head_dim=config.head_dim, dtype=dtype)
    cache = DuoCache(
        heads, layout, num_heads=config.num_heads, context=_CHUNK, device=device, dtype=dtype, kernels=kernels
    )
    positions = torch.arange(_CHUNK, device=device)
    ids = positions % config.vocab_size
    best_layers_s = best_logits_s = float("inf")
    for _ in range(2):  # the first one loads what it touches
        cache.reset()
        began_s = time.perf_counter()
        cache.begin(_CHUNK)
        hidden = short.hidden(ids, positions, cache)
        cache.commit()
        _wait(device)
        between_s = time.perf_counter()
        short.logits(hidden).log_softmax(-1).exp().sum(-1)
        _wait(device)
        best_layers_s = min(best_layers_s, between_s - began_s)
        best_logits_s = min(best_logits_s, time.perf_counter() - between_s)
    return best_layers_s / _CHUNK * config.num_layers / count, best_logits_s / _CHUNK


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _about(seconds: float) -> str:
    return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} min"
