"""Decode speed of duolocal over real text, and how much of the machine's memory bandwidth that is."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from duolocal.bench.timing import Spread, spread
from duolocal.cache.cache import exact_recent_size
from duolocal.engine.engine import Engine
from duolocal.settings import Sampling


@dataclass(frozen=True)
class DecodeSpeed:
    """Decode at one length."""

    context: int  # tokens in the cache before the first decoded one
    token_s: Spread  # seconds per token
    weight_bytes: int  # read per token
    kv_bytes: int  # read per token

    @property
    def bytes_per_s(self) -> float:
        """Bytes that a token needs, over the median time of one."""
        return (self.weight_bytes + self.kv_bytes) / self.token_s.median

    def report(self) -> dict[str, object]:
        """Return the figures as JSON holds them."""
        return {
            "context": self.context,
            "ms_per_token": self.token_s.milliseconds(),
            "tokens_per_s": self.token_s.per_s(1),
            "weight_bytes_per_token": self.weight_bytes,
            "kv_bytes_per_token": self.kv_bytes,
            "gb_per_s": round(self.bytes_per_s / 1e9, 3),
        }


def measure_decode(
    engine: Engine,
    token_ids: Sequence[int],
    contexts: Sequence[int],
    *,
    num_tokens: int,
    repeats: int,
    on_step: Callable[[str], None] = lambda _: None,
) -> Iterator[DecodeSpeed]:
    """Fill the cache once; at each of the ascending `contexts` time `num_tokens` greedy tokens, `repeats` times.

    Decoded tokens are removed again; one token before the timed ones is not timed. `token_ids` holds at least one
    token more than the longest context, and the engine has room for `num_tokens` + 1 more.
    """
    sampling = Sampling(temperature=0, max_tokens=num_tokens + 1)
    for context in contexts:
        on_step(f"filling up to {context:,} tokens")
        engine.prefill(token_ids[engine.position : context])
        moment = engine.snapshot()
        times = []
        for run in range(repeats):
            on_step(f"{context:,} tokens: run {run + 1} of {repeats}")
            tokens = engine.generate([token_ids[context]], sampling, eos_ids=frozenset())
            next(tokens)
            began_s = time.perf_counter()
            for _ in tokens:
                pass
            times.append((time.perf_counter() - began_s) / num_tokens)
            engine.restore(moment)
        weight_bytes, kv_bytes = bytes_per_token(engine)
        yield DecodeSpeed(context, spread(times), weight_bytes, kv_bytes)


def bytes_per_token(engine: Engine) -> tuple[int, int]:
    """Return the bytes of weights and of keys and values that one decoded token must read at the engine's position.

    They follow from the plan and the formats, whatever the kernels really touch: every matrix once, of an embedding
    of its own only a row; for every head its window, for a retrieval head also the blocks with older tokens.
    """
    weights, plan, layout = engine.transformer.weights, engine.plan, engine.cache.layout
    weight_bytes = engine.memory().weights
    if weights.lm_head is not weights.embedding:
        weight_bytes -= weights.embedding.nbytes
    seen, exact = engine.position + 1, exact_recent_size(plan)  # a token sees itself
    token_bytes = 2 * layout.head_dim * engine.cache.dtype.itemsize
    retrieval_window = min(seen, plan.sink_size + exact)
    streaming_window = min(seen, plan.sink_size + plan.recent_size)
    windows = plan.num_retrieval * retrieval_window + plan.num_streaming * streaming_window
    first, end = plan.sink_size // layout.block_size, -(-(seen - exact) // layout.block_size)
    blocks = plan.num_retrieval * max(0, end - first)
    return weight_bytes, windows * token_bytes + blocks * layout.record_bytes
