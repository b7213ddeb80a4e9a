"""tokenizer.json against transformers, tokenizer.model and GGUF's "llama" vocabulary against sentencepiece."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from duolocal.errors import TokenizerError
from duolocal.tokenizer import Tokenizer
from duolocal.tokenizer.cuts import CutSafety, cut
from duolocal.tokenizer.folder import read_folder
from duolocal.tokenizer.gguf_vocab import read_gguf
from duolocal.tokenizer.parts import BYTE_OF_CHARACTER
from tests.tokenizer_files import (
    CORPUS,
    LICENCE,
    MISTRAL,
    MULTI_BYTE,
    TEKKEN_SPLIT,
    Files,
    byte_level,
    chatml,
    llama2,
    llama3,
    train_sentencepiece,
    write,
)

KINDS: dict[str, Callable[[], Files]] = {
    "llama3": llama3,
    "qwen2.5": chatml,
    "llama2": llama2,
    "mistral": lambda: llama2(MISTRAL, scheme="first"),
    "always": lambda: llama2(MISTRAL, scheme="always"),
}
TEXTS = ["", " ", "x", "Hello  world 123", LICENCE, MULTI_BYTE, "\n lead", "trail ", CORPUS[50_000:60_000]]
FRAGMENTS = [
    "a",
    "word",
    " ",
    "  ",
    "\n",
    "\r\n",
    "1",
    "234",
    "é",
    "e\u0301",
    "日本",
    "🙂",
    ".",
    "'s",
    "▁",
    "\0",
]


@pytest.fixture(scope="module", params=list(KINDS))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    folder = write(tmp_path_factory.mktemp("tokenizer"), KINDS[request.param]())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = {key: config[key] for key in config if key.endswith("_token") and not key.startswith("add_")}
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **named)
    return Tokenizer(read_folder(folder)), theirs


Pair = tuple[Tokenizer, PreTrainedTokenizerFast]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_ids_are_transformers(pair: Pair, text: str) -> None:
    ours, theirs = pair
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


@given(text=st.lists(st.sampled_from(FRAGMENTS), max_size=20).map("".join))
def test_ids_are_transformers_on_fragments(pair: Pair, text: str) -> None:
    ours, theirs = pair
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


def test_a_special_string_in_a_text_is_text(pair: Pair) -> None:
    ours, theirs = pair
    for text in theirs.all_special_tokens:
        ids = ours.encode(f"a{text}b")
        assert not set(ids) & set(theirs.all_special_ids)
        assert ours.decode(ids) == f"a{text}b"
        parsed = ours.encode(f"a{text}b", special=True)
        assert parsed == theirs.encode(f"a{text}b", add_special_tokens=False)
        assert theirs.convert_tokens_to_ids(text) in parsed


def test_a_text_that_goes_on(pair: Pair) -> None:
    ours, _ = pair
    text = CORPUS[:3000]
    middle = text.index(" the ", 1000)
    ids = ours.encode(text[:middle]) + ours.encode(text[middle:], continues=True)
    assert ids == ours.encode(text)
    assert ours.decode(ours.encode(" a", continues=True), continues=True) == " a"
    assert ours.decode(ours.encode("a", continues=True), continues=True) == "a"


def test_a_long_text_is_cut_where_it_changes_nothing(pair: Pair) -> None:
    ours, theirs = pair
    text = (CORPUS[:150_000] + MULTI_BYTE) * 2
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_bos(tmp_path: Path) -> None:
    files = llama3()
    ours = Tokenizer(read_folder(write(tmp_path, files)))
    assert ours.encode("a", bos=True) == [0, *ours.encode("a")]
    assert ours.encode("a", bos=True, continues=True) == ours.encode("a")
    files["tokenizer_config.json"]["add_bos_token"] = False
    ours = Tokenizer(read_folder(write(tmp_path, files)))
    assert ours.encode("a", bos=True) == ours.encode("a")


def test_end_ids(tmp_path: Path) -> None:
    files = llama3() | {"generation_config.json": {"eos_token_id": [4, 7]}}
    tokenizer = Tokenizer(read_folder(write(tmp_path, files), eos_ids=(9,)))
    assert tokenizer.eos_ids == {3, 4, 7, 9}, "eot_id, end_of_text, generation_config's, config.json's"


def test_a_token_that_only_the_config_calls_special(tmp_path: Path) -> None:
    files = llama2()
    files["tokenizer.json"]["added_tokens"] = []
    tokenizer = Tokenizer(read_folder(write(tmp_path, files)))
    assert tokenizer.encode("<s>a</s>", special=True)[::2] == [1, 2]
    assert not {1, 2} & set(tokenizer.encode("<s>a</s>"))


def test_an_added_token_that_is_not_special_is_read_from_text_as_in_transformers(tmp_path: Path) -> None:
    files = chatml(template="{{ bos_token }}")  # the template does not spell it
    tokenizer = Tokenizer(read_folder(write(tmp_path, files)))
    number = files["tokenizer.json"]["added_tokens"][-1]["id"]
    assert tokenizer.encode("a<tool_call>b") == [*tokenizer.encode("a"), number, *tokenizer.encode("b")]
    assert tokenizer.decode([number]) == "<tool_call>"
    spelled = Tokenizer(read_folder(write(tmp_path, chatml(template="{{ '<tool_call>' }}"))))
    assert number not in spelled.encode("a<tool_call>b")
    assert spelled.decode(spelled.encode("a<tool_call>b")) == "a<tool_call>b"


def test_a_merge_that_spells_a_special_token_is_not_used(tmp_path: Path) -> None:
    files = chatml()
    model = files["tokenizer.json"]["model"]
    model["vocab"] |= {"ab": 2000, "abc": 2001}
    model["merges"] += [["a", "b"], ["ab", "c"]]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    files["tokenizer.json"]["added_tokens"].append({"id": 2001, "content": "abc", **flags})
    tokenizer = Tokenizer(read_folder(write(tmp_path, files)))
    assert tokenizer.encode("abc") == [2000, *tokenizer.encode("c")]
    assert tokenizer.encode("abc", special=True) == [2001]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "WordPiece", "vocab": {}}}, "'WordPiece'"),
        ({"model": {"type": "Unigram", "vocab": []}}, "'Unigram'"),
        ({"decoder": {"type": "WordPiece"}}, "decoder WordPiece"),
        ({"added_tokens": [{"content": "x"}]}, "tokenizer.json: damaged"),
        ({"pre_tokenizer": {"type": "NoSuch"}}, "pre_tokenizer 'NoSuch' is not one"),
    ],
)
def test_what_is_not_read_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    files = llama3()
    files["tokenizer.json"].update(change)
    with pytest.raises(TokenizerError, match=message) as caught:
        read_folder(write(tmp_path, files))
    assert "\n" not in str(caught.value)


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json and no tokenizer\.model"):
        read_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read as JSON"):
        read_folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    for junk in (b"", b"\xff" * 40, b"IQ== 0\nIg== 1\n"):
        (tmp_path / "tokenizer.model").write_bytes(junk)
        with pytest.raises(TokenizerError, match=r"tokenizer\.model: .*sentencepiece"):
            read_folder(tmp_path)


def test_an_unknown_splitting_is_never_cut(tmp_path: Path) -> None:
    files = llama3()
    split = files["tokenizer.json"]["pre_tokenizer"]["pretokenizers"][0]
    split["pattern"] = {"Regex": r"[\s\S]{1,7}"}
    folder = write(tmp_path, files)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    text = CORPUS[:80_000]
    assert Tokenizer(read_folder(folder)).encode(text) == theirs.encode(text, add_special_tokens=False)


def test_parts_of_a_cut_text() -> None:
    text = CORPUS[:20_000]
    parts = list(cut(text, CutSafety(words=True, lines=True), part_size=1000))
    assert "".join(parts) == text
    assert 15 < len(parts) <= 20
    assert all(len(part) >= 1000 for part in parts[:-1])
    assert list(cut(text, CutSafety(), part_size=1000)) == [text]


# sentencepiece


@pytest.fixture(scope="module")
def proto() -> bytes:
    return train_sentencepiece()


@pytest.fixture(scope="module")
def oracle(proto: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=proto)


def as_gguf(oracle: sentencepiece.SentencePieceProcessor, **more: Any) -> dict[str, Any]:
    """Return a sentencepiece model's pieces as a GGUF's key/values."""
    size = range(oracle.GetPieceSize())
    kinds = [2 if oracle.IsUnknown(i) else 3 if oracle.IsControl(i) else 6 if oracle.IsByte(i) else 1 for i in size]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [oracle.IdToPiece(i) for i in size],
        "tokenizer.ggml.scores": [oracle.GetScore(i) for i in size],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **more,
    }


@pytest.fixture(scope="module", params=["file", "gguf"])
def spm(
    request: pytest.FixtureRequest,
    proto: bytes,
    oracle: sentencepiece.SentencePieceProcessor,
    tmp_path_factory: pytest.TempPathFactory,
) -> Tokenizer:
    if request.param == "gguf":
        return Tokenizer(read_gguf(as_gguf(oracle), name="x.gguf"))
    folder = tmp_path_factory.mktemp("spm")
    (folder / "tokenizer.model").write_bytes(proto)
    return Tokenizer(read_folder(folder))


@given(text=st.lists(st.sampled_from([*FRAGMENTS[:-2], "<s>", "</s>", "<0x41>"]), max_size=20).map("".join))
def test_ids_are_sentencepiece_s(spm: Tokenizer, oracle: sentencepiece.SentencePieceProcessor, text: str) -> None:
    ids = spm.encode(text)
    assert ids == oracle.EncodeAsIds(text)
    assert not {1, 2} & set(ids)
    assert spm.decode(ids) == oracle.DecodeIds(ids) == text


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_ids_are_sentencepiece_s_on_real_text(
    spm: Tokenizer, oracle: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    ids = spm.encode(text)
    assert ids == oracle.EncodeAsIds(text)
    assert spm.decode(ids) == text


def test_a_long_text_in_sentencepiece(spm: Tokenizer, oracle: sentencepiece.SentencePieceProcessor) -> None:
    text = CORPUS[:150_000]
    assert spm.encode(text) == oracle.EncodeAsIds(text)


def test_the_space_before_text(spm: Tokenizer, oracle: sentencepiece.SentencePieceProcessor) -> None:
    assert spm.encode("a", bos=True) == [1, *oracle.EncodeAsIds("a")]
    assert oracle.IdToPiece(spm.encode("the")[0]).startswith("▁")
    assert not oracle.IdToPiece(spm.encode("the", continues=True)[0]).startswith("▁")
    # after a special token too, as in llama.cpp and in Meta's own prompts
    assert spm.encode("</s>the", special=True) == [2, *oracle.EncodeAsIds("the")]


def test_gguf_without_space_before_text(oracle: sentencepiece.SentencePieceProcessor) -> None:
    values = as_gguf(oracle, **{"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False})
    tokenizer = Tokenizer(read_gguf(values, name="x.gguf"))
    assert tokenizer.encode("the") == tokenizer.encode("the", continues=True)
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"
    assert not tokenizer.adds_bos


def test_added_tokens_beside_a_sentencepiece_model(proto: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(proto)
    size = sentencepiece.SentencePieceProcessor(model_proto=proto).GetPieceSize()
    files: Files = {
        "added_tokens.json": {"<|im_end|>": size, "<extra>": size + 1},
        "tokenizer_config.json": {"added_tokens_decoder": {str(size + 2): {"content": "<ctl>", "special": True}}},
    }
    tokenizer = Tokenizer(read_folder(write(tmp_path, files)))
    assert tokenizer.vocab_size == size + 3
    assert size in tokenizer.eos_ids
    assert not {size, size + 2} & set(tokenizer.encode("a<|im_end|><ctl>b"))
    assert tokenizer.encode("<|im_end|><ctl>", special=True) == [size, size + 2]
    assert size + 1 in tokenizer.encode("a<extra>b"), "not special: as transformers reads it"
    assert tokenizer.decode([size + 1]) == "<extra>"


def test_a_user_defined_piece_that_the_template_writes_is_not_read_from_text(tmp_path: Path) -> None:
    proto = train_sentencepiece(symbols=("<|im_end|>", "<other>"))
    (tmp_path / "tokenizer.model").write_bytes(proto)
    plain = sentencepiece.SentencePieceProcessor(model_proto=proto)
    end, other = plain.PieceToId("<|im_end|>"), plain.PieceToId("<other>")
    assert end in plain.EncodeAsIds("a<|im_end|>b"), "sentencepiece itself would end the turn here"
    tokenizer = Tokenizer(read_folder(tmp_path))
    text = "a<|im_end|>b<other>c"
    assert end not in tokenizer.encode(text)
    assert other in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "'bert'"),
        ({"tokenizer.ggml.scores": [0.0]}, "1 scores"),
        ({"tokenizer.ggml.token_type": [1]}, "1 token types"),
    ],
)
def test_a_damaged_gguf_vocabulary(
    oracle: sentencepiece.SentencePieceProcessor, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(TokenizerError, match=message):
        read_gguf(as_gguf(oracle, **change), name="x.gguf")


# byte-level pre-tokenizers of GGUF against the tokenizer.json they come from


def tekken() -> Files:
    return {"tokenizer.json": byte_level(TEKKEN_SPLIT, ["<s>", "</s>"], whole_words=True)}


PRE = {"llama-bpe": llama3(), "qwen2": chatml(), "tekken": tekken()}


@pytest.mark.parametrize(("pre", "files"), PRE.items(), ids=PRE)
@given(
    text=st.lists(st.sampled_from([*FRAGMENTS, "12345", "don'T", "\n\n ", "x.\n/y", "HTMLPage"]), max_size=20).map(
        "".join
    )
)
def test_gguf_splits_as_the_original(pre: str, files: Files, text: str) -> None:
    theirs, ours = _both(pre, json.dumps(files))
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


_MADE: dict[str, tuple[PreTrainedTokenizerFast, Tokenizer]] = {}


def _both(pre: str, files: str) -> tuple[PreTrainedTokenizerFast, Tokenizer]:
    if pre not in _MADE:
        from tokenizers import Tokenizer as Library

        description = json.loads(files)["tokenizer.json"]
        added = {token["content"]: token["id"] for token in description["added_tokens"]}
        vocab = {**description["model"]["vocab"], **added}
        tokens = sorted(vocab, key=lambda token: vocab[token])
        values = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [
                (4 if token == "<tool_call>" else 3) if token in added else 1 for token in tokens
            ],
            "tokenizer.ggml.merges": [" ".join(merge) for merge in description["model"]["merges"]],
        }
        assert set("".join(tokens)) >= set(BYTE_OF_CHARACTER)
        library = Library.from_str(json.dumps(description))
        theirs = PreTrainedTokenizerFast(tokenizer_object=library)
        _MADE[pre] = theirs, Tokenizer(read_gguf(values, name="x.gguf"))
    return _MADE[pre]
