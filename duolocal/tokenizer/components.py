"""Which normalizers and pre-tokenizers of a tokenizer.json are used, and whether they are sure to end.

A tokenizer.json comes with a download and is a small program: its patterns may take for ever to match, its
replacements may make a text a million times longer, and some settings make the library that runs it panic. What the
families that duolocal runs have is accepted; the rest is refused in one line before anything is built from it.
"""

import re
from collections.abc import Iterator
from typing import Any

from duolocal.errors import TokenizerError

_MOST_STEPS = 32
_LONGEST_TEXT = 16  # characters that a step puts in
_MOST_GROWING = 2  # replacements by something longer
_LONGEST_PATTERN = 4000  # characters
_MOST_OPEN = 2  # quantifiers without an end in a row: each multiplies the time by the length of the text
_MOST_OPTIONAL = 8  # quantifiers with a choice in a row: each may double the time
_MOST_REPEATS = 100
_GROUPS = ("?:", "?i:", "?=", "?!", "?<=", "?<!", "?>", "?i-u:", "?s:", "?is:")
# Escapes that are no reference to a group and no call of one.
_ESCAPE = re.compile(r"\\(?:[pP]\{\^?[\w ]+\}|x\{[0-9A-Fa-f]+\}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|[^1-9kgXRK])")
_QUANTIFIER = re.compile(r"(?:[*+?]|\{(\d{1,6})?(,)?(\d{1,6})?\})[+?]?")


def check_components(description: dict[str, Any], name: str) -> None:
    """Raise TokenizerError unless every step before the vocabulary is one that is sure to end."""
    steps = [("normalizer", step) for step in _leaves(description.get("normalizer"), "normalizers", name)]
    steps += [("pre_tokenizer", step) for step in _leaves(description.get("pre_tokenizer"), "pretokenizers", name)]
    if len(steps) > _MOST_STEPS:
        raise TokenizerError(f"{name}: prepares text in {len(steps)} steps, wanted at most {_MOST_STEPS}: damaged")
    growing = 0
    for part, step in steps:
        kind, known = step["type"], _NORMALIZERS if part == "normalizer" else _PRE_TOKENIZERS
        if kind not in known:
            raise TokenizerError(f"{name}: {part} {kind!r:.60} is not one that duolocal reads ({', '.join(known)})")
        for key in ("content", "prepend", "replacement"):
            text = step.get(key, "")
            longest = 1 if key == "replacement" else _LONGEST_TEXT
            if not isinstance(text, str) or len(text) > longest:
                raise TokenizerError(
                    f"{name}: {kind} puts in {text!r:.60}, wanted at most {longest} characters: damaged"
                )
        pattern = step.get("pattern")
        if pattern is not None:
            growing += _check_pattern(pattern, step.get("content"), f"{name}: {kind}")
    if growing > _MOST_GROWING:
        raise TokenizerError(
            f"{name}: {growing} replacements make text longer, wanted at most {_MOST_GROWING}: damaged"
        )


