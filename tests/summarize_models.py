"""What the tests of summaries share: a tiny model with a chat template, on the spot or as a folder, and documents.

Run as a program it is a job that gets killed: `python -m tests.summarize_models MODEL INPUTS OUT LOG`.
"""

import os
import sys
from pathlib import Path

import torch

from duolocal.engine.engine import Engine
from duolocal.settings import Sampling
from duolocal.summarize import Opened, Output, Record, Summarizer
from duolocal.tokenizer import Tokenizer
from tests.session_models import PLAN, quiet_model, tiny_tokenizer

GREEDY = Sampling(temperature=0, max_tokens=12, seed=0)
WORDS = ["river", "mill", "stone", "wheel", "flour", "rye", "oak", "pond", "baker", "letter", "county", "ship", "crane"]


def tiny_engine(folder: Path, template: str = "chatml", *, context: int = 512) -> tuple[Engine, Tokenizer]:
    """Return an engine of a seeded random model that never says a special token, and its tokenizer."""
    tokenizer = tiny_tokenizer(folder, template)
    return Engine.build(quiet_model(tokenizer, context=context), PLAN, kv="int8", chunk_size=64), tokenizer


def text_of(seed: int, num_words: int = 40) -> str:
    """Return a little prose, the same for every call with one seed."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (num_words,), generator=generator).tolist()
    words = [WORDS[pick] for pick in picks]
    lines = [" ".join(words[at : at + 8]).capitalize() + "." for at in range(0, num_words, 8)]
    return f"Number {seed}. " + " ".join(lines) + "\n"


def main() -> None:
    """Summarise a folder into OUT, writing to LOG what is begun and what is done, each before going on."""
    torch.set_num_threads(1)
    model, inputs, out, log = map(Path, sys.argv[1:])
    engine, tokenizer = tiny_engine(model)
    summarizer = Summarizer(engine, tokenizer, sampling=GREEDY)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with Output(out, format="jsonl" if out.suffix == ".jsonl" else "csv", resume=True) as output:
        os.write(handle, f"run {os.getpid()}\n".encode())
        for event in summarizer.run([inputs], output=output):
            if isinstance(event, Opened | Record):
                kind = "begin" if isinstance(event, Opened) else "done"
                os.write(handle, f"{kind} {event.name}\n".encode())


if __name__ == "__main__":
    main()
