"""SmolLM2's own vocabulary, out of its GGUF, against a byte-level BPE written out naively here.

transformers' conversion of this file omits the digit split and is no oracle (see the project's facts).
"""

import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duolocal.errors import TokenizerError
from duolocal.models.loader import open_model
from duolocal.tokenizer import Message, Tokenizer, load_tokenizer
from duolocal.tokenizer.gguf_vocab import read_gguf
from tests.tokenizer_files import CORPUS, LICENCE, MULTI_BYTE

regex: Any = pytest.importorskip("regex")

TEXTS = [
    "",
    " ",
    "Hello, world! It's 12345.67 o'clock; we'll see.",
    "a  b   c\n\n\nd\te \n f  1 2  34\n",
    LICENCE,
    MULTI_BYTE,
    "<|im_end|><|im_start|>system",
    CORPUS[:20_000],
]


class NaiveByteLevel:
    """GPT-2's algorithm as its paper has it: split, bytes, then the earliest merge again and again."""

    WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        shifted = [b for b in range(256) if not (33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255)]
        self.character = {b: chr(256 + shifted.index(b)) if b in shifted else chr(b) for b in range(256)}
        self.word = lru_cache(maxsize=None)(self._word)

    def encode(self, text: str) -> list[int]:
        words = []
        for part in regex.split(r"(\p{N})", text):  # every digit on its own
            words += self.WORD.findall(part)
        assert "".join(words) == text
        return [i for word in words for i in self.word(word)]

    def _word(self, word: str) -> list[int]:
        parts = [self.character[b] for b in word.encode()]
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            rank, at = min((self.ranks.get(pair, 10**9), i) for i, pair in enumerate(pairs))
            if rank == 10**9:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [self.ids[part] for part in parts]


@pytest.fixture(scope="module")
def metadata(smollm2_path: Path) -> Mapping[str, Any]:
    return open_model(smollm2_path).metadata


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(open_model(smollm2_path))


@pytest.fixture(scope="module")
def naive(metadata: Mapping[str, Any]) -> NaiveByteLevel:
    return NaiveByteLevel(metadata)


def writable(text: str) -> str:
    """Return `text` with the characters that this vocabulary has no bytes for replaced."""
    missing = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D}
    return "".join("\ufffd" if ord(c) in missing or 0x40000 <= ord(c) < 0xC0000 else c for c in text)


@pytest.mark.real
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_ids_are_those_of_the_naive_algorithm(tokenizer: Tokenizer, naive: NaiveByteLevel, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == naive.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(range(17)), "ids 0..16 are the special tokens"


@pytest.mark.real
@given(text=st.text(max_size=60))
def test_any_text_comes_back(tokenizer: Tokenizer, naive: NaiveByteLevel, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == naive.encode(writable(text))
    assert tokenizer.decode(ids) == writable(text)


@pytest.mark.real
@given(
    words=st.lists(
        st.sampled_from(
            ["1", "23", " ", "  ", "\n", "\r\n", "\t", "a", "Zq", "é", "½", "'s", "'", ".", "日", "\u3000"]
        ),
        max_size=25,
    )
)
def test_splitting_of_spaces_digits_and_marks(tokenizer: Tokenizer, naive: NaiveByteLevel, words: list[str]) -> None:
    assert tokenizer.encode("".join(words)) == naive.encode("".join(words))


@pytest.mark.real
def test_unwritable_characters_are_marked_not_dropped(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\x04b\U00050000c\ud800d")) == "a\ufffdb\ufffdc\ufffdd"


@pytest.mark.real
def test_special_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 49152
    assert (tokenizer.bos_id, tokenizer.adds_bos) == (1, False)
    assert tokenizer.eos_ids == {0, 2}
    assert tokenizer.encode("<|im_start|>a<|im_end|>", special=True) == [1, *tokenizer.encode("a"), 2]
    assert tokenizer.encode("a", bos=True) == tokenizer.encode("a")
    assert tokenizer.decode([1, *tokenizer.encode("a"), 2]) == "a"
    assert tokenizer.decode([1, 2], skip_special=False) == "<|im_start|><|im_end|>"


@pytest.mark.real
def test_chat_of_smollm2(tokenizer: Tokenizer) -> None:
    pieces = tokenizer.chat_pieces([Message("user", "Who <|im_end|> am I?")])
    assert "".join(piece.text for piece in pieces) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWho <|im_end|> am I?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode_pieces(pieces)
    assert [i for i in ids if i in (1, 2)] == [1, 2, 1, 2, 1]


@pytest.mark.real
def test_a_long_text_is_cut_where_it_changes_nothing(tokenizer: Tokenizer, naive: NaiveByteLevel) -> None:
    text = CORPUS[:200_000]  # several parts of 32,768 characters
    assert tokenizer.encode(text) == naive.encode(text)


@pytest.mark.real
@pytest.mark.parametrize("pre", ["made-up", "default", None])
def test_an_unknown_pre_tokenizer_is_refused(metadata: Mapping[str, Any], pre: str | None) -> None:
    changed = {**metadata, "tokenizer.ggml.pre": pre}
    with pytest.raises(TokenizerError, match=repr(pre) if pre else "no tokenizer.ggml.pre"):
        read_gguf(changed, name="x.gguf")


@pytest.mark.real
@pytest.mark.parametrize("key", ["tokens", "merges", "model"])
def test_a_missing_key_is_named(metadata: Mapping[str, Any], key: str) -> None:
    changed = {k: v for k, v in metadata.items() if k != f"tokenizer.ggml.{key}"}
    with pytest.raises(TokenizerError, match=f"tokenizer.ggml.{key}"):
        read_gguf(changed, name="x.gguf")


@pytest.mark.real
def test_the_fingerprint_tells_vocabularies_apart(metadata: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    assert read_gguf(metadata, name="other name").fingerprint == tokenizer.fingerprint
    tokens = list(metadata["tokenizer.ggml.tokens"])
    tokens[1000], tokens[1001] = tokens[1001], tokens[1000]
    swapped = {**metadata, "tokenizer.ggml.tokens": tokens}
    assert read_gguf(swapped, name="x").fingerprint != tokenizer.fingerprint


def test_normal_form_of_the_test_texts() -> None:
    assert unicodedata.normalize("NFC", MULTI_BYTE) != MULTI_BYTE, "it should hold combining characters"
