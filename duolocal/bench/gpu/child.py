"""One section of the suite, in a process of its own: `python -m duolocal.bench.gpu.child '<settings as JSON>'`.

Writes one JSON object per result to the records file as soon as it is known; everything printed belongs to the log.
"""

import faulthandler
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main(settings: dict[str, Any]) -> None:
    """Run the section that `settings` name; see `suite.py` for what they hold."""
    # The parent ends us too; this shows where we were.
    faulthandler.dump_traceback_later(max(1.0, settings["left_s"]), exit=True)
    deadline = time.monotonic() + settings["left_s"]
    if settings["device"] == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    import torch

    from duolocal.bench.gpu.measure import Bench, Ceilings
    from duolocal.bench.gpu.sizes import SIZES

    with Path(settings["records"]).open("a", encoding="utf-8") as file:

        def emit(record: dict[str, Any]) -> None:
            file.write(json.dumps(record, default=str) + "\n")
            file.flush()

        ceilings = settings.get("ceilings")
        bench = Bench(
            device=torch.device(settings["device"]),
            dtype=torch.bfloat16 if settings["device"] == "cuda" else torch.float16,
            sizes=SIZES[settings["sizes"]],
            deadline=deadline - settings["reserve_s"],
            emit=emit,
            known_ceilings=Ceilings(**ceilings) if ceilings else None,
            profile_path=settings.get("profile"),
        )
        module, function = settings["run"].split(":")
        run = getattr(importlib.import_module(module), function)
        with torch.inference_mode():
            run(bench)
            bench.synchronize()
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
