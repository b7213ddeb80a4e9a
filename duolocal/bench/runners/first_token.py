"""From nothing to the first token of a prompt, timed step by step, once per process."""

import time
from collections.abc import Sequence
from typing import Any

from duolocal.bench.runners.serve import serve
from duolocal.processes import resident_bytes
from duolocal.startup import without_collection


def first_token(settings: dict[str, Any], token_ids: Sequence[int]) -> dict[str, Any]:
    """Import, open, load with the fields of LoadSettings and answer.

    As the chat does it: Python's garbage is not collected before the load.
    """
    times = [time.perf_counter()]
    with without_collection():
        from duolocal.engine.engine import Engine
        from duolocal.models.loader import open_model
        from duolocal.settings import LoadSettings, Sampling
        from duolocal.tokenizer import load_tokenizer
    imported_bytes = resident_bytes()

    times.append(time.perf_counter())
    with without_collection():
        source = open_model(settings["model"])
        load_tokenizer(source)
    times.append(time.perf_counter())
    engine = Engine.load(source, LoadSettings(**settings))
    times.append(time.perf_counter())
    (token_id,) = engine.generate(token_ids, Sampling(temperature=0, max_tokens=1), eos_ids=frozenset())
    times.append(time.perf_counter())
    names = ("import", "open", "load", "first token")
    steps = {name: after - before for name, before, after in zip(names, times[:-1], times[1:], strict=True)}
    device = str(engine.transformer.device)
    return {
        "steps_s": steps,
        "token_id": token_id,
        "kv": engine.kv,
        "context": engine.context,
        "device": device,
        "imported_bytes": imported_bytes,
    }


if __name__ == "__main__":
    serve({"first_token": first_token})
