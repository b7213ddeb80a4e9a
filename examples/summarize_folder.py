"""Summarise a folder from Python: python examples/summarize_folder.py FOLDER [OUT.jsonl] [MODEL]

Run it again after an interruption: what is in OUT.jsonl is not done a second time.
"""

import sys
from pathlib import Path

from duolocal import Engine
from duolocal.summarize import Output, summarize
from duolocal.tokenizer import load_tokenizer


def main(folder: str, out: str = "summaries.jsonl", model: str = "smollm2-135m") -> None:
    """Print every new summary; all of them are in `out`."""
    engine, tokenizer = Engine.load(model), load_tokenizer(model)
    with Output(Path(out), resume=True) as output:
        for record in summarize([folder], engine, tokenizer, out=output, length="short"):
            print(f"{record.name}: {record.error or record.summary}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
