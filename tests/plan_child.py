"""A process that loads a model, fills its context and decodes, and says what memory that took (Linux).

Started by tests/test_plan_memory.py with JSON as its only argument; prints JSON. Everything that a first load makes
resident once per process (code of libraries, the thread pool, allocator arenas) is touched before the baseline, by a
small model and the same settings. `limit`: bytes that may be allocated on top of the baseline. It is set as
RLIMIT_DATA, which counts private writable memory the moment it is reserved: the heap, anonymous maps and copy-on-write
maps of model files, which is what the plan counts. RLIMIT_AS would count the code of torch and every thread's unused
arena as well, and RLIMIT_RSS is not enforced by Linux.
"""

import ctypes
import gc
import json
import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any


def status() -> dict[str, int]:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {key: int(fields[key].split()[0]) * 1024 for key in ("VmHWM", "VmRSS", "VmData", "RssAnon")}


def use(folder: str, options: dict[str, Any], *, context: int) -> int:
    from duolocal.engine.engine import Engine
    from duolocal.settings import Sampling

    engine = Engine.load(folder, context=context, **options)
    sampling = Sampling(temperature=0.8, seed=1)
    token_ids = [(7 * i) % (engine.config.vocab_size - 1) for i in range(context - 16)]
    # An answer comes first, so that all weights are in memory when the long prefill begins.
    for _ in engine.generate(token_ids[:4], replace(sampling, max_tokens=4), eos_ids=frozenset()):
        pass
    for _ in engine.prefill(token_ids[4:-1]):
        pass
    made = list(engine.generate(token_ids[-1:], sampling, eos_ids=frozenset()))
    assert engine.position == context, engine.position
    return len(made)


def main() -> None:
    import torch

    asked = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    options = asked["options"]
    use(asked["small"], options | {"heads": "random@0.5", "select": "off"}, context=1024)
    if not asked.get("check", True):
        from duolocal.plan import free

        free.available_bytes = lambda device: 1 << 60
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM from here on
    before = status()
    answer: dict[str, Any] = {}
    if asked.get("limit"):
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (before["VmData"] + asked["limit"], hard))
    try:
        answer["decoded"] = use(asked["model"], options, context=asked["context"])
    except (MemoryError, RuntimeError) as error:
        answer["error"] = f"{type(error).__name__}: {error}"[:200]
    except Exception as error:
        if type(error).__name__ not in ("MemoryLimitError",):
            raise
        answer["error"] = f"{type(error).__name__}: {error}"[:200]
    after = status()
    answer["resident"] = after["VmHWM"] - before["VmRSS"]
    answer["data"] = after["VmData"] - before["VmData"]
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
