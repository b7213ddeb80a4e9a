"""The text that is measured with: real, the same on every machine with the same Python, numpy and torch."""

from duolocal.sample_text import license_text, sample_text
from duolocal.tokenizer import Tokenizer


def text_ids(tokenizer: Tokenizer, count: int) -> list[int]:
    """Return `count` ids: Python's help topics, then the licences of numpy and torch, then both again."""
    ids = tokenizer.encode(sample_text(), bos=True)
    more: list[int] = []
    while len(ids) < count:
        more = more or tokenizer.encode(license_text()) + tokenizer.encode(sample_text())
        ids += more
    return ids[:count]
