"""What every origin of a tokenizer is brought to: one record, `TokenizerParts`, and the `Backend` behind it.

Owns the byte table of byte-level BPE as well, since two origins need it. Does not read files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

# Where a space is put before text: never; only at the very start; at the start and after each special token.
PrefixMode = Literal["none", "start", "sections"]


class Backend(Protocol):
    """Encodes text that holds no special tokens: whatever it reads is ordinary text."""

    @property
    def prefix(self) -> PrefixMode: ...

    def encode(self, text: str, *, prefix: bool) -> list[int]:
        """Return the ids of `text`; `prefix` puts the tokenizer's own space before it (not in mode "none")."""
        ...


@dataclass(frozen=True)
class SpecialToken:
    """A string that the template (or a caller who asks for it) may turn into one id."""

    text: str
    id: int
    lstrip: bool = False  # swallows whitespace before it
    rstrip: bool = False  # swallows whitespace after it


@dataclass(frozen=True)
class TokenizerParts:
    """Everything `Tokenizer` needs, whatever file it came from."""

    backend: Backend
    token_bytes: list[bytes]  # by id; b"" where the vocabulary has a hole
    specials: Mapping[str, SpecialToken]  # parsed in template text only
    hidden_ids: frozenset[int]  # left out of decoded text
    bos_id: int | None
    eos_ids: frozenset[int]  # as declared by the files; the template's end of turn is added by Tokenizer
    adds_bos: bool  # plain text starts with BOS
    template_needs_bos: bool  # BOS goes before a rendered chat that lacks it (GGUF with add_bos_token)
    strips_space: bool  # the first space of decoded text is the prefix, not text
    template: str | None
    template_tokens: Mapping[str, str] = field(default_factory=dict)  # "bos_token": "<s>", ...
    origin: str = ""  # for people: "tokenizer.json", "tokenizer.model", "GGUF"
    fingerprint: str = ""  # hex; the same for the same map between text and ids


# Ids that end a turn or a document in the families that duolocal reads. A model that emits one has stopped,
# whatever its config says (several checkpoints declare only one of theirs).
END_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "</s>",
)


def _byte_characters() -> dict[str, int]:
    """Return GPT-2's character for each byte: printable ones are themselves, the rest sit from U+0100 up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    for offset, byte in enumerate(b for b in range(256) if b not in set(printable)):
        table[chr(0x100 + offset)] = byte
    return table


BYTE_OF_CHARACTER = _byte_characters()


# Each character to the code point that is its byte; what stands for no byte to one that Latin-1 cannot write.
_BYTE_LEVEL = dict.fromkeys(range(256), 65535) | {ord(text): byte for text, byte in BYTE_OF_CHARACTER.items()}


def byte_level_bytes(token: str) -> bytes:
    """Return the bytes of a byte-level BPE token; one with characters outside the table is plain text."""
    try:
        return token.translate(_BYTE_LEVEL).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode()


def sentencepiece_bytes(token: str) -> bytes:
    """Return the bytes of a sentencepiece token: "<0x0A>" is one byte, U+2581 a space."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass  # looks like a byte token and is none: text
    return token.replace("\u2581", " ").encode()


class Unwritable:
    """Replaces characters that a byte-level vocabulary cannot write.

    SmolLM2's vocabulary, for one, has no token for the bytes 04, 06, 13, 14, 16, 1D, F1 and F2, and the library
    drops them without a word, leaving half a character in the case of F1. Here the whole character becomes
    U+FFFD, so that the model and the user can see that something stood there.
    """

    def __init__(self, present: frozenset[int]) -> None:
        self._present = bytes(sorted(present))
        self._complete = len(self._present) == 256
        self._mark = "\ufffd" if not "\ufffd".encode().translate(None, self._present) else "?"

    def replace(self, text: str) -> str:
        """Return `text` with each character replaced that needs a byte the vocabulary lacks."""
        if self._complete or not text.encode().translate(None, self._present):
            return text
        missing = {c for c in set(text) if c.encode().translate(None, self._present)}
        return text.translate({ord(c): self._mark for c in missing})
