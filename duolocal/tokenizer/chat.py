"""A conversation as pieces: which part is the template's, which is a message's, and where special tokens stand.

Owns `Message`, `ChatPiece` and the cutting of a rendered template. Only the template can write special tokens:
the same strings inside a message are text, so a document that contains "<|im_end|>" cannot end the turn.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from duolocal.errors import TokenizerError
from duolocal.tokenizer.parts import SpecialToken
from duolocal.tokenizer.template import ChatTemplate

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise TokenizerError(f"message role is {self.role!r}; wanted system, user or assistant")


@dataclass(frozen=True)
class ChatPiece:
    """A run of a rendered conversation: one special token, or text.

    `after_special` says that the text directly follows a special token in its conversation: some tokenizers put
    a space there, also when the piece is encoded in a slice.
    """

    text: str
    special_id: int | None = None
    message: int | None = None  # index of the message whose content this is; None for the template's text
    after_special: bool = False


def special_pattern(specials: Mapping[str, SpecialToken]) -> re.Pattern[str] | None:
    """Return what matches any special token's text, the longest first; None where there are none."""
    if not specials:
        return None
    return re.compile("|".join(re.escape(text) for text in sorted(specials, key=len, reverse=True)))


def split_special(
    text: str, specials: Mapping[str, SpecialToken], pattern: re.Pattern[str] | None
) -> Iterator[ChatPiece]:
    """Yield `text` as special tokens and the text between them."""
    start = 0
    for match in pattern.finditer(text) if pattern is not None else ():
        if match.start() > start:
            yield ChatPiece(text[start : match.start()])
        yield ChatPiece(match.group(), special_id=specials[match.group()].id)
        start = match.end()
    if start < len(text):
        yield ChatPiece(text[start:])


def settle(pieces: Sequence[ChatPiece], specials: Mapping[str, SpecialToken]) -> list[ChatPiece]:
    """Return the pieces with the whitespace gone that special tokens swallow, and `after_special` set."""
    kept = list(pieces)
    for index, piece in enumerate(kept):
        if piece.special_id is None:
            continue
        token = specials[piece.text]
        if token.rstrip:
            _strip(kept, range(index + 1, len(kept)), str.lstrip)
        if token.lstrip:
            _strip(kept, range(index - 1, -1, -1), str.rstrip)
    out: list[ChatPiece] = []
    for piece in kept:
        if piece.text:
            follows = piece.special_id is None and bool(out) and out[-1].special_id is not None
            out.append(replace(piece, after_special=follows))
    return out


def _strip(pieces: list[ChatPiece], indices: range, strip: Callable[[str], str]) -> None:
    for index in indices:
        if pieces[index].special_id is not None:
            return
        text = strip(pieces[index].text)
        pieces[index] = replace(pieces[index], text=text)
        if text:
            return


def render_pieces(
    template: ChatTemplate,
    messages: Sequence[Message],
    specials: Mapping[str, SpecialToken],
    *,
    add_generation_prompt: bool,
) -> list[ChatPiece]:
    """Return the rendered conversation as pieces; their texts joined are the rendering (see `settle`).

    The template is rendered twice: with the contents, and with a marker in the place of each. The marked one
    shows where contents stand and which special tokens the template itself wrote; the other says what became of
    each content. A template may strip a content, or keep only what follows "</think>"; one that changes it
    otherwise is refused with TokenizerError.
    """
    contents = [message.content for message in messages]
    markers = _markers(contents, template.source, specials)
    dicts = [{"role": message.role, "content": message.content} for message in messages]
    marked = [
        {"role": message.role, "content": marker or message.content}
        for message, marker in zip(messages, markers, strict=True)
    ]
    real = template.render(dicts, add_generation_prompt=add_generation_prompt)
    skeleton = template.render(marked, add_generation_prompt=add_generation_prompt)
    place = {marker: index for index, marker in enumerate(markers) if marker}
    cuts = re.split("(" + "|".join(map(re.escape, place)) + ")", skeleton) if place else [skeleton]
    order = [place[marker] for marker in cuts[1::2]]
    kept = _align(real, cuts[::2], [contents[index] for index in order])
    if kept is None:
        raise TokenizerError(
            "the chat template changes what the messages say, not only the space around them, so it cannot be "
            "told apart from them; use another template or plain completion"
        )
    pattern = special_pattern(specials)
    pieces: list[ChatPiece] = []
    for position, text in enumerate(cuts[::2]):
        pieces += split_special(text, specials, pattern)
        if position < len(order):
            pieces.append(ChatPiece(kept[position], message=order[position]))
    return settle(pieces, specials)


def _markers(contents: Sequence[str], source: str, specials: Mapping[str, SpecialToken]) -> list[str]:
    """Return a string for each content that occurs nowhere else; "" for a blank one, which stays as it is."""
    haystack = "\0".join([*contents, source, *specials])
    salt = 0
    while (stem := f"zq{salt}content") in haystack:
        salt += 1
    return [f"{stem}{index}qz" if content.strip() else "" for index, content in enumerate(contents)]


def _variants(content: str) -> list[str]:
    """Return what a template may make of a content, as it is first."""
    answer = content.rsplit("</think>", 1)[-1]  # templates drop an earlier turn's thoughts
    found = [content, content.strip(), content.lstrip(), content.rstrip()]
    if answer != content:
        found += [answer, answer.strip(), answer.lstrip(), answer.lstrip("\n")]
    return list(dict.fromkeys(found))


def _align(real: str, texts: Sequence[str], contents: Sequence[str]) -> list[str] | None:
    """Return which variant of each content makes texts[0] + contents[0] + texts[1] + … the string `real`.

    Keeps every position that can be reached after each content, with the way to it, so that a choice that only
    later turns out wrong is no trap. None where there is no such reading.
    """
    if not real.startswith(texts[0]):
        return None
    reached: list[dict[int, tuple[int, str]]] = [{len(texts[0]): (0, "")}]
    for content, text in zip(contents, texts[1:], strict=True):
        step: dict[int, tuple[int, str]] = {}
        for position in reached[-1]:
            for variant in _variants(content):
                end = position + len(variant)
                if real.startswith(variant, position) and real.startswith(text, end):
                    step.setdefault(end + len(text), (position, variant))
        if not step:
            return None
        reached.append(step)
    position = len(real)
    if position not in reached[-1]:
        return None
    kept = []
    for step in reversed(reached[1:]):
        position, variant = step[position]
        kept.append(variant)
    return kept[::-1]
