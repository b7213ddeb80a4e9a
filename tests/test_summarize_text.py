"""Prompts, cuts and circles: the parts of summarising that need no model."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duolocal.commands import summarize as summarize_options
from duolocal.errors import SettingsError
from duolocal.options import find
from duolocal.summarize.plan import BETWEEN, group
from duolocal.summarize.prompts import PRESETS, make_prompt, prompt_of
from duolocal.summarize.repeats import Repeats
from duolocal.summarize.split import Piece, cut


def words(text: str) -> int:
    """A tokenizer of a kind: a word is as many tokens as it has pieces of four characters."""
    return sum(math.ceil(len(word) / 4) for word in text.split())


# --- cuts -------------------------------------------------------------------------------------------------------------

prose = st.text(st.sampled_from("ab cd.\n\n é。!\u0301日"), max_size=400)


@given(prose, st.integers(2, 40), st.lists(st.integers(0, 400), max_size=3))
def test_pieces_are_the_text_and_fit(text: str, limit: int, parts: list[int]) -> None:
    pieces = cut(text, words, limit=limit, parts=parts)
    assert "".join(text[piece.start : piece.end] for piece in pieces) == text
    for piece in pieces:
        assert words(text[piece.start : piece.end]) == piece.num_tokens
        assert piece.num_tokens <= limit


@given(prose, st.integers(2, 40))
def test_a_word_that_fits_is_never_cut(text: str, limit: int) -> None:
    for piece in cut(text, words, limit=limit)[:-1]:
        if not (text[piece.end - 1].isspace() or text[piece.end].isspace()):
            ends_sentence = text[piece.end - 1] in "。!."
            start, end = piece.end, piece.end
            while start and not text[start - 1].isspace():
                start -= 1
            while end < len(text) and not text[end].isspace():
                end += 1
            # A run is at most a sixteenth of a piece, so longer words may have to be.
            assert ends_sentence or words(text[start:end]) > max(1, limit // 16)
            assert ends_sentence or piece.inside_word


def ends(text: str, pieces: list[Piece]) -> list[str]:
    return [text[piece.start : piece.end][-12:] for piece in pieces]


def test_better_borders_are_taken_first() -> None:
    sentence = "One two three four five six seven. "
    paragraph = sentence * 3 + "\n\n"
    text = paragraph * 4
    assert [piece.num_tokens for piece in cut(text, words, limit=60)] == [54, 54]
    assert all(end.endswith("\n\n") for end in ends(text, cut(text, words, limit=60)))
    # Not at a paragraph where a page begins elsewhere in reach.
    page = len(paragraph) + len(sentence)
    assert cut(text, words, limit=80, parts=[page])[0].end == page
    assert cut(text, words, limit=80)[0].end == 2 * len(paragraph)
    one_line = sentence * 12
    assert all(end.endswith("seven. ") for end in ends(one_line, cut(one_line, words, limit=60)))
    bare = "word " * 100
    pieces = cut(bare, words, limit=60)
    assert [piece.num_tokens for piece in pieces] == [50, 50] and not any(piece.inside_word for piece in pieces)


def test_what_has_no_border_is_cut_between_characters_and_said() -> None:
    text = "e\u0301" * 500
    pieces = cut(text, words, limit=50)
    assert "".join(text[piece.start : piece.end] for piece in pieces) == text
    assert all(text[piece.start] == "e" for piece in pieces)
    assert all(piece.inside_word for piece in pieces[:-1]) and not pieces[-1].inside_word


class Words:
    def count(self, text: str) -> int:
        return words(text)


@given(st.lists(st.integers(1, 12), min_size=2, max_size=60), st.integers(26, 80))
def test_groups_keep_the_order_fit_and_get_fewer(sizes: list[int], limit: int) -> None:
    summaries = [" ".join([f"w{index:02d}"] * size) for index, size in enumerate(sizes)]
    groups = group(summaries, Words(), limit=limit)  # type: ignore[arg-type]
    assert [summary for some in groups for summary in some] == summaries
    assert len(groups) < len(summaries)
    assert all(words(BETWEEN.join(some)) <= limit for some in groups)
    if sum(sizes) <= limit:
        assert len(groups) == 1


# --- circles ----------------------------------------------------------------------------------------------------------


def watch(text: str) -> str:
    """Say a text word by word; return what is worth keeping of it."""
    repeats, said = Repeats(), ""
    ids: dict[str, int] = {}
    for word in text.replace("\n", " \n").split(" "):
        piece = word if not said or word.startswith("\n") else f" {word}"
        said += piece
        kept = repeats.push(ids.setdefault(word, len(ids)), piece)
        if kept is not None:
            return said[:kept]
    kept = repeats.finish()
    return said if kept is None else said[:kept]


def test_an_answer_that_goes_round_in_circles_ends_where_it_begins_to() -> None:
    once = "The mill stood by the river for years. It was sold in the winter of that year."
    assert watch(f"{once} {once} {once}") == once
    assert watch(f"{once}\n" * 3).strip() == once
    points = [f"{number}. The board decided in June to buy more machines." for number in range(1, 6)]
    assert watch("\n".join(["0. It met in May.", *points])).rstrip() == f"0. It met in May.\n{points[0]}"
    opening = "She walked"
    cycle = " to the door and to the window,"
    assert watch(opening + cycle * 12) == opening + cycle
    assert watch("x " * 100) == "x"


def test_what_merely_says_some_things_twice_is_left_whole() -> None:
    text = "\n".join(f"- {name} owns it.\n- No date is given in the text." for name in ("Ann", "Bob", "Cy", "Di"))
    assert watch(text) == text
    grown = "It grew by 1.5% in the first quarter of the year. It grew by 1.7% in the second quarter of the year."
    assert watch(grown) == grown


@pytest.mark.timeout(60)
def test_a_row_without_an_end_takes_no_time() -> None:
    row = " ".join(f"{number} | {number * 7} |" for number in range(1000))
    assert watch(row) == row


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_take_every_length(name: str) -> None:
    made = [make_prompt(name, length=length) for length in (None, "short", "medium", "long", "150 words", "150")]
    assert made[0] == made[2] and made[4] == made[5]
    assert len({prompt.digest for prompt in made}) == 4
    assert "150 words" in made[4].before and made[4].max_tokens == 450 and made[4].length == "150 words"
    for prompt in made:
        assert "{" not in prompt.before and not prompt.after


def test_a_prompt_file_is_cut_at_the_document(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text('\ufeffRead:\r\n{document}\r\nAnswer {length} as {"json": 1}.\n', encoding="utf-8")
    prompt = make_prompt(str(path), length="short", system="Be exact.")
    assert (prompt.name, prompt.before, prompt.system) == ("mine.txt", "Read:\n", "Be exact.")
    assert prompt.after == '\nAnswer in one or two sentences as {"json": 1}.'
    path.write_text("{document}\nWhat is it?")
    assert make_prompt(str(path)).max_tokens == 512
    assert make_prompt(str(path)).digest != prompt.digest


@pytest.mark.parametrize(
    ("data", "length", "said"),
    [
        (b"Sum it up.", None, "has no {document}: write it once"),
        (b"{document} and {document}", None, "has {document} 2 times: write it once"),
        (b" {document}\n", None, "asks nothing"),
        (b"Sum up {document}", "short", "has no {length} for --length short"),
        (b"\xff\xfe{document}", None, "is no UTF-8 text (byte 0)"),
        (b"x" * 70_000 + b"{document}", None, "is larger than 64 KiB"),
    ],
)
def test_prompt_files_that_cannot_be_used_are_one_line(
    tmp_path: Path, data: bytes, length: str | None, said: str
) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(data)
    with pytest.raises(SettingsError) as caught:
        make_prompt(str(path), length=length)
    assert said in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_names_and_lengths_that_are_unknown_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match="--prompt is 'sumary', and there is no such file: give one, or summary, bul"
    ):
        make_prompt("sumary")
    for length in ("huge", "0", "-5", "0 words", "1000000", ""):
        with pytest.raises(SettingsError, match=r"--length is .*short, medium, long, or a number of words"):
            make_prompt("summary", length=length) if length else prompt_of("{document} {length}", length="?")
    with pytest.raises(SettingsError, match="cannot be read"):
        make_prompt(str(tmp_path))


def test_options_say_what_the_package_does() -> None:
    assert {name: preset.about for name, preset in PRESETS.items()} == summarize_options.PRESETS
    from duolocal.summarize.output import FORMATS
    from duolocal.summarize.prompts import DEFAULT_LENGTH, MAX_TOKENS

    assert summarize_options.FORMATS == FORMATS
    length = find(summarize_options.Summarize(("a",), dry_run=True), "length")
    assert ", ".join(map(str, MAX_TOKENS.values())) in length.help and length.default_help == DEFAULT_LENGTH
