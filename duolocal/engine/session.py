"""A conversation over an engine: documents, questions, answers, and the way back to any of them.

Owns the messages and what they are in tokens; yields events and prints nothing. The conversation only ever grows at
its end, or goes to the end of another turn (`turns`): what is in the cache is never rewritten. Generated ids stay as
they were generated; they are not rendered and tokenized again.
"""

import html
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from torch import Tensor

from duolocal.engine.engine import Cancelled, Engine
from duolocal.engine.fitting import Fit
from duolocal.engine.turns import ContextItem, Turn, TurnTree
from duolocal.errors import ContextOverflowError, SettingsError, TokenizerError
from duolocal.sampling import StopStrings
from duolocal.settings import Sampling
from duolocal.tokenizer import ChatPiece, Message, Tokenizer

# A document must leave room for a question and its answer, or loading it was in vain.
ROOM_TO_ASK = 128  # tokens


@dataclass(frozen=True)
class Prefilled:
    """Progress of reading: tokens done of the tokens in all."""

    done: int
    total: int
    elapsed_s: float


@dataclass(frozen=True)
class Text:
    """A further piece of the answer; never half a character."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The end of a document or of an answer, with what it took."""

    reason: Literal["stop", "length", "context", "cancelled", "loaded"]
    prompt_tokens: int
    completion_tokens: int
    prefill_s: float
    decode_s: float


@dataclass(frozen=True)
class Reused:
    """Tokens that were found computed before and are in the cache now, instead of being read."""

    num_tokens: int
    origin: str  # for people
    elapsed_s: float


Event = Prefilled | Text | Finished | Reused


class Keeper(Protocol):
    """Keeps what a session computes where the session can be taken up again (`duolocal.sessions`)."""

    def look_up(
        self, session: "ChatSession", token_ids: Sequence[int], ends: Sequence[int]
    ) -> tuple[str, dict[int, Tensor]] | None:
        """Bring the engine further into what is about to be read after its context: `token_ids`, computing nothing.

        ends: positions in the context at which a ring is wanted, rising. Returns where the tokens came from, for
        people, and the rings known at positions that were passed; of the last of `ends` that was passed always. None
        where nothing is kept.
        """
        ...

    def chunk_read(self, session: "ChatSession") -> None:
        """A chunk of documents is in the cache: now and then a moment to keep them."""
        ...

    def turn_added(self, session: "ChatSession", turn: Turn) -> None:
        """Documents or an exchange are complete, or were gone to; the engine is further where reading was stopped."""
        ...

    def forgotten(self, session: "ChatSession") -> None:
        """Everything was forgotten, documents and conversation."""
        ...


def document_content(name: str, text: str) -> str:
    """Return what the model reads of a document: its text between two lines that name it."""
    return f'<document name="{html.escape(name)}">\n{text}\n</document>'


def document_ids(tokenizer: Tokenizer, name: str, text: str, *, first: bool) -> list[int]:
    """Return the ids that a document takes of a new conversation.

    first: with all that the template writes before it; else it goes on in the same message, where no template writes.
    Raises TokenizerError.
    """
    content = document_content(name, text)
    if not first:
        return tokenizer.encode_pieces([ChatPiece(f"\n\n{content}")], continues=True)
    pieces = tokenizer.chat_pieces([Message("user", content)], add_generation_prompt=False)
    last = max((index for index, piece in enumerate(pieces) if piece.message == 0), default=-1)
    return tokenizer.encode_pieces(pieces[: last + 1], continues=False)


def messages_until(turn: Turn) -> tuple[list[Message], str | None]:
    """Return the messages up to the last answer before or at a turn, and the content of the user message that is open.

    The open content is the documents since that answer; None where there are none.
    """
    messages: list[Message] = []
    content: list[str] = []
    for step in turn.way():
        if step.kind == "document":
            content.append(document_content(step.name, step.text))
        elif step.kind == "exchange":
            messages += [Message("user", "\n\n".join([*content, step.name])), Message("assistant", step.text)]
            content = []
        elif step.text:
            messages.append(Message("system", step.text))
    return messages, "\n\n".join(content) if content else None


