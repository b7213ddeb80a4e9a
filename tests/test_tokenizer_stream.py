"""TextStream: never half a character, and nothing different from decoding everything at once."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duolocal.errors import TokenizerError
from duolocal.tokenizer import Tokenizer
from duolocal.tokenizer.folder import read_folder
from tests.tokenizer_files import MULTI_BYTE, llama2, llama3, train_sentencepiece, write


@pytest.fixture(scope="module", params=["byte level", "byte fallback", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "sentencepiece":
        (folder / "tokenizer.model").write_bytes(train_sentencepiece())
    else:
        write(folder, llama3() if request.param == "byte level" else llama2())
    return Tokenizer(read_folder(folder))


def check(tokenizer: Tokenizer, ids: list[int], *, skip_special: bool, continues: bool) -> list[str]:
    stream = tokenizer.stream(skip_special=skip_special, continues=continues)
    texts = [stream.push(i) for i in ids]
    joined = "".join(texts) + stream.flush()
    assert joined == tokenizer.decode(ids, skip_special=skip_special, continues=continues)
    return texts


@given(seed=st.integers(0, 2**32), skip_special=st.booleans(), continues=st.booleans())
def test_random_ids(tokenizer: Tokenizer, seed: int, skip_special: bool, continues: bool) -> None:
    draw = random.Random(seed)
    ids = [draw.randrange(tokenizer.vocab_size) for _ in range(draw.randrange(60))]
    check(tokenizer, ids, skip_special=skip_special, continues=continues)


@given(text=st.text(alphabet=st.sampled_from(MULTI_BYTE + "ab \n"), max_size=40))
def test_real_characters_come_whole(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    texts = check(tokenizer, ids, skip_special=True, continues=False)
    assert "".join(texts) == text
    assert not any("\ufffd" in piece for piece in texts)


def test_an_emoji_waits_for_its_last_byte(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream(continues=True)
    ids = tokenizer.encode("🙂", continues=True)
    texts = [stream.push(i) for i in ids]
    assert texts == [""] * (len(ids) - 1) + ["🙂"]
    assert len(ids) >= 2


def test_half_a_character_shows_at_the_end_only(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream(continues=True)
    ids = tokenizer.encode("🙂", continues=True)[:-1]
    assert "".join(stream.push(i) for i in ids) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""
    assert stream.push(tokenizer.encode("a", continues=True)[0]) == "a", "what follows a flush is clean"


def test_bytes_that_cannot_become_a_character_show_at_once(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream(continues=True)
    first = tokenizer.encode("🙂", continues=True)[0]
    letter = tokenizer.encode("a", continues=True)[0]
    assert stream.push(first) + stream.push(letter) == "\ufffda"


def test_an_id_outside_the_vocabulary(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="outside the vocabulary"):
        tokenizer.decode([tokenizer.vocab_size])
    with pytest.raises(TokenizerError, match="outside the vocabulary"):
        tokenizer.stream().push(-1)


def test_padding_of_the_model_vocabulary_is_no_text(tmp_path: Path) -> None:
    parts = read_folder(write(tmp_path, llama3()))
    padded = Tokenizer(parts, vocab_size=len(parts.token_bytes) + 8)
    assert padded.decode([padded.vocab_size - 1]) == ""
