"""Choosing the KV format by measurement: what `--kv auto` does.

Small models can break under a 4-bit cache that is harmless to large ones, so there is no default for all. The
measurement feeds real text through the same weights with each format, all heads retrieval (the hardest case), and
compares the distributions of the next token with those of the 16-bit cache. A verdict ships for the models listed in
`measured.json`; for any other model it is measured on first use and kept in the cache folder.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from duolocal.cache import DuoCache
from duolocal.engine.measured import remember_kv, remembered_kv, shipped_kv
from duolocal.heads import uniform_plan
from duolocal.models.loader import ModelSource
from duolocal.models.rope import extended
from duolocal.models.transformer import Transformer
from duolocal.predictions import Predictions, Reference
from duolocal.quant.kv import KV_FORMATS, kv_layout
from duolocal.sample_text import sample_text
from duolocal.tokenizer import load_tokenizer

REFERENCE = "16"
ALL_FORMATS = tuple(name for name in KV_FORMATS if name != REFERENCE)
# A format is chosen when it costs less than this against the 16-bit cache.
MAX_KL = 0.001  # nats per token
MAX_PERPLEXITY_RISE = 0.005
CANDIDATES = ("int4", "k8v4", "int8", REFERENCE)  # by rising size; the first that passes is taken
FIRST_USE_TOKENS = 2048


@dataclass(frozen=True)
class KVMeasurement:
    """One format against the 16-bit cache, over the same tokens."""

    kv: str
    bytes_per_token: float  # per KV head
    mean_kl: float  # nats, of the 16-bit distribution from this one
    perplexity: float
    perplexity_rise: float  # relative to 16-bit
    top1_agreement: float


def known_kv(fingerprint: str) -> tuple[str, str] | None:
    """Return the format that was measured for these weights, and a line saying where; None: nowhere yet."""
    if (kv := shipped_kv(fingerprint)) is not None:
        return kv, f"KV format {kv}: the smallest that passed this model's measurement (docs/kv-formats.md)"
    if (kv := remembered_kv(fingerprint)) is not None:
        return kv, f"KV format {kv}: the smallest that passed when this model was first used here"
    return None


def choose_kv(
    source: ModelSource,
    transformer: Transformer,
    *,
    chunk_size: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[str, str]:
    """Return the format for a loaded model and a line saying where it comes from; measured unless it is known."""
    known = known_kv(source.fingerprint)
    if known is not None:
        return known
    token_ids = load_tokenizer(source).encode(sample_text())[:FIRST_USE_TOKENS]
    formats = [name for name in CANDIDATES if name != REFERENCE]
    measured = measure_kv(
        source, transformer, token_ids, formats=formats, chunk_size=chunk_size, on_progress=on_progress
    )
    results = list(measured)
    choice = verdict(results)
    remember_kv(source.fingerprint, choice, [asdict(result) for result in results])
    figures = ", ".join(f"{r.kv}: KL {r.mean_kl:.4f}, perplexity {r.perplexity_rise:+.1%}" for r in results)
    return choice, f"KV format {choice}, chosen by measurement on {len(token_ids):,} tokens ({figures})"


def verdict(results: Iterable[KVMeasurement]) -> str:
    """Return the smallest format that passes, the 16-bit one where none does."""
    by_name = {result.kv: result for result in results}
    for name in CANDIDATES:
        result = by_name.get(name)
        if result and result.mean_kl <= MAX_KL and result.perplexity_rise <= MAX_PERPLEXITY_RISE:
            return name
    return REFERENCE


def measure_kv(
    source: ModelSource,
    transformer: Transformer,
    token_ids: list[int],
    *,
    formats: Iterable[str] = ALL_FORMATS,
    chunk_size: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[KVMeasurement]:
    """Yield one measurement per format over `token_ids`, all fed side by side so that memory stays bounded.

    Each is measured with all heads retrieval. transformer: of the model, for any context; `on_progress` gets
    (tokens done, tokens in all).
    """
    config, _ = extended(source.config, len(token_ids))
    device, dtype, kernels = transformer.device, transformer.dtype, transformer.kernels
    transformer = Transformer(
        config, transformer.weights, context=len(token_ids), device=device, dtype=dtype, kernels=kernels
    )
    plan = uniform_plan(num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, retrieval=True)
    names = [REFERENCE, *formats]
    caches = {
        name: DuoCache(
            plan,
            kv_layout(name, head_dim=config.head_dim, dtype=dtype),
            num_heads=config.num_heads,
            context=len(token_ids),
            device=device,
            dtype=dtype,
            kernels=kernels,
        )
        for name in names
    }
    tallies = {name: Predictions() for name in names}
    ids = torch.tensor(token_ids, dtype=torch.int64, device=device)
    for start in range(0, len(token_ids) - 1, chunk_size):
        chunk = slice(start, min(start + chunk_size, len(token_ids) - 1))
        targets = ids[chunk.start + 1 : chunk.stop + 1]
        reference: Reference | None = None
        for name in names:
            log_probs = _log_probs(transformer, caches[name], ids, chunk)
            reference = Reference(log_probs) if reference is None else reference
            tallies[name].add(log_probs, reference, targets)
        if on_progress is not None:
            on_progress(chunk.stop + 1, len(token_ids))
    base = tallies[REFERENCE].perplexity
    for name in names[1:]:
        tally = tallies[name]
        yield KVMeasurement(
            kv=name,
            bytes_per_token=caches[name].layout.bytes_per_token,
            mean_kl=tally.mean_kl,
            perplexity=tally.perplexity,
            perplexity_rise=tally.perplexity / base - 1,
            top1_agreement=tally.top1,
        )


@torch.inference_mode()
def _log_probs(transformer: Transformer, cache: DuoCache, ids: Tensor, chunk: slice) -> Tensor:
    cache.begin(chunk.stop - chunk.start)
    positions = torch.arange(chunk.start, chunk.stop, device=ids.device)
    hidden = transformer.hidden(ids[chunk], positions, cache)
    cache.commit()
    return transformer.logits(hidden).log_softmax(-1)  # [chunk, vocab_size]
