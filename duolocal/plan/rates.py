"""Measuring how fast this machine computes a model: some layers of its shape and formats, with the kernels themselves.

A chunk and a decode step are timed twice, with nothing in the context and with a few thousand tokens there: the first
gives the products, the difference attention. Weights of a file that is here are used; for a model that is not, random
ones of the same shapes and formats. Seconds, once per machine and model shape: the result is kept in the cache folder.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch

from duolocal.cache import DuoCache
from duolocal.files import JsonCache
from duolocal.heads import uniform_plan
from duolocal.kernels.blocks import BlockLayout
from duolocal.kernels.cpu.cpuinfo import cpu_name
from duolocal.kernels.interface import Kernels
from duolocal.models.assemble import TensorSource, assemble
from duolocal.models.config import ModelConfig
from duolocal.models.synthetic import RandomTensors, fill_with_random_tokens
from duolocal.models.transformer import Transformer
from duolocal.models.weights import ModelWeights
from duolocal.paths import cache_folder
from duolocal.plan.duration import Rates
from duolocal.plan.weights import AWQ_GROUP
from duolocal.quant.weight import Weight

VERSION = 1  # of what is measured: figures of another one are not taken
CHUNK = 128  # tokens
HISTORY = 4096  # tokens in the context
LEAST_BYTES = 96 << 20  # of weights: more than a processor's caches hold
_OUTPUT_ROWS = 8192
_DISTINCT_BLOCKS = 64
_REPEATS = 3


@dataclass(frozen=True)
class Sample:
    """A model cut to a few layers, and what its weights take."""

    config: ModelConfig
    weights: ModelWeights
    layer_bytes: int
    layer_elements: int


def sample_model(
    config: ModelConfig,
    tensors: TensorSource | None,
    *,
    layer_format: str,
    outer_format: str,
    layer_bytes: int,
    device: torch.device,
    dtype: torch.dtype,
    arrange: Callable[[Weight], Weight] | None,
) -> Sample:
    """Return as many layers as do not fit into a processor's caches, from `tensors` or random ones.

    layer_bytes: of all layers of the model. The vocabulary is cut where weights are random.
    """
    count = min(config.num_layers, max(1, -(-LEAST_BYTES * config.num_layers // max(1, layer_bytes))))
    cut = replace(config, num_layers=count)
    if tensors is None:
        cut = replace(cut, vocab_size=_OUTPUT_ROWS, tie_embeddings=True, bos_id=None, eos_ids=())
        tensors = RandomTensors(layer_format, outer_format, group_size=AWQ_GROUP, device=device)
    weights = assemble(cut, tensors, device=device, dtype=dtype, arrange=arrange)
    outer = {id(weights.embedding), id(weights.lm_head)}
    matrices = [matrix for matrix in weights.matrices() if id(matrix) not in outer]
    return Sample(
        cut,
        weights,
        sum(matrix.nbytes for matrix in matrices),
        sum(matrix.out_features * matrix.in_features for matrix in matrices),
    )


@torch.inference_mode()
def measure_rates(
    sample: Sample,
    layout: BlockLayout,
    *,
    kernels: Kernels,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Callable[[int, int], None] | None = None,
) -> Rates:
    """Time chunks and decode steps of `sample`; a few seconds. `on_progress` gets (steps done, steps in all)."""
    config = sample.config
    heads = uniform_plan(num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, retrieval=True)
    context = HISTORY + CHUNK
    transformer = Transformer(config, sample.weights, context=context, device=device, dtype=dtype, kernels=kernels)
    cache = DuoCache(
        heads,
        layout,
        num_heads=config.num_heads,
        context=context,
        device=device,
        dtype=dtype,
        kernels=kernels,
    )
    done = 0

    def timed(count: int, start: int) -> float:
        nonlocal done
        best = float("inf")
        ids = torch.arange(count, device=device) % config.vocab_size
        positions = torch.arange(start, start + count, device=device)
        for _ in range(_REPEATS + 1):  # the first one loads what it touches
            cache.reset()
            fill_with_random_tokens(cache, start, seed=0, distinct_blocks=_DISTINCT_BLOCKS)
            _wait(device)
            began_s = time.perf_counter()
            cache.begin(count)
            transformer.hidden(ids, positions, cache)
            cache.commit()
            _wait(device)
            best = min(best, time.perf_counter() - began_s)
            done += 1
            if on_progress is not None:
                on_progress(done, 5 * (_REPEATS + 1))
        return best

    chunk_s, chunk_far_s = timed(CHUNK, 0), timed(CHUNK, HISTORY)
    step_s, step_far_s = timed(1, 0), timed(1, HISTORY)
    hidden = torch.ones(1, config.hidden_size, dtype=dtype, device=device)
    output_s = float("inf")
    for _ in range(_REPEATS + 1):
        _wait(device)
        began_s = time.perf_counter()
        transformer.logits(hidden)
        _wait(device)
        output_s = min(output_s, time.perf_counter() - began_s)
        done += 1
        if on_progress is not None:
            on_progress(done, 5 * (_REPEATS + 1))
    rows = config.num_layers * config.num_kv_heads
    attention_flop = 4.0 * config.head_dim * config.num_heads * config.num_layers * CHUNK * HISTORY
    return Rates(
        products=2.0 * sample.layer_elements * CHUNK / chunk_s,
        attention=attention_flop / _difference(chunk_far_s, chunk_s),
        weights=sample.layer_bytes / step_s,
        blocks=rows * HISTORY * layout.bytes_per_token / _difference(step_far_s, step_s),
        output=sample.weights.lm_head.nbytes / output_s,
        step_s=0.0,
        link=None,
        source="measured on this machine",
        measured=True,
    )


def rates_key(**facts: object) -> str:
    """Return the name under which rates are kept: of all that they depend on."""
    facts |= {"version": VERSION, "machine": _machine(), "torch": torch.__version__}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def known_rates(key: str) -> Rates | None:
    """Return rates that were measured here before, or None (also for a damaged file)."""
    try:
        rates = Rates(**_cache().get(key))
    except TypeError:
        return None
    numbers = (rates.products, rates.attention, rates.weights, rates.blocks, rates.output)
    return rates if all(isinstance(number, float) and number > 0 for number in numbers) else None


def keep_rates(key: str, rates: Rates) -> None:
    """Keep rates; a cache folder that cannot be written only means measuring again."""
    _cache().put(key, asdict(rates))


def _cache() -> JsonCache:
    return JsonCache(cache_folder() / "rates.json")


def _machine() -> list[str]:
    return [cpu_name(), torch.cuda.get_device_name() if torch.cuda.is_available() else ""]


def _difference(far_s: float, near_s: float) -> float:
    """Return what the context added; where noise hides it, a hundredth of the whole."""
    return max(far_s - near_s, 0.01 * far_s)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