_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend", "Replace", "Strip", "StripAccents")
_PRE_TOKENIZERS = ("ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "Whitespace", "WhitespaceSplit")


def _leaves(component: Any, inner: str, name: str, depth: int = 0) -> Iterator[dict[str, Any]]:
    if component is None:
        return
    if not isinstance(component, dict) or not isinstance(component.get("type"), str) or depth > 4:
        raise TokenizerError(f"{name}: a step among the {inner} is {component!r:.60}, wanted an object: damaged")
    if component["type"] != "Sequence":
        yield component
        return
    parts = component.get(inner)
    if not isinstance(parts, list):
        raise TokenizerError(f"{name}: a sequence of {inner} is {parts!r:.60}, wanted a list: damaged")
    for part in parts:
        yield from _leaves(part, inner, name, depth + 1)


def _check_pattern(pattern: Any, content: str | None, where: str) -> bool:
    """Check what a Split or Replace looks for; return whether it replaces by something longer."""
    if isinstance(pattern, dict) and len(pattern) == 1:
        kind, text = next(iter(pattern.items()))
        if kind in ("Regex", "String") and isinstance(text, str) and text:
            if kind == "Regex":
                check_regex(text, where)
            return content is not None and len(content) > (len(text) if kind == "String" else 1)
    raise TokenizerError(f"{where} looks for {pattern!r:.60}, wanted a text or a regular expression: damaged")


def check_regex(pattern: str, where: str) -> None:
    """Raise TokenizerError unless a regular expression is sure to match, or not, in reasonable time.

    That is one without references, with few quantifiers in a row, whose groups are repeated only where they match in
    one way.
    """

    def refuse(reason: str) -> TokenizerError:
        return TokenizerError(f"{where} has the pattern {pattern!r:.80}, which {reason}: duolocal does not run it")

    if len(pattern) > _LONGEST_PATTERN:
        raise TokenizerError(f"{where} has a pattern of {len(pattern)} characters, wanted at most {_LONGEST_PATTERN}")
    # Of every open group and alternative: quantifiers without an end, and with a choice.
    branches: list[list[tuple[int, int]]] = [[(0, 0)]]
    at, last = 0, ""  # what a quantifier would repeat: "atom", "group", "plain group" (one way), "" for nothing
    while at < len(pattern):
        character = pattern[at]
        quantifier = _QUANTIFIER.match(pattern, at) if last else None
        if quantifier is not None:
            text = quantifier[0]
            most = 1 if text[0] == "?" else None if text[0] in "*+" or (quantifier[2] and not quantifier[3]) else 0
            if most == 0:
                most = int(quantifier[3] or quantifier[1] or 0)
            if most is not None and most > _MOST_REPEATS:
                raise refuse(f"repeats {most} times")
            if most != 1 and (last == "group" or (last == "plain group" and most is not None)):
                raise refuse("repeats a group")
            choice = most is not None and not (quantifier[1] and not quantifier[2])
            unbounded, optional = branches[-1][-1]
            branches[-1][-1] = (unbounded + (most is None), optional + choice)
            at, last = quantifier.end(), ""
            continue
        if character == "\\":
            escape = _ESCAPE.match(pattern, at)
            if escape is None:
                raise refuse("refers to a group, or is damaged")
            at, last = escape.end(), "atom"
        elif character == "[":
            at, last = _class_end(pattern, at, refuse), "atom"
        elif character == "(":
            opening = next((text for text in _GROUPS if pattern.startswith(text, at + 1)), "")
            if not opening and pattern.startswith(("?", "*"), at + 1):
                raise refuse("has a group of a kind that is not known")
            branches.append([(0, 0)])
            at, last = at + 1 + len(opening), ""
        elif character == ")":
            if len(branches) == 1:
                raise refuse("closes a group that is not open")
            inner = branches.pop()
            unbounded, optional = branches[-1][-1]
            most_open, most_optional = (max(counts) for counts in zip(*inner, strict=True))
            branches[-1][-1] = (unbounded + most_open, optional + most_optional)
            at, last = at + 1, "plain group" if inner == [(0, 0)] else "group"
        elif character == "|":
            branches[-1].append((0, 0))
            at, last = at + 1, ""
        else:
            at, last = at + 1, "atom"
        if any(counts[0] > _MOST_OPEN or counts[1] > _MOST_OPTIONAL for counts in branches[-1]):
            raise refuse("may take for ever")
    if len(branches) > 1:
        raise refuse("leaves a group open")
    if any(counts[0] > _MOST_OPEN or counts[1] > _MOST_OPTIONAL for counts in branches[-1]):
        raise refuse("may take for ever")


def _class_end(pattern: str, at: int, refuse: Any) -> int:
    """Return where the class of characters that begins at `at` ends; classes may stand in classes."""
    depth, start = 0, at
    while at < len(pattern):
        character = pattern[at]
        if character == "\\":
            at += 1
        elif character == "[":
            depth += 1
        elif character == "]" and at > start + 1:
            depth -= 1
            if depth == 0:
                return at + 1
        at += 1
    raise refuse("leaves a class of characters open")
