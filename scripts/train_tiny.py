"""Train a small Llama in float32 on text that every Python has, for measurements that need unquantized weights.

    .venv/bin/python scripts/train_tiny.py --out FOLDER [--minutes 10]

SmolLM2's file is rounded to 4 bits already, and no group of 128 fits its 576 features. This model (hidden size 256,
4 layers, a vocabulary of its own) is in full precision and takes groups of 32, 64 and 128. It reads Python's help
topics and the descriptions of the installed packages; every eighth of these is held out and written to
FOLDER-held-out.txt, to be measured on. Needs transformers (the test extra).
"""

import argparse
import importlib.metadata
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_PROC_BIND", "true")  # two threads on one core would take forty times as long

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from duolocal.sample_text import sample_text

VOCAB_SIZE = 2048
WINDOW = 256  # tokens
BATCH = 8  # windows per step
HELD_OUT = 8  # one of so many packages
PEAK_RATE = 2e-3


def texts() -> tuple[str, str]:
    """Return what is trained on and what is held out."""
    found = {}
    for distribution in importlib.metadata.distributions():
        text = distribution.read_text("METADATA")
        if text:
            found[distribution.name] = text
    names = sorted(found)
    held_out = "\n\n".join(found[name] for name in names[::HELD_OUT])
    seen = [found[name] for index, name in enumerate(names) if index % HELD_OUT]
    return "\n\n".join([sample_text(), *seen]), held_out


def train_tokenizer(text: str) -> Tokenizer:
    """Return a byte-level BPE tokenizer of VOCAB_SIZE entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def train(ids: torch.Tensor, *, minutes: float) -> LlamaForCausalLM:
    """Return a model trained on `ids` for so long; the rate rises for a twentieth of the time and falls to 0."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    draw = torch.Generator().manual_seed(0)
    began_s, step, told_s = time.monotonic(), 0, 0.0
    while (elapsed_s := time.monotonic() - began_s) < 60 * minutes:
        share = elapsed_s / (60 * minutes)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min(20 * share, (1 - share) / 0.95)
        starts = torch.randint(len(ids) - WINDOW, (BATCH,), generator=draw)
        batch = torch.stack([ids[start : start + WINDOW] for start in starts])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if elapsed_s - told_s > 15:
            told_s = elapsed_s
            print(f"{elapsed_s / 60:.1f} of {minutes:g} min, step {step}, loss {loss.item():.3f}", flush=True)
    print(f"{step} steps of {BATCH * WINDOW} tokens")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--minutes", type=float, default=10, help="how long to train (default: 10)")
    options = parser.parse_args()
    seen, held_out = texts()
    tokenizer = train_tokenizer(seen)
    ids = torch.tensor(tokenizer.encode(seen).ids)
    print(f"{len(ids):,} tokens to train on, {len(tokenizer.encode(held_out).ids):,} held out", flush=True)
    model = train(ids, minutes=options.minutes)
    model.save_pretrained(options.out)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(options.out)
    options.out.with_name(f"{options.out.name}-held-out.txt").write_text(held_out, encoding="utf-8")


if __name__ == "__main__":
    main()
