"""A prompt as tokens around a document: what comes before it once, what comes after it with every document.

Owns where a chat template is cut. Special tokens come from the template alone: in a prompt or a document their names
are text, so that no document can end its turn or begin another.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from duolocal.errors import TokenizerError
from duolocal.summarize.prompts import Prompt
from duolocal.tokenizer import ChatPiece, Message, Tokenizer


@dataclass(frozen=True)
class Frame:
    """The tokens before a document, and the pieces after it.

    Invariant: `prefix` depends on prompt and template alone, so it can be prefilled once for all documents.
    """

    tokenizer: Tokenizer
    prefix: tuple[int, ...]
    opening: ChatPiece  # empty; where the document goes
    closing: tuple[ChatPiece, ...]
    note: str | None = None  # worth telling: the template takes no system message

    def ids(self, text: str) -> list[int]:
        """Return the ids of a document and of all that follows it, to be appended to `prefix`."""
        piece = replace(self.opening, text=text)
        return self.tokenizer.encode_pieces([piece, *self.closing], continues=True)

    def count(self, text: str) -> int:
        """Return how many tokens `ids(text)` has more than an empty document."""
        return len(self.tokenizer.encode(text, continues=True))

    @property
    def overhead(self) -> int:
        """Tokens of a prompt besides the document's."""
        return len(self.prefix) + len(self.ids(""))


def make_frame(tokenizer: Tokenizer, prompt: Prompt) -> Frame:
    """Render `prompt` with the model's chat template and cut it where the document goes.

    A template without a system role gets the system text at the beginning of the question. Raises TokenizerError where
    the model has no template that can be used.
    """
    mark = _mark(prompt)
    content = f"{prompt.before}{mark}{prompt.after}"
    note = None
    try:
        system = [Message("system", prompt.system)] if prompt.system else []
        pieces = tokenizer.chat_pieces([*system, Message("user", content)])
    except TokenizerError:
        if not prompt.system:
            raise
        pieces = tokenizer.chat_pieces([Message("user", f"{prompt.system}\n\n{content}")])
        note = "this model's chat template takes no system message: --system stands at the beginning of the prompt"
    return _cut(tokenizer, pieces, mark, note)


def _cut(tokenizer: Tokenizer, pieces: Sequence[ChatPiece], mark: str, note: str | None) -> Frame:
    at = next((index for index, piece in enumerate(pieces) if mark in piece.text), None)
    if at is None:
        raise TokenizerError("the chat template leaves out what is asked: use a model with another template")
    before, _, after = pieces[at].text.partition(mark)
    head = list(pieces[:at])
    if before:
        head.append(replace(pieces[at], text=before))
    opening = replace(pieces[at], text="", after_special=pieces[at].after_special and not before)
    closing = list(pieces[at + 1 :])
    if after:
        closing.insert(0, replace(pieces[at], text=after, after_special=False))
    return Frame(tokenizer, tuple(tokenizer.encode_pieces(head)), opening, tuple(closing), note)


def _mark(prompt: Prompt) -> str:
    """Return a word that the prompt does not contain."""
    words = prompt.before + prompt.after + (prompt.system or "")
    count = 0
    while (mark := f"DOCUMENT{count}HERE") in words:
        count += 1
    return mark
