"""How often the passages that `duolocal.sources` names hold what the answer was made of.

    .venv/bin/python scripts/measure_sources.py [--model MODEL] [--lengths 1K,2K,4K] [--depths 10] [--text help|FILE]

A passkey or a made-up fact is hidden in real text at every depth, the model is asked and answers by itself; then the
passages of the text (64 tokens each) are ranked. Prints for each task and length how many answers were right, how often
the first passage and one of the first three hold the needle, and what three passages drawn at random would reach; the
last line is JSON.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_PROC_BIND", "true")  # two threads on one core would take forty times as long

from duolocal.engine.engine import Engine
from duolocal.evaluate.passkey import passkey_prompts
from duolocal.evaluate.prompts import Prompt
from duolocal.evaluate.tasks import niah_prompts
from duolocal.models.loader import open_model
from duolocal.models.registry import resolve
from duolocal.sample_text import sample_text
from duolocal.settings import Sampling
from duolocal.sizes import parse_tokens
from duolocal.sources import PASSAGE_TOKENS, attended
from duolocal.tokenizer import Tokenizer, load_tokenizer

TASKS = {"passkey": passkey_prompts, "niah": niah_prompts}
HEAD, TAIL = 24, 48  # tokens of a prompt before and after the text: the template, the question and the answer begun


def needle(tokenizer: Tokenizer, prompt: Prompt, passage: range) -> bool:
    """Return whether a passage holds something the answer must say; what a border cuts through is in both."""
    around = prompt.token_ids[max(0, passage.start - 4) : passage.stop + 4]
    return any(word in tokenizer.decode(around) for word in prompt.wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--lengths", default="1K,2K,4K")
    parser.add_argument("--depths", type=int, default=10)
    parser.add_argument("--text", default="help", help="help: Python's own; or a file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    source = open_model(resolve(options.model))
    tokenizer = load_tokenizer(source)
    text = sample_text() if options.text == "help" else Path(options.text).read_text(encoding="utf-8")
    lengths = [parse_tokens(length) for length in options.lengths.split(",")]
    engine = Engine.load(source, context=max(lengths) + 256)
    depths = [(at + 0.5) / options.depths for at in range(options.depths)]
    rows = []
    for task, make in TASKS.items():
        for length in lengths:
            row = {"task": task, "tokens": length, "asked": 0, "right": 0, "first": 0, "top3": 0, "top3_of_right": 0}
            chance, scores = 0.0, {True: [], False: []}
            for prompt in make(tokenizer, text, num_tokens=length, depths=depths, seed=options.seed):
                engine.reset()
                cut = prompt.num_tokens - TAIL
                list(engine.prefill(prompt.token_ids[:cut]))
                snapshot = engine.snapshot()
                answer = list(
                    engine.generate(prompt.token_ids[cut:], Sampling(temperature=0, max_tokens=prompt.max_answer))
                )
                again = range(cut, prompt.num_tokens + len(answer) - 1)
                ranked = attended(engine, snapshot.ring, again, [range(HEAD, cut)], num_queries=len(answer))
                holds = [needle(tokenizer, prompt, range(passage.start, passage.stop)) for passage in ranked]
                right = all(word in tokenizer.decode(answer) for word in prompt.wanted)
                row["asked"] += 1
                row["right"] += right
                row["first"] += holds[0]
                row["top3"] += any(holds[:3])
                row["top3_of_right"] += right and any(holds[:3])
                scores[right].append(ranked[0].score)
                chance += 1 - (1 - sum(holds) / len(holds)) ** 3
            row["chance"] = round(chance / len(depths), 3)
            for right, name in ((True, "score_right"), (False, "score_wrong")):
                row[name] = [round(min(scores[right]), 3), round(max(scores[right]), 3)] if scores[right] else None
            rows.append(row)
            print(" ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    report = {"model": options.model, "text": options.text, "heads": engine.plan.source, "kv": engine.kv}
    print(json.dumps(report | {"passage_tokens": PASSAGE_TOKENS, "rows": rows}))


if __name__ == "__main__":
    main()
