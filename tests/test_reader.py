"""Reading past the window: every character is read once, scores are those of a dense model, memory does not grow."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from duolocal.engine.engine import Cancelled, Engine
from duolocal.engine.session import Prefilled
from duolocal.errors import SettingsError
from duolocal.heads import HeadPlan
from duolocal.kernels.cpu import build
from duolocal.kernels.torch_kernels import TorchKernels
from duolocal.reader import Found, Passage, Retriever
from duolocal.reader.attention import POWER, ChunkReader, listened_layers
from duolocal.reader.passages import LEAST_SHARE, MAX_CARRIED, Carried, Carry, choose
from duolocal.reader.retrieve import MIN_CHUNK
from duolocal.reader.sentences import MAX_CHARACTERS, MAX_TOKENS, Sentence, chunks, cut, sentences
from duolocal.tokenizer import Tokenizer
from tests.compiled import compiled
from tests.oracle import OracleCache
from tests.session_models import quiet_model, tiny_tokenizer
from tests.tiny import tensor_bytes

TEXTS = st.text(st.sampled_from("ab cd.!?\n\t\"') 。！、字é🙂\u3000\r"), max_size=1500) | st.text(max_size=300)
LAYERS = 4


# --- sentences ---


@given(TEXTS)
def test_sentences_joined_are_the_text(text: str) -> None:
    spans = list(cut(text))
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans)][: len(spans)]
    assert (spans[-1][1] if spans else 0) == len(text)
    assert all(0 < stop - start <= MAX_CHARACTERS for start, stop in spans)


def test_sentences_are_cut_where_they_end() -> None:
    text = (
        'He said "this really is the end of it all." Then nobody in the village spoke again! It was late?\n'
        "A heading of some kind that is no sentence\n\nMr. Hill came to the door and asked for the key of the barn."
    )
    assert [text[start:stop] for start, stop in cut(text)] == [
        'He said "this really is the end of it all."',
        " Then nobody in the village spoke again!",
        " It was late?\nA heading of some kind that is no sentence\n\n",
        "Mr. Hill came to the door and asked for the key of the barn.",
    ]


def test_text_without_sentence_ends_is_cut_at_lines_then_between_words_then_anywhere() -> None:
    rows = "".join(f"{n};value {n};other {n}\n" for n in range(200))
    assert all(rows[start:stop].endswith("\n") for start, stop in cut(rows))
    words = "word " * 400
    assert all(words[start] == " " or start == 0 for start, _ in cut(words))
    assert [stop - start for start, stop in cut("x" * 1000)] == [400, 400, 200]
    japanese = (
        "これは長い文章ですがとても短く切られるべきではありません、たぶん四十字を超えるはずです。次の文もまた同じです。"
        * 3
    )
    assert all(japanese[start:stop].endswith("。") for start, stop in cut(japanese))


def encode_bytes(text: str) -> list[int]:
    return list(text.encode("utf-8", "surrogatepass"))


LONG = "A sentence of more than forty characters stands here. And é another one that is quite as long! " * 9


@given(st.lists(TEXTS, max_size=4))
@example([LONG, "", "x" * 3000, LONG])
def test_every_token_lies_in_one_chunk_and_neighbours_are_neighbours(texts: list[str]) -> None:
    found = list(sentences(texts, encode_bytes))
    for at, text in enumerate(texts):
        mine = [each for each in found if each.document == at]
        assert b"".join(bytes(each.token_ids) for each in mine) == bytes(encode_bytes(text))
        for before, each in itertools.pairwise(mine):
            assert before.stop == each.start and each.around[0] == before.start and before.around[1] == each.stop
        if mine:
            assert mine[0].around[0] == 0 and mine[-1].around[1] == len(text)
    assert all(0 < len(each.token_ids) <= MAX_TOKENS for each in found)
    packed = list(chunks(iter(found), MAX_TOKENS + 50))
    assert [each for chunk in packed for each in chunk] == found
    for chunk in packed:
        assert sum(len(each.token_ids) for each in chunk) <= MAX_TOKENS + 50
        assert len({each.document for each in chunk}) == 1


def test_a_long_text_is_cut_as_it_is_read() -> None:
    asked: list[str] = []

    def encode(text: str) -> list[int]:
        asked.append(text)
        return encode_bytes(text)

    stream = chunks(sentences(["One sentence of forty characters or more. " * 100_000], encode), 512)
    next(stream)
    assert sum(map(len, asked)) < 1500


# --- scores ---


def make(
    folder: Path, *, kernels: str = "torch", context: int = 2048, chunk_size: int = 64
) -> tuple[Engine, Tokenizer]:
    tokenizer = tiny_tokenizer(folder)
    chosen = TorchKernels(torch.float32) if kernels == "torch" else compiled(1)
    transformer = quiet_model(tokenizer, context=context, seed=0, kernels=chosen, num_layers=LAYERS)
    plan = HeadPlan(((True, False),) * LAYERS, sink_size=4, recent_size=64, source="test")
    return Engine.build(transformer, plan, kv="int8", chunk_size=chunk_size), tokenizer


def text_of(count: int, seed: int = 0) -> str:
    generator = torch.Generator().manual_seed(seed)
    words = ["mill", "river", "stone", "the", "a", "old", "baker", "went", "slept", "yellow", "boat", "two"]

    def draw() -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    return "".join(" ".join(draw() for _ in range(9)).capitalize() + ". " for _ in range(count))


def dense_scores(engine: Engine, before: Sequence[int], chunk: Sequence[int], question: Sequence[int]) -> Tensor:
    """Return the weights of a question alone over a chunk: [layers * heads, q_len, chunk] of the listened layers."""
    oracle = OracleCache(engine.config)
    ids = torch.tensor([*before, *chunk, *question])
    engine.transformer.hidden(ids, torch.arange(len(ids)), oracle)
    weights = torch.cat(oracle.weights[: listened_layers(LAYERS)])
    return weights[:, -len(question) :, len(before) : len(before) + len(chunk)]


needs_compiler = pytest.mark.skipif(build.unsupported() is not None, reason="no compiled kernels here")


@pytest.mark.parametrize("kernels", ["torch", pytest.param("compiled", marks=needs_compiler)])
@pytest.mark.parametrize("chunk_size", [64, 1000, 1])
def test_scores_are_the_attention_of_the_dense_model(tmp_path: Path, kernels: str, chunk_size: int) -> None:
    engine, tokenizer = make(tmp_path, kernels=kernels, chunk_size=chunk_size)
    reader = ChunkReader(engine, tokenizer, chunk_tokens=400)
    frame = reader.frame
    questions = [frame.question("Where did the old baker sleep?"), frame.question("two stones " * 30)]
    reader.read(list(range(10, 200)))  # another chunk before: nothing of it may stay
    chunk = next(chunks(sentences([text_of(20)], tokenizer.encode), 380))
    lengths = [len(sentence.token_ids) for sentence in chunk]
    token_ids = [token for sentence in chunk for token in sentence.token_ids]
    reader.read(token_ids)
    scores = reader.scores(questions, lengths)

    def looks(question: Sequence[int]) -> Tensor:
        weights = dense_scores(engine, frame.before, token_ids, question)
        return torch.stack([part.amax(-1).mean(-1) for part in weights.split(lengths, dim=-1)], dim=-1)

    nothing = looks(frame.question("N/A"))
    for row, question in zip(scores, questions, strict=True):
        wanted = (looks(question) - nothing).clamp_min(0).pow(POWER).sum(0).pow(1 / POWER)
        assert wanted.max() > 5e-3 and len(wanted) > 5  # there is something to tell apart
        torch.testing.assert_close(row.double(), wanted, atol=2e-5, rtol=1e-4)


def test_questions_do_not_see_each_other(tmp_path: Path) -> None:
    engine, tokenizer = make(tmp_path)
    reader = ChunkReader(engine, tokenizer, chunk_tokens=400)
    questions = [reader.frame.question(f"Where is boat {n}? " * (1 + n % 3)) for n in range(40)]
    reader.read(list(range(10, 300)))
    together = reader.scores(questions, [90, 100, 100])
    for question, row in zip(questions[::13], together[::13], strict=True):
        torch.testing.assert_close(reader.scores([question], [90, 100, 100])[0], row, atol=1e-5, rtol=1e-3)


def test_a_chunk_has_to_fit(tmp_path: Path) -> None:
    engine, tokenizer = make(tmp_path, context=300)
    with pytest.raises(SettingsError, match="a chunk of 400 tokens is read at a time, and the context is 300"):
        Retriever(engine, tokenizer, chunk_tokens=400, passage_tokens=200)
    with pytest.raises(SettingsError, match="too short to read: give 256 or more"):
        Retriever(engine, tokenizer, chunk_tokens=10)
    with pytest.raises(SettingsError, match="cannot hold a sentence: give 128 or more"):
        Retriever(engine, tokenizer, chunk_tokens=256, passage_tokens=10)


# --- what is carried ---


def sentence(document: int, start: int, stop: int) -> Sentence:
    return Sentence(document, start, stop, (1,), (max(0, start - 10), stop + 10))


def carried(score: float, document: int, start: int) -> Carried:
    return Carried(score, (-document, -start), start + 10, (max(0, start - 10), start + 20))


@given(st.lists(st.floats(0, 1), max_size=300))
@example([(7 * at % 200) / 200 for at in range(200)])
def test_the_best_are_carried_and_no_more(scores: list[float]) -> None:
    carry = Carry()
    for at, score in enumerate(scores):
        carry.offer(sentence(0, 10 * at, 10 * at + 10), score)
    kept = carry.best()
    assert [each.score for each in kept] == sorted(scores, reverse=True)[:MAX_CARRIED]
    assert all(scores[each.start // 10] == each.score and each.stop == each.start + 10 for each in kept)


@given(
    st.lists(
        st.tuples(st.floats(0.01, 1), st.integers(0, 2), st.integers(0, 40)), max_size=40, unique_by=lambda x: x[1:]
    ),
    st.integers(30, 600),
)
def test_passages_keep_to_the_budget_and_take_the_best_first(found: list[tuple[float, int, int]], budget: int) -> None:
    best = sorted((carried(score, document, 10 * at) for score, document, at in found), reverse=True)
    passages = choose(best, lambda document, start, stop: stop - start, budget=budget)
    assert sum(one.stop - one.start for one in passages) <= budget
    assert passages == sorted(passages, key=lambda one: (one.document, one.start))
    for before, after in itertools.pairwise(passages):
        assert before.document < after.document or before.stop < after.start

    def held(each: Carried) -> bool:
        return any(
            one.document == each.document and one.start <= each.start and each.stop <= one.stop for one in passages
        )

    wanted = [each for each in best if each.score >= LEAST_SHARE * best[0].score]
    assert [held(each) for each in best[:1]] == [True] * len(best[:1])
    left_out = next((at for at, each in enumerate(wanted) if not held(each)), len(wanted))
    if left_out < len(wanted):  # there was no room for it, or for one that was better
        used = sum(one.stop - one.start for one in passages)
        assert used + 30 > budget or used + 10 > budget


def test_neighbours_come_along_and_what_touches_is_one_passage() -> None:
    def count(document: int, start: int, stop: int) -> int:
        return stop - start

    alone = choose([carried(0.5, 0, 100)], count, budget=100)
    assert alone == [Passage(0, 90, 120, 0.5)]
    together = choose([carried(0.5, 0, 100), carried(0.4, 0, 120), carried(0.3, 1, 120)], count, budget=100)
    assert together == [Passage(0, 90, 140, 0.5), Passage(1, 110, 140, 0.3)]
    assert choose([carried(0.5, 0, 100), carried(0.12, 0, 300)], count, budget=100) == alone
    assert choose([carried(0.5, 0, 100)], count, budget=25) == [Passage(0, 100, 110, 0.5)]
    assert choose([carried(0.0, 0, 100)], count, budget=100) == []


# --- reading ---


def read(retriever: Retriever, texts: Sequence[str], questions: Sequence[str]) -> list[Found]:
    *_, last = retriever.read(texts, questions)
    assert isinstance(last, list)
    return last


def test_all_of_the_texts_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, tokenizer = make(tmp_path)
    retriever = Retriever(engine, tokenizer, chunk_tokens=MIN_CHUNK)
    seen: list[tuple[int, ...]] = []
    listened: list[int] = []
    whole_read, whole_scores = ChunkReader.read, ChunkReader.scores

    def spy_read(self: ChunkReader, token_ids: Sequence[int]) -> None:
        seen.append(tuple(token_ids))
        whole_read(self, token_ids)

    def spy_scores(self: ChunkReader, questions: Sequence[Sequence[int]], lengths: Sequence[int]) -> Tensor:
        listened.append(sum(lengths))
        scores = whole_scores(self, questions, lengths)
        assert scores.shape == (len(questions), len(lengths))
        return scores

    monkeypatch.setattr(ChunkReader, "read", spy_read)
    monkeypatch.setattr(ChunkReader, "scores", spy_scores)
    texts = [text_of(30, 1), "", "x;y\n" * 400, text_of(3, 2)]
    *progress, found = retriever.read(texts, ["Where?", "Who is yellow?"])
    whole, seen, listened = seen, seen[: len(progress)], listened[: len(progress)]
    assert tokenizer.decode([token for ids in seen for token in ids], continues=True) == "".join(texts)
    assert listened == [len(ids) for ids in seen] and max(listened) <= MIN_CHUNK
    assert len(whole) == len(seen) + 2  # the passages of each question, side by side
    assert isinstance(found, list) and [each.question for each in found] == ["Where?", "Who is yellow?"]
    assert all(each.tokens_read == sum(listened) for each in found)
    steps = [event for event in progress if isinstance(event, Prefilled)]
    assert [step.done for step in steps] == list(itertools.accumulate(listened))
    assert steps[-1].total == steps[-1].done and all(step.total >= step.done for step in steps)
    for each in found:
        assert sum(len(tokenizer.encode(texts[one.document][one.start : one.stop])) for one in each.passages) <= 1024
        assert each.passages


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    engine, tokenizer = make(tmp_path)
    retriever = Retriever(engine, tokenizer, chunk_tokens=MIN_CHUNK, passage_tokens=MIN_CHUNK)
    held = []
    text = text_of(400)
    for event in retriever.read([text], ["Where?"]):
        if isinstance(event, Prefilled):
            held.append(tensor_bytes())
    assert len(held) > 15 and max(held[1:]) <= held[1] + 1024, held  # beside the window, a few small ones
    assert retriever.cache_bytes < 2 * LAYERS * 2 * 16 * 4 * (MIN_CHUNK + 100)


def test_stopping_leaves_a_reader_that_reads_on(tmp_path: Path) -> None:
    engine, tokenizer = make(tmp_path)
    retriever = Retriever(engine, tokenizer, chunk_tokens=MIN_CHUNK)
    text = text_of(60)
    events = retriever.read([text], ["Where?"])
    next(events)
    retriever.cancel()
    with pytest.raises(Cancelled):
        next(events)
    fresh = Retriever(engine, tokenizer, chunk_tokens=MIN_CHUNK)
    assert read(retriever, [text], ["Where?"]) == read(fresh, [text], ["Where?"])
    assert engine.position == 0  # the conversation's own context is left alone


def test_questions_read_together_find_what_they_find_alone(tmp_path: Path) -> None:
    engine, tokenizer = make(tmp_path)
    retriever = Retriever(engine, tokenizer, chunk_tokens=MIN_CHUNK, passage_tokens=200)
    texts, questions = [text_of(40), text_of(20, 3)], ["Where is the boat?", "Who slept?", "Two stones?"]
    together = read(retriever, texts, questions)
    for each in together:
        (alone,) = read(retriever, texts, [each.question])
        assert [(one.document, one.start, one.stop) for one in alone.passages] == [
            (one.document, one.start, one.stop) for one in each.passages
        ]
    assert len({each.passages for each in together}) > 1


def test_what_is_weak_beside_the_best_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, tokenizer = make(tmp_path)
    retriever = Retriever(engine, tokenizer, chunk_tokens=MIN_CHUNK, passage_tokens=600)
    text = text_of(60)
    progress: list[Prefilled] = []
    first: list[Prefilled] = []

    def scores(_: ChunkReader, questions: Sequence[Sequence[int]], lengths: Sequence[int]) -> Tensor:
        if not first:  # alone, every tenth sentence of a chunk is looked at, the later ones a little more
            return torch.tensor([[0.5 + at / 1000 if at % 10 == 5 else 0.0 for at in range(len(lengths))]])
        return torch.tensor([[0.3, *[0.1] * (len(lengths) - 2), 0.2]])  # side by side

    monkeypatch.setattr(ChunkReader, "scores", scores)
    for event in retriever.read([text], ["Where?"]):
        if isinstance(event, Prefilled):
            progress.append(event)
            if event.done == event.total:
                first.append(event)
        else:
            (found,) = event
    assert len(progress) > 3
    assert [one.score for one in found.passages] == pytest.approx([0.3, 0.2])
