"""LibraryBackend: byte-level and sentencepiece-like BPE through the `tokenizers` library.

Takes the description in tokenizer.json's own format and rewrites it so that text is only text: special tokens,
post-processor and truncation are taken out. Does not read files and knows no chat.
"""

import json
from collections.abc import Collection, Iterator
from itertools import islice
from typing import Any

from tokenizers import Tokenizer as Library

from duolocal.errors import TokenizerError
from duolocal.tokenizer.cuts import CutSafety, cut
from duolocal.tokenizer.parts import BYTE_OF_CHARACTER, PrefixMode, Unwritable

_MODEL_KEYS = ("vocab", "merges", "unk_token", "fuse_unk", "byte_fallback", "ignore_merges")  # others are for training
_BATCH = 16  # parts encoded at once; bounds the library's memory

_LETTERS = r"\p{L}\p{N}"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = rf"| ?[^\s{_LETTERS}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_REGEX = rf"{_CONTRACTIONS}|[^\r\n{_LETTERS}]?\p{{L}}+|\p{{N}}{{1,3}}{_TAIL}"
QWEN2_REGEX = rf"{_CONTRACTIONS}|[^\r\n{_LETTERS}]?\p{{L}}+|\p{{N}}{_TAIL}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
TEKKEN_REGEX = (
    rf"[^\r\n{_LETTERS}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n{_LETTERS}]?[{_UPPER}]+[{_LOWER}]*|\p{{N}}"
    rf"| ?[^\s{_LETTERS}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Whether a line break always ends a word; a regex that is not here is never cut around.
_ENDS_WORD_AT_LINE = {GPT2_REGEX: True, LLAMA3_REGEX: True, QWEN2_REGEX: True, TEKKEN_REGEX: False}


def _steps(component: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """Return the leaves of a normalizer or pre-tokenizer, whose sequences keep them under `inner`."""
    if component is None:
        return []
    if component["type"] == "Sequence":
        return [leaf for part in component[inner] for leaf in _steps(part, inner)]
    return [component]


def _metaspace_scheme(step: dict[str, Any]) -> str:
    """Return "always", "first" or "never"; files from before the scheme have `add_prefix_space`."""
    return step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")


def prefix_mode(description: dict[str, Any]) -> PrefixMode:
    """Return where a tokenizer.json puts a space before text."""
    if any(step["type"] == "Prepend" for step in _steps(description.get("normalizer"), "normalizers")):
        return "sections"
    for step in _steps(description.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "ByteLevel" and step.get("add_prefix_space", True):
            return "sections"
        if step["type"] == "Metaspace" and _metaspace_scheme(step) != "never":
            return "start" if _metaspace_scheme(step) == "first" else "sections"
    return "none"


def _without_prefix(component: dict[str, Any] | None, inner: str) -> dict[str, Any] | None:
    """Return a copy of a normalizer or pre-tokenizer that puts no space before text."""
    if component is None or component["type"] == "Prepend":
        return None
    if component["type"] == "Sequence":
        parts = [kept for part in component[inner] if (kept := _without_prefix(part, inner)) is not None]
        return {**component, inner: parts} if parts else None
    if component["type"] == "ByteLevel":
        return {**component, "add_prefix_space": False}
    if component["type"] == "Metaspace":
        return {**component, "prepend_scheme": "never", "add_prefix_space": False}
    return component


def cut_rules(description: dict[str, Any]) -> CutSafety:
    """Return which cuts the normalizer and pre-tokenizer allow, before the vocabulary is asked."""
    for step in _steps(description.get("normalizer"), "normalizers"):
        spaces = step["type"] == "Replace" and step["pattern"] == {"String": " "}
        if not spaces and step["type"] not in ("Prepend", "NFC"):
            return CutSafety()
    lines = True
    for step in _steps(description.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Split":
            regex = step["pattern"].get("Regex")
            if regex not in _ENDS_WORD_AT_LINE:
                return CutSafety()
            lines = lines and _ENDS_WORD_AT_LINE[regex]
        elif step["type"] not in ("ByteLevel", "Digits", "Metaspace"):
            return CutSafety()
    return CutSafety(words=True, lines=lines)


def _plain(description: dict[str, Any], special: frozenset[str]) -> dict[str, Any]:
    """Return the description with every special token taken out, so that no text can produce one."""
    added = [token for token in description.get("added_tokens") or [] if token["content"] not in special]
    model = {key: value for key, value in description["model"].items() if key in _MODEL_KEYS}
    kept = {text: index for text, index in model["vocab"].items() if text not in special}
    # Tokens added beside the vocabulary get the next free id: pin theirs by naming them in the vocabulary.
    kept.update({token["content"]: token["id"] for token in added})
    unknown = model.get("unk_token")
    if unknown in model["vocab"]:
        kept[unknown] = model["vocab"][unknown]
    merges = [merge for merge in model["merges"] if not _touches(merge, special)]
    model.update(type="BPE", vocab=kept, merges=merges, dropout=None)
    return {
        "version": "1.0",
        "added_tokens": added,
        "model": model,
        "normalizer": description.get("normalizer"),
        "pre_tokenizer": description.get("pre_tokenizer"),
        "decoder": None,
        "post_processor": None,
    }


def _touches(merge: str | list[str], special: frozenset[str]) -> bool:
    """Say whether one of the two tokens that a merge ("a b" or ["a", "b"]) joins, or what it makes, is special."""
    pair = merge.split(" ", 1) if isinstance(merge, str) else merge
    if len(pair) != 2:
        raise TokenizerError(f"the merge {str(merge)[:60]!r} does not join two tokens; the file is damaged")
    left, right = pair
    return left in special or right in special or left + right in special


def _build(description: dict[str, Any], name: str) -> Library:
    try:
        return Library.from_str(json.dumps(description))
    except Exception as error:  # the library raises Exception itself, nothing narrower
        raise TokenizerError(f"{name}: the tokenizer cannot be read ({' '.join(str(error).split())})") from error


class LibraryBackend:
    """Encodes ordinary text with a BPE model; ids of special tokens never come out of it."""

    def __init__(self, description: dict[str, Any], *, special: Collection[str], safety: CutSafety, name: str) -> None:
        plain = _plain(description, frozenset(special))
        self.prefix: PrefixMode = prefix_mode(plain)
        self._safety = safety
        self._first = _build(plain, name)
        self._later = self._first
        if self.prefix != "none":
            plain["normalizer"] = _without_prefix(plain["normalizer"], "normalizers")
            plain["pre_tokenizer"] = _without_prefix(plain["pre_tokenizer"], "pretokenizers")
            self._later = _build(plain, name)
        steps = _steps(plain["pre_tokenizer"], "pretokenizers")
        self._unwritable: Unwritable | None = None
        if any(step["type"] == "ByteLevel" for step in steps) and not plain["model"].get("unk_token"):
            vocab = plain["model"]["vocab"]
            self._unwritable = Unwritable(frozenset(b for c, b in BYTE_OF_CHARACTER.items() if c in vocab))

    def encode(self, text: str, *, prefix: bool) -> list[int]:
        """Return the ids of `text`, in parts where it is long (see `cuts`)."""
        if self._unwritable is not None:
            text = self._unwritable.replace(text)
        parts: Iterator[str] = cut(text, self._safety)
        ids: list[int] = []
        if prefix:
            ids += self._first.encode_batch_fast([next(parts)], add_special_tokens=False)[0].ids
        while batch := list(islice(parts, _BATCH)):
            for encoding in self._later.encode_batch_fast(batch, add_special_tokens=False):
                ids += encoding.ids
        return ids
