"""Selected decode for a model: the budget behind `--select`, and the channels that digests of its keys hold.

Channels are found once per model and context, from queries and keys of a text that comes with Python, and kept in the
cache folder. They come in pairs that RoPE turns together. A pair counts by how large queries are in it and by how much
keys differ in it at positions all over the context: the product is how far the scores of keys lie apart through it.
"""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from duolocal.errors import SettingsError
from duolocal.files import read_json, write_json
from duolocal.heads import HeadPlan
from duolocal.kernels.digest import DigestChannels, digest_channels, largest_gpu_budget
from duolocal.kernels.interface import Rotation, StepTraits
from duolocal.models.config import ModelConfig
from duolocal.models.loader import ModelSource
from duolocal.models.observe import ObservedCache, layer_by_layer, shown_attention
from duolocal.models.transformer import Transformer
from duolocal.paths import cache_folder
from duolocal.quant.kv import DEFAULT_BLOCK_SIZE
from duolocal.sample_text import sample_text
from duolocal.sizes import parse_tokens
from duolocal.tokenizer import load_tokenizer

AUTO_BUDGET = 2048  # tokens; what it costs: docs/selection.md
AUTO_LEAST_CONTEXT = 32 * 1024  # tokens; in a shorter context reading everything costs little
LEARNT_TOKENS = 1024
_CHUNK = 256  # tokens
_CHARACTERS_PER_TOKEN = 8  # of English no tokenizer makes fewer tokens


