"""Choosing the KV format by measurement: what `--kv auto` does.

Small models can break under a 4-bit cache that is harmless to large ones, so there is no default for all. The
measurement feeds real text through the same weights with each format, all heads retrieval (the hardest case), and
compares the distributions of the next token with those of the 16-bit cache. A verdict ships for the models listed in
`measured.json`; for any other model it is measured on first use and kept in the cache folder.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from duolocal.cache import DuoCache
from duolocal.engine.measured import remember_kv, remembered_kv, shipped_kv
from duolocal.heads import uniform_plan
from duolocal.kernels.blocks import BlockLayout
from duolocal.kernels.interface import Rotation, StepTraits
from duolocal.models.config import ModelConfig
from duolocal.models.layer_state import LayerState
from duolocal.models.loader import ModelSource
from duolocal.models.rope import extended
from duolocal.models.transformer import Transformer
from duolocal.paths import cache_folder
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
    measured = measure_kv(
        source,
        transformer,
        token_ids,
        formats=[name for name in CANDIDATES if name != REFERENCE],
        chunk_size=chunk_size,
        state_file=cache_folder() / "kv-formats" / f"{source.fingerprint}.state.safetensors",
        on_progress=on_progress,
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


@torch.inference_mode()
def measure_kv(
    source: ModelSource,
    transformer: Transformer,
    token_ids: list[int],
    *,
    formats: Iterable[str] = ALL_FORMATS,
    chunk_size: int,
    state_file: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[KVMeasurement]:
    """Yield one measurement per format over `token_ids`, all side by side through one layer after another.

    Each is measured with all heads retrieval. transformer: of the model, for any context; state_file: where what
    stands between layers is kept, to go on from after a kill; `on_progress` gets (layers done, layers in all).
    """
    config, _ = extended(source.config, len(token_ids))
    device, dtype, kernels = transformer.device, transformer.dtype, transformer.kernels
    transformer = Transformer(
        config, transformer.weights, context=len(token_ids), device=device, dtype=dtype, kernels=kernels
    )
    names = [REFERENCE, *formats]
    layouts = {name: kv_layout(name, head_dim=config.head_dim, dtype=dtype) for name in names}
    ids = torch.tensor(token_ids, dtype=torch.int64, device=device)
    chunks = torch.arange(len(ids) - 1, device=device).split(chunk_size)
    rotations = [transformer.rotation(chunk) for chunk in chunks]
    kept = LayerState(state_file, model=source.fingerprint, texts=token_ids, formats=names, chunk_size=chunk_size)
    done, tensors = kept.read()
    states = tensors or {name: transformer.embed(ids[:-1]) for name in names}  # [num_tokens - 1, hidden_size]
    states = {name: state.to(device, dtype).clone() for name, state in states.items()}
    for layer in range(done, config.num_layers):
        for name, state in states.items():
            cache = _OneLayer(config, layouts[name], transformer, context=len(token_ids))
            for chunk, rotation in zip(chunks, rotations, strict=True):
                cache.duo.begin(len(chunk))
                state[chunk] = transformer.run_layer(layer, state[chunk], chunk, rotation, cache)
                cache.duo.commit()
        kept.keep(layer + 1, lambda: states)
        if on_progress is not None:
            on_progress(layer + 1, config.num_layers)
    tallies = {name: Predictions() for name in names}
    for chunk in chunks:
        reference: Reference | None = None
        for name in names:
            hidden = transformer.final_norm(states[name][chunk])
            log_probs = transformer.logits(hidden).log_softmax(-1)  # [chunk, vocab_size]
            reference = Reference(log_probs) if reference is None else reference
            tallies[name].add(log_probs, reference, ids[chunk + 1])
    kept.forget()
    base = tallies[REFERENCE].perplexity
    for name in names[1:]:
        tally = tallies[name]
        yield KVMeasurement(
            kv=name,
            bytes_per_token=layouts[name].bytes_per_token,
            mean_kl=tally.mean_kl,
            perplexity=tally.perplexity,
            perplexity_rise=tally.perplexity / base - 1,
            top1_agreement=tally.top1,
        )


class _OneLayer:
    """A DuoCache of one layer, all heads retrieval, for whichever layer runs."""

    def __init__(self, config: ModelConfig, layout: BlockLayout, transformer: Transformer, *, context: int) -> None:
        self.duo = DuoCache(
            uniform_plan(num_layers=1, num_kv_heads=config.num_kv_heads, retrieval=True),
            layout,
            num_heads=config.num_heads,
            context=context,
            device=transformer.device,
            dtype=transformer.dtype,
            kernels=transformer.kernels,
        )

    @property
    def traits(self) -> StepTraits:
        return self.duo.traits

    def append(self, _layer: int, k: Tensor, v: Tensor, rotation: Rotation | None = None) -> None:
        self.duo.append(0, k, v, rotation)

    def attend(self, _layer: int, q: Tensor, positions: Tensor, rotation: Rotation | None = None) -> Tensor:
        return self.duo.attend(0, q, positions, rotation)
