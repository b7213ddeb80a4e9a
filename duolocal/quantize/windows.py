"""Calibration text as windows of token ids, at seeded places all over it."""

import hashlib
import random
from collections.abc import Sequence

from duolocal.errors import SettingsError
from duolocal.sample_text import sample_text
from duolocal.tokenizer import Tokenizer

MIN_TOKENS = 16  # of a window: fewer tell nothing about attention's outputs


def calibration_windows(
    tokenizer: Tokenizer, text: str | None, *, num_samples: int, num_tokens: int, seed: int
) -> list[list[int]]:
    """Return `num_samples` windows of `num_tokens` tokens that do not overlap; BOS is the first where text has one.

    text: None for Python's own help texts. The spare tokens of the text are spread between the windows by chance.
    Raises SettingsError where it is too short: nothing is repeated.
    """
    if num_tokens < MIN_TOKENS:
        raise SettingsError(f"--tokens is {num_tokens}: give {MIN_TOKENS} or more per sample")
    ids = tokenizer.encode(sample_text() if text is None else text)
    bos = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    size = num_tokens - len(bos)
    spare = len(ids) - num_samples * size
    if spare < 0:
        what = "the built-in text" if text is None else "the text"
        fewer = f"use --samples {len(ids) // size}" if len(ids) >= size else f"use --tokens {len(ids)} or fewer"
        raise SettingsError(
            f"{what} has {len(ids):,} tokens, {num_samples} samples of {num_tokens} want {num_samples * num_tokens:,}: "
            f"{fewer}, or a longer text"
        )
    gaps = sorted(random.Random(f"calibration {seed}").choices(range(spare + 1), k=num_samples))
    return [bos + ids[at * size + gap : (at + 1) * size + gap] for at, gap in enumerate(gaps)]


def digest(windows: Sequence[Sequence[int]]) -> str:
    """Return a hash of the windows: what a run depends on of its text."""
    return hashlib.sha256(repr([list(window) for window in windows]).encode()).hexdigest()
