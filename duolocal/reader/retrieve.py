"""Reading texts of any length for questions, chunk by chunk, with a window of constant size.

After InfiniRetri (arXiv 2502.12962): a model that can only be trusted with a few thousand tokens reads all of a text in
chunks, the attention of a question says which sentences matter, and those alone are carried on. Here the scores of all
chunks are compared directly instead of rereading what is carried in every chunk, so that the chunks are independent. At
the end the passages are read once more side by side: in one softmax they compete, and what only looks alike falls back.
Knows nothing of conversations; yields progress and prints nothing.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from duolocal.engine.engine import Cancelled, Engine
from duolocal.engine.session import Prefilled
from duolocal.errors import SettingsError
from duolocal.reader.attention import ChunkReader
from duolocal.reader.passages import Carried, Carry, Passage, choose
from duolocal.reader.sentences import MAX_TOKENS, chunks, sentences
from duolocal.tokenizer import Tokenizer

CHUNK_TOKENS = 1024
MIN_CHUNK = 2 * MAX_TOKENS
PASSAGE_TOKENS = 1024  # of all passages for an answer
MIN_PASSAGE_TOKENS = MAX_TOKENS
KEPT_SHARE = 0.5  # of the best score, when passages are read side by side


@dataclass(frozen=True)
class Found:
    """What was found for one question, in the order of the texts, and how many tokens were read for it."""

    question: str
    passages: tuple[Passage, ...]
    tokens_read: int


@dataclass(frozen=True)
class State:
    """A reading that was interrupted: how far it came, and what is carried for each question."""

    chunks: int
    tokens: int
    carried: tuple[tuple[Carried, ...], ...]


class Retriever:
    """Finds the passages that questions look at, in texts of any length. Its memory does not grow with the text."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        chunk_tokens: int = CHUNK_TOKENS,
        passage_tokens: int = PASSAGE_TOKENS,
    ) -> None:
        if chunk_tokens < MIN_CHUNK:
            raise SettingsError(f"chunks of {chunk_tokens:,} tokens are too short to read: give {MIN_CHUNK} or more")
        if passage_tokens < MIN_PASSAGE_TOKENS:
            raise SettingsError(
                f"passages of {passage_tokens:,} tokens in all cannot hold a sentence: give {MIN_PASSAGE_TOKENS} "
                "or more"
            )
        self.tokenizer = tokenizer
        self.chunk_tokens = chunk_tokens
        self.passage_tokens = passage_tokens
        self._state = State(0, 0, ())
        self._carries: list[Carry] = []
        self._cancel = threading.Event()
        window = max(chunk_tokens, passage_tokens)
        self._reader = ChunkReader(engine, tokenizer, chunk_tokens=window, before_layer=self._check)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the window that chunks are read in."""
        return self._reader.cache_bytes

    def cancel(self) -> None:
        """Stop the reading (safe from a signal handler); it raises Cancelled."""
        self._cancel.set()

    def state(self) -> State:
        """Return how far the reading has come, for `read` to go on from; constant size."""
        return State(self._state.chunks, self._state.tokens, tuple(tuple(carry.best()) for carry in self._carries))

    def _check(self, _layer: int) -> None:
        if self._cancel.is_set():
            raise Cancelled

    def read(
        self, texts: Sequence[str], questions: Sequence[str], *, resume: State | None = None
    ) -> Iterator[Prefilled | list[Found]]:
        """Read all of `texts` once for all questions, yielding progress and, last, a Found per question.

        The total of the progress is estimated from the characters until the end. Raises Cancelled after `cancel`.
        resume: the `state` of an earlier reading of the same texts for the same questions, to go on after it.
        """
        self._cancel.clear()
        started = time.perf_counter()
        asked = [self._reader.frame.question(question) for question in questions]
        carries = [Carry(() if resume is None else resume.carried[at]) for at in range(len(questions))]
        self._state = State(0, 0, ()) if resume is None else resume
        self._carries = carries
        before = [0]  # characters of the documents before each
        for text in texts:
            before.append(before[-1] + len(text))
        done, skipped = 0, 0
        for count, chunk in enumerate(chunks(sentences(texts, self._encode), self.chunk_tokens), 1):
            lengths = [len(sentence.token_ids) for sentence in chunk]
            if resume is not None and count <= resume.chunks:
                done = skipped = done + sum(lengths)
                continue
            self._reader.read([token for sentence in chunk for token in sentence.token_ids])
            for carry, scores in zip(carries, self._reader.scores(asked, lengths).tolist(), strict=True):
                for sentence, score in zip(chunk, scores, strict=True):
                    carry.offer(sentence, score)
            done += sum(lengths)
            self._state = State(count, done, ())
            characters = before[chunk[-1].document] + chunk[-1].stop
            total = max(done, round(done * before[-1] / characters))
            yield Prefilled(done - skipped, total - skipped, time.perf_counter() - started)
        yield [
            Found(question, tuple(self._compare(texts, ids, carry)), done)
            for question, ids, carry in zip(questions, asked, carries, strict=True)
        ]

    def _compare(self, texts: Sequence[str], question: Sequence[int], carry: Carry) -> list[Passage]:
        """Return the passages of what is carried, with their scores side by side; the weaker are left out."""
        passages = choose(
            carry.best(),
            lambda at, start, stop: len(self._encode(texts[at][start:stop])),
            budget=self.passage_tokens,
        )
        if not passages:
            return []
        encoded = [self._encode(texts[one.document][one.start : one.stop]) for one in passages]
        self._reader.read([token for ids in encoded for token in ids])
        scores = self._reader.scores([question], [len(ids) for ids in encoded])[0].tolist()
        return [
            replace(one, score=score)
            for one, score in zip(passages, scores, strict=True)
            if score >= KEPT_SHARE * max(scores)
        ]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, continues=True)
