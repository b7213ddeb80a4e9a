"""Measure what prompt-lookup speculation gains: the same answers with and without it, in turn.

    python scripts/measure_speculation.py --model smollm2-135m [--tokens 200] [--repeats 3] [--task quote …]

Prints one line per task, medians over the repeats, and as the last line one JSON object. Every task begins with the
first estimates.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

from duolocal.engine.engine import Engine
from duolocal.engine.speculation import Speculation
from duolocal.models import registry
from duolocal.models.loader import open_model
from duolocal.settings import CHAT_SAMPLING, SUMMARY_SAMPLING
from duolocal.tokenizer import Message, load_tokenizer

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/summarize.md").read_text()[:5000]
CODE = (ROOT / "duolocal/sizes.py").read_text()[:2500]
GREEDY = replace(CHAT_SAMPLING, temperature=0.0, repetition_penalty=1.0)
TASKS = {
    "quote": (f"Repeat the following text word by word:\n\n{TEXT[:2000]}", GREEDY),
    "edit": (f"Print this code again, with a docstring for every function:\n\n{CODE}", GREEDY),
    "summary": (f"Summarize the following text:\n\n{TEXT}", SUMMARY_SAMPLING),
    "chat": (f"{TEXT}\n\nWhich options are there, and what does each do?", CHAT_SAMPLING),
    "free": ("Write a story about a lighthouse keeper who finds a strange machine.", CHAT_SAMPLING),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--task", nargs="*", default=list(TASKS))
    options = parser.parse_args()
    source = open_model(registry.resolve(options.model))
    tokenizer = load_tokenizer(source)
    engine = Engine.load(source, context=4096, kv="int8", heads="all")
    assert engine.speculation is not None, "this model's steps do not look ahead"
    list(engine.generate([1, 2, 3, 4] * 8, replace(GREEDY, max_tokens=40), eos_ids=frozenset()))  # records the steps
    results = []
    for name in options.task:
        question, sampling = TASKS[name]
        sampling = replace(sampling, seed=1, max_tokens=options.tokens)
        pieces = tokenizer.chat_pieces([Message("user", question)], add_generation_prompt=True)
        prompt = tokenizer.encode_pieces(pieces)
        engine.reset()
        for _ in engine.prefill(prompt[:-1]):
            pass
        moment = engine.snapshot()
        times: dict[str, list[float]] = {"off": [], "on": []}
        answers, counts = set(), None
        kept = Speculation()
        for _ in range(options.repeats):
            for way in times:
                engine.speculation = kept if way == "on" else None
                engine.restore(moment)
                answer = engine.generate(prompt[-1:], sampling, eos_ids=tokenizer.eos_ids)
                made = [next(answer)]
                began_s = time.perf_counter()
                made += answer
                times[way].append((time.perf_counter() - began_s) / max(1, len(made) - 1))
                answers.add(tuple(made))
        assert len(answers) == 1, "the answers differ"
        counts = kept.counts
        medians = {way: statistics.median(found) for way, found in times.items()}
        ratios = [off / on for off, on in zip(times["off"], times["on"], strict=True)]
        results.append(
            {
                "task": name,
                "prompt": len(prompt),
                "tokens": len(made),
                "off_ms": 1000 * medians["off"],
                "on_ms": 1000 * medians["on"],
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "counts": vars(counts),
                "cost": {str(ahead): cost for ahead, cost in kept.cost.items()},
            }
        )
        print(
            f"{name:8} {len(prompt):5} read {len(made):4} written  {1000 * medians['off']:6.1f} -> "
            f"{1000 * medians['on']:6.1f} ms per token, {statistics.median(ratios):.2f} times  {counts}",
            flush=True,
        )
    print(json.dumps({"model": options.model, "tasks": results}))


if __name__ == "__main__":
    main()