def selection_budget(select: str, context: int, *, config: ModelConfig, kernels: str) -> int | None:
    """Return the token budget that "off", "auto" or a number stands for, None for reading all.

    kernels: the name of those that will choose; on a GPU they have a limit. Raises SettingsError.
    """
    if select == "off":
        return None
    if select == "auto":
        return AUTO_BUDGET if context >= AUTO_LEAST_CONTEXT else None
    budget = parse_tokens(select, "--select")
    if budget < DEFAULT_BLOCK_SIZE:
        raise SettingsError(f"--select is {select}: give off, auto, or {DEFAULT_BLOCK_SIZE} tokens or more")
    largest = largest_gpu_budget(config.num_heads // config.num_kv_heads) * DEFAULT_BLOCK_SIZE
    if kernels == "triton" and budget > largest:
        raise SettingsError(
            f"--select is {select}: on a GPU this model reads up to {largest:,} tokens; give fewer, or off"
        )
    return budget


def selection_note(budget: int) -> str:
    """Say what selected decode means for answers."""
    return (
        f"answers read selected blocks: {budget:,} tokens per retrieval head beside the first and the last ones, "
        "chosen anew every few tokens; --select off reads all"
    )


def choose_channels(
    source: ModelSource | None,
    transformer: Transformer,
    plan: HeadPlan,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> DigestChannels:
    """Return the digest channels of every retrieval head of `plan`, in order: found now, or remembered.

    transformer: the one of the session, whose context says where keys may lie. `on_progress` gets (done, total) tokens.
    """
    key = _key(source, transformer)
    learnt = None if key is None else _remembered(key, transformer)
    if learnt is None:
        learnt = _learn(source, transformer, on_progress)
        if key is not None:
            _remember(key, learnt)
    flags = torch.tensor(plan.retrieval)
    return DigestChannels(learnt.channels[flags], learnt.centre[flags])


@dataclass(frozen=True)
class _Learnt:
    """channels int32 and centre float32, each [num_layers, num_kv_heads, num_channels]."""

    channels: Tensor
    centre: Tensor


def _learn(
    source: ModelSource | None, transformer: Transformer, on_progress: Callable[[int, int], None] | None
) -> _Learnt:
    config, device = transformer.config, transformer.device
    count = min(LEARNT_TOKENS, transformer.context, config.max_positions)
    if source is None:  # a model without a tokenizer, as benchmarks make them
        token_ids = torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(0))
    else:
        text = sample_text()[: count * _CHARACTERS_PER_TOKEN]
        token_ids = torch.tensor(load_tokenizer(source).encode(text)[:count])
    count = len(token_ids)
    far = torch.linspace(0, transformer.context - 1, count, device=device).long()
    far = far[torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(device)]
    shape = (3, config.num_layers, config.num_kv_heads, config.head_dim)
    sums = torch.zeros(shape, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
    with torch.inference_mode():
        layers = layer_by_layer(
            transformer,
            token_ids.to(device),
            lambda layer: _Moments(transformer, transformer.rotation(far), sums[:, layer]),
            chunk_size=_CHUNK,
        )
        for layer, _ in enumerate(layers, 1):
            if on_progress is not None:
                on_progress(count * layer // config.num_layers, count)
    squared_queries, mean, squared_keys = sums / count
    weight = squared_queries * (squared_keys - mean**2)  # [layers, kv_heads, head_dim]
    half, pairs = config.head_dim // 2, digest_channels(config.head_dim) // 2
    best = (weight[..., :half] + weight[..., half:]).topk(pairs).indices.sort().values
    channels = torch.cat((best, best + half), dim=-1)
    return _Learnt(channels.int().cpu(), mean.gather(-1, channels).float().cpu())


class _Moments(ObservedCache):
    """A layer's cache that sums up what passes through it; it applies RoPE itself, to keys at other positions too.

    far: angles of those positions, one for each token from 0 on. sums: of squared queries, keys and squared keys
    [3, num_kv_heads, head_dim].
    """

    traits = StepTraits(rotates=True)

    def __init__(self, transformer: Transformer, far: Rotation, sums: Tensor) -> None:
        super().__init__(shown_attention())
        self._rotate, self._far, self._sums = transformer.kernels.rotate, far, sums

    def append(self, layer: int, k: Tensor, v: Tensor, rotation: Rotation | None = None) -> None:
        """Take k and v [q_len, num_kv_heads, head_dim] without RoPE."""
        self._new = k, v

    def attend(self, layer: int, q: Tensor, positions: Tensor, rotation: Rotation | None = None) -> Tensor:
        """Attend from q [q_len, num_heads, head_dim] without RoPE."""
        assert rotation is not None
        k, v = self._new
        wide = self._sums.dtype
        # The sum over a pair does not change when RoPE turns it.
        self._sums[0] += q.to(wide).square().unflatten(1, (k.shape[1], -1)).sum((0, 2))
        _, far = self._rotate(q, k, Rotation(self._far.cos[positions], self._far.sin[positions]))
        self._sums[1] += far.to(wide).sum(0)
        self._sums[2] += far.to(wide).square().sum(0)
        q, k = self._rotate(q, k, rotation)
        super().append(layer, k, v)
        return super().attend(layer, q, positions)


def _key(source: ModelSource | None, transformer: Transformer) -> str | None:
    """Return what the channels depend on, as a file's name; None for a model that is in no file."""
    if source is None:
        return None
    config = transformer.config
    what = (source.fingerprint, transformer.context, config.rope_theta, *astuple(config.rope_scaling))
    return hashlib.sha256(repr(what).encode()).hexdigest()[:32] + ".json"


def _remembered(key: str, transformer: Transformer) -> _Learnt | None:
    config = transformer.config
    wanted = (config.num_layers, config.num_kv_heads, digest_channels(config.head_dim))
    try:
        data = read_json(cache_folder() / "selection" / key) or {}
        channels = torch.tensor(data["channels"], dtype=torch.int32)
        centre = torch.tensor(data["centre"], dtype=torch.float32)
    except (ValueError, TypeError, KeyError):
        return None  # absent or damaged: they are found again
    if channels.shape != wanted or centre.shape != wanted or not bool(centre.isfinite().all()):
        return None
    if int(channels.min()) < 0 or int(channels.max()) >= config.head_dim:
        return None
    return _Learnt(channels, centre)


def _remember(key: str, learnt: _Learnt) -> None:
    """Keep the channels; a cache folder that cannot be written only means finding them again."""
    with suppress(OSError):
        path = cache_folder() / "selection" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"channels": learnt.channels.tolist(), "centre": learnt.centre.tolist()}, indent=None)