class ChatSession:
    """Ask an engine about documents, turn after turn.

    Invariant: cache and `unfed` ids together are the encoding of `messages`, up to the end of the last answer or of
    the documents after it.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, *, system: str | None = None, keeper: Keeper | None = None
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.system = system or None
        self.keeper = keeper
        self.tree = TurnTree(engine, self.system or "")
        self._cancelled = False

    @property
    def messages(self) -> list[Message]:
        """The conversation so far; an open user message holds the documents loaded since the last answer."""
        messages, open_content = messages_until(self.tree.current)
        return messages if open_content is None else [*messages, Message("user", open_content)]

    @property
    def documents(self) -> list[str]:
        """Names of the documents in context."""
        return [name for name, _ in self.texts]

    @property
    def texts(self) -> list[tuple[str, str]]:
        """The documents in context as (name, text), in order."""
        return [(turn.name, turn.text) for turn in self.tree.current.way() if turn.kind == "document"]

    def context_items(self) -> list[ContextItem]:
        """Return everything that is in context, in order; the token counts add up to all of it."""
        return [item for turn in self.tree.current.way() for item in turn.items()]

    def cancel(self) -> None:
        """Stop what is running; safe from a signal handler."""
        self._cancelled = True
        self.engine.cancel()

    def add_document(self, name: str, text: str) -> Iterator[Event]:
        """Read one document into the context; see `add_documents`."""
        return self.add_documents([(name, text)])

    def add_documents(self, documents: Sequence[tuple[str, str]]) -> Iterator[Event]:
        """Read documents (name, text) into the context, yielding progress and Finished("loaded" or "cancelled").

        They belong to the next question's message, so they are prefilled before it is asked. All are checked before
        any is read: raises ContextOverflowError, with the numbers, where they and a question do not fit. What is
        cancelled leaves the documents that were read whole.
        """
        planned = self._plan_documents(documents)
        self._check_documents_fit(planned)
        return self._read_documents(planned)

    def ask(self, question: str, sampling: Sampling) -> Iterator[Event]:
        """Ask, yielding Prefilled, then Text pieces, then Finished.

        Raises ContextOverflowError before any work. Cancelling before the first token of the answer leaves the
        conversation as it was; later, the answer so far is kept.
        """
        if not question.strip():
            raise SettingsError("the question is empty: type one")
        token_ids = self._encode_user(question, closed=True)
        room = self.engine.context - self.engine.position
        if len(token_ids) >= room:
            raise ContextOverflowError(
                f"the question is {len(token_ids):,} tokens and {max(0, room):,} of {self.engine.context:,} are "
                f"free: shorten it, /reset, or start with --context {self.engine.position + len(token_ids) + 1024}"
            )
        return self._answer(question, token_ids, sampling)

    def retry(self, sampling: Sampling) -> Iterator[Event]:
        """Answer the last question anew; the answer before stays a turn. Raises SettingsError where there is none."""
        turn = self.tree.current
        if turn.kind != "exchange":
            raise SettingsError("there is no answer to try again: ask something first")
        self.undo()
        return self.ask(turn.name, sampling)

    def undo(self, count: int = 1) -> bool:
        """Go back before the last `count` exchanges or documents; False where there are not so many.

        Takes milliseconds, unless the ring at that point had to be given up (`TurnTree.needs_reading`).
        """
        events = self.go_back(count)
        for _ in events or ():
            pass
        return events is not None

    def go_back(self, count: int) -> Iterator[Event] | None:
        """Go back before the last `count` turns, yielding as `go_to`; None where there are not so many."""
        way = self.tree.current.way()
        return self.go_to(way[-1 - count]) if 1 <= count < len(way) else None

    def go_to(self, turn: Turn, *, line: str | None = None) -> Iterator[Event]:
        """Go to the end of another turn, yielding progress where tokens must be read again, then Finished.

        What is left can be gone to as well. "cancelled": the session is at the last whole turn on the way.
        """
        self._cancelled = False
        started = time.perf_counter()
        done = 0
        reason: Literal["loaded", "cancelled"] = "loaded"
        steps = self.tree.go_to(turn, line=line)
        try:
            for done, total in steps:
                yield Prefilled(done, total, time.perf_counter() - started)
                if self._cancelled and done < total:
                    raise Cancelled
        except Cancelled:
            reason = "cancelled"
        finally:
            steps.close()  # type: ignore[attr-defined]
            self._tell_keeper()
        yield Finished(reason, done, 0, time.perf_counter() - started, 0.0)

    def reset(self) -> None:
        """Forget the conversation and all documents."""
        self.engine.reset()
        self.tree.begin(self.system or "")
        if self.keeper is not None:
            self.keeper.forgotten(self)

    def forget_conversation(self) -> None:
        """Forget all questions and answers; documents loaded before the first question stay."""
        exchange = next((turn for turn in self.tree.current.way() if turn.kind == "exchange"), None)
        if exchange is not None and exchange.parent is not None:
            for _ in self.tree.go_to(exchange.parent):
                pass
        self.tree.prune(self.tree.current)
        self._tell_keeper()

    def set_system(self, text: str | None) -> Iterator[Event]:
        """Begin anew with another system prompt: the conversation is forgotten, documents are read again.

        Raises ContextOverflowError, with nothing changed, where they no longer fit, or no question would.
        """
        texts, start = self.texts, Turn(0, None, "start", text=text or "")
        least, context = len(self._encode_user("?", closed=True, after=start)), self.engine.context
        if least >= context:
            raise ContextOverflowError(
                f"with this system message the shortest question has {least:,} tokens, and the context {context:,}: "
                "shorten it, or start with a larger --context"
            )
        self._check_documents_fit(self._plan_documents(texts, after=start), used=0)
        self.system = text or None
        self.reset()
        return self.add_documents(texts) if texts else iter(())

    # --- documents -------------------------------------------------------------------------------------------------

    def _plan_documents(
        self, documents: Sequence[tuple[str, str]], *, after: Turn | None = None
    ) -> list["_PlannedDocument"]:
        planned: list[_PlannedDocument] = []
        for name, text in documents:
            if planned:
                token_ids = document_ids(self.tokenizer, name, text, first=False)
            else:
                token_ids = self._encode_user(document_content(name, text), closed=False, after=after)
            planned.append(_PlannedDocument(name, text, token_ids))
        return planned

    def _check_documents_fit(self, planned: Sequence["_PlannedDocument"], *, used: int | None = None) -> None:
        used = self.engine.position if used is None else used
        sizes = tuple((document.name, len(document.token_ids)) for document in planned)
        fit = Fit(sizes, self.engine.context, used=used, kept=ROOM_TO_ASK, trained=self.engine.config.max_positions)
        if not fit.fits:
            raise ContextOverflowError(fit.refusal())

    def _read_documents(self, planned: Sequence["_PlannedDocument"]) -> Iterator[Event]:
        self._cancelled = False
        engine = self.engine
        total = sum(len(document.token_ids) for document in planned)
        started = time.perf_counter()
        begin = end = engine.position
        rings: dict[int, Tensor] = {}
        read_from = begin
        try:
            if self.keeper is not None and planned:
                token_ids = [token for document in planned for token in document.token_ids]
                ends = list(itertools.accumulate((len(document.token_ids) for document in planned), initial=begin))
                found = self.keeper.look_up(self, token_ids, ends[1:])
                if found is not None:
                    origin, rings = found
                    yield Reused(engine.position - begin, origin, time.perf_counter() - started)
            read_from = engine.position
            for document in planned:
                start, end = end, end + len(document.token_ids)
                for _ in self._prefill(document.token_ids[engine.position - start :]) if engine.position < end else ():
                    if self.keeper is not None:
                        self.keeper.chunk_read(self)
                    progress = engine.position - read_from
                    yield Prefilled(progress, total - (read_from - begin), time.perf_counter() - started)
                self.tree.add("document", num_tokens=end, ring=rings.get(end), name=document.name, text=document.text)
        except Cancelled:
            pass
        finally:
            self._tell_keeper()
            self.tree.take_up()  # what was read of a document that is not whole is gone
        done = self.tree.current.end - begin
        num_read = max(0, self.tree.current.end - read_from)
        reason: Literal["loaded", "cancelled"] = "loaded" if done == total else "cancelled"
        yield Finished(reason, num_read, 0, time.perf_counter() - started, 0.0)

    # --- answers ---------------------------------------------------------------------------------------------------

    def _answer(self, question: str, token_ids: list[int], sampling: Sampling) -> Iterator[Event]:
        self._cancelled = False
        engine = self.engine
        fed_before = engine.position
        started = time.perf_counter()
        produced: list[int] = []
        parts: list[str] = []
        reason: Literal["stop", "length", "context", "cancelled"] = "cancelled"
        decoding_since = started
        try:
            for count in self._prefill(token_ids[:-1]):
                yield Prefilled(count, len(token_ids), time.perf_counter() - started)
            stream = self.tokenizer.stream(continues=True)
            stops = StopStrings(sampling.stop)
            decoding_since = time.perf_counter()
            for token in engine.generate(token_ids[-1:], sampling, eos_ids=self.tokenizer.eos_ids):
                if not produced:
                    yield Prefilled(len(token_ids), len(token_ids), time.perf_counter() - started)
                    decoding_since = time.perf_counter()
                produced.append(token)
                shown = stops.push(stream.push(token))
                if shown:
                    parts.append(shown)
                    yield Text(shown)
                if stops.stopped:
                    break
                if self._cancelled:
                    raise Cancelled
            rest = stops.push(stream.flush()) + stops.flush()
            reason = "stop" if stops.stopped else engine.finish_reason or "stop"
            if rest:
                parts.append(rest)
                yield Text(rest)
        except Cancelled:
            pass
        finally:
            if produced or reason == "stop":
                self.tree.add(
                    "exchange",
                    num_tokens=engine.position,
                    name=question,
                    text="".join(parts),
                    reason=reason,
                    unfed=tuple([*token_ids, *produced][engine.position - fed_before :]),
                    num_answered=len(produced),
                )
                self._tell_keeper()
            else:
                self.tree.take_up()
        now = time.perf_counter()
        yield Finished(reason, len(token_ids), len(produced), decoding_since - started, now - decoding_since)

    # --- tokens ----------------------------------------------------------------------------------------------------

    def _encode_user(self, content: str, *, closed: bool, after: Turn | None = None) -> list[int]:
        """Return the ids still to be fed for `content` in the user message after, or open at, a turn.

        closed: up to where the answer begins; else up to the end of the content, as far as the template keeps it.
        """
        after = after or self.tree.current
        messages, open_content = messages_until(after)
        last = len(messages)
        whole = content if open_content is None else f"{open_content}\n\n{content}"
        pieces = self.tokenizer.chat_pieces([*messages, Message("user", whole)], add_generation_prompt=closed)
        at = max((index for index, piece in enumerate(pieces) if piece.message == last), default=-1)
        if at < 0:
            raise TokenizerError(
                "this model's chat template leaves a message of the user out, so the model would not read it: "
                "ask more than blanks, or take a file of the model with another template"
            )
        if open_content is None:
            begin = self._end_of_answer(pieces, messages)
            continues = begin > 0
        else:
            # A template may strip a content, so what was fed is found in what it made of this one.
            begin, continues = at, True
            pieces[at] = replace(pieces[at], text=pieces[at].text.removeprefix(open_content), after_special=False)
        end = len(pieces) if closed else at + 1
        return [*after.unfed, *self.tokenizer.encode_pieces(pieces[begin:end], continues=continues)]

    def _end_of_answer(self, pieces: Sequence[ChatPiece], messages: Sequence[Message]) -> int:
        """Return the first piece after the last answer, 0 where there is none."""
        index = len(messages) - 1
        if index < 0 or messages[index].role != "assistant":
            return 0
        ends = [at + 1 for at, piece in enumerate(pieces) if piece.message == index]
        if ends:
            return ends[-1]
        # A blank answer leaves no piece of its own: it stood where the generation prompt of its question ends.
        return len(self.tokenizer.chat_pieces(messages[:index], add_generation_prompt=True))

    def _prefill(self, token_ids: Sequence[int]) -> Iterator[int]:
        for count in self.engine.iter_prefill(token_ids):
            if self._cancelled:
                raise Cancelled
            yield count
        if self._cancelled:
            raise Cancelled

    # --- turns -----------------------------------------------------------------------------------------------------

    def _tell_keeper(self) -> None:
        if self.keeper is not None:
            self.keeper.turn_added(self, self.tree.current)


@dataclass(frozen=True)
class _PlannedDocument:
    name: str
    text: str
    token_ids: list[int]
