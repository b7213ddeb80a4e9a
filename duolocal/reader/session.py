"""Questions about documents that do not fit into the context: read in full for each question, answered from passages.

Wraps a ChatSession, whose context then holds the conversation and, for every question, the passages that were found for
it. The documents themselves are never in it. Yields events and prints nothing.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from weakref import WeakSet

from duolocal.engine.engine import Cancelled
from duolocal.engine.session import ROOM_TO_ASK, ChatSession, Event, Finished, Prefilled
from duolocal.engine.turns import Turn
from duolocal.errors import ContextOverflowError, SettingsError
from duolocal.reader.passages import Passage
from duolocal.reader.retrieve import Found, Retriever
from duolocal.settings import Sampling
from duolocal.sources import Source

ELLIPSIS = "\n\n[…]\n\n"  # between passages
# Said before the question, and the best passage last, right above it: SmolLM2-135M answered 4 of 12 questions from the
# bare passages in the order of the text, and 11 like this (docs/reader.md).
INSTRUCTION = "Answer the question from the text above.\n"
_FRAME_TOKENS = 64  # of the lines that name a document, and of the template


@dataclass(frozen=True)
class Picked:
    """What the model was given for a question: passages in the order of the documents, and what they were found in."""

    passages: tuple[Source, ...]
    num_tokens: int  # of the passages
    tokens_read: int


class ReadingSession:
    """Ask about documents of any length; a ChatSession does the talking.

    Invariant: between questions the last turn of the conversation is not one of passages.
    """

    def __init__(self, session: ChatSession, retriever: Retriever) -> None:
        self.session = session
        self.retriever = retriever
        self.documents: dict[str, str] = {}  # by name, in the order in which they are read
        self.last: Picked | None = None
        self._mine: WeakSet[Turn] = WeakSet()
        self._cancelled = False

    def add(self, name: str, text: str) -> None:
        """Have a document read from the next question on. Raises SettingsError where there is nothing in it."""
        if not text.strip():
            raise SettingsError(f"{name} has no text to read: leave it out")
        self.documents[name] = text

    def cancel(self) -> None:
        """Stop what is running; safe from a signal handler."""
        self._cancelled = True
        self.retriever.cancel()
        self.session.cancel()

    def ask(self, question: str, sampling: Sampling) -> Iterator[Event | Picked]:
        """Read all documents for the question, then answer it from what was found.

        Yields Prefilled while reading, Picked, and then what `ChatSession.ask` yields, the times of both together.
        Raises ContextOverflowError before the reading where passages and answer have no room.
        """
        if not question.strip():
            raise SettingsError("the question is empty: type one")
        if not self.documents:
            raise SettingsError("there are no documents to read: /load one, or start with --doc")
        self.tidy()
        self._check_room(question)
        return self._ask(question, sampling)

    def tidy(self) -> None:
        """Take passages whose question was undone, stopped or refused out of the context."""
        while self.session.tree.current in self._mine:
            for _ in self.session.go_back(1) or ():
                pass

    def _check_room(self, question: str) -> None:
        session, wanted = self.session, self.retriever.passage_tokens
        used, context = session.engine.position, session.engine.context
        needed = wanted + len(session.tokenizer.encode(question)) + _FRAME_TOKENS + ROOM_TO_ASK
        if used + needed > context:
            choice = "/reset, or " if used else ""
            raise ContextOverflowError(
                f"{needed:,} tokens are needed for passages ({wanted:,}), question and answer, and "
                f"{max(0, context - used):,} of {context:,} are free: {choice}start with fewer --passages or a larger "
                "--context"
            )

    def _ask(self, question: str, sampling: Sampling) -> Iterator[Event | Picked]:
        self._cancelled = False
        started = time.perf_counter()
        found: Found | None = None
        done = 0
        try:
            for event in self.retriever.read(list(self.documents.values()), [question]):
                if isinstance(event, Prefilled):
                    done = event.done
                    yield event
                else:
                    found = event[0]
        except Cancelled:
            yield Finished("cancelled", done, 0, time.perf_counter() - started, 0.0)
            return
        assert found is not None
        yield from self._answer(question, found, sampling, done, started)

    def answer(self, question: str, found: Found, sampling: Sampling) -> Iterator[Event | Picked]:
        """Answer from what a Retriever found in the documents, without reading them again; yields as `ask` does."""
        self._cancelled = False
        self.tidy()
        self._check_room(question)
        return self._answer(question, found, sampling, 0, time.perf_counter())

    def _answer(
        self, question: str, found: Found, sampling: Sampling, done: int, started: float
    ) -> Iterator[Event | Picked]:
        names, texts = list(self.documents), list(self.documents.values())
        reading, passages = self._load(names, texts, found.passages)
        sources = tuple(
            Source(names[one.document], texts[one.document], one.start, one.stop, one.score) for one in passages
        )
        encode = self.session.tokenizer.encode
        count = sum(len(encode(source.text[source.start : source.stop], continues=True)) for source in sources)
        self.last = Picked(sources, count, found.tokens_read)
        yield self.last
        begin = self.session.engine.position
        stopped = self._cancelled
        for loading in () if stopped else reading:
            if isinstance(loading, Prefilled):
                yield Prefilled(done + loading.done, done + loading.total, time.perf_counter() - started)
            elif isinstance(loading, Finished):
                stopped = loading.reason == "cancelled"
        way = self.session.tree.current.way()
        self._mine.update(turn for turn in way if turn.kind == "document" and turn.start >= begin)
        before_s = time.perf_counter() - started
        read = done + self.session.engine.position - begin
        if stopped or self._cancelled:
            self.tidy()
            yield Finished("cancelled", read, 0, before_s, 0.0)
            return
        for said in self.session.ask(INSTRUCTION + question if passages else question, sampling):
            if isinstance(said, Prefilled):
                said = Prefilled(read + said.done, read + said.total, before_s + said.elapsed_s)
            elif isinstance(said, Finished):
                said = replace(said, prompt_tokens=read + said.prompt_tokens, prefill_s=before_s + said.prefill_s)
                self.tidy()  # where it was stopped before the answer began
            yield said

    def _load(
        self, names: Sequence[str], texts: Sequence[str], passages: Sequence[Passage]
    ) -> tuple[Iterator[Event], list[Passage]]:
        """Return what reads passages into the context, the best last, and which those are: the best that fit."""
        kept = sorted(passages, key=lambda one: -one.score)
        while kept:
            documents: dict[int, list[str]] = {}
            for one in kept:
                documents.setdefault(one.document, []).append(texts[one.document][one.start : one.stop].strip("\n"))
            named = [(f"{names[at]} (passages)", ELLIPSIS.join(parts[::-1])) for at, parts in documents.items()]
            try:
                return self.session.add_documents(named[::-1]), [one for one in passages if one in kept]
            except ContextOverflowError:
                if len(kept) == 1:
                    raise
                kept.pop()
        return iter(()), kept
