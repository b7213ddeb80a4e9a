"""A conversation over an engine: documents, questions, answers, undo.

Owns the messages and what they are in tokens; yields events and prints nothing. The conversation only ever grows at
its end, or returns to a snapshot: what is in the cache is never rewritten. Generated ids stay as they were
generated; they are not rendered and tokenized again.
"""

import html
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from duolocal.cache import Snapshot
from duolocal.engine.engine import Cancelled, Engine
from duolocal.errors import ContextOverflowError, SettingsError
from duolocal.sampling import Sampling, StopStrings
from duolocal.tokenizer import ChatPiece, Message, Tokenizer

# A document must leave room for a question and its answer, or loading it was in vain.
ROOM_TO_ASK = 128  # tokens
# Snapshots are of constant size, but each holds the windows of all heads; older turns can no longer be undone.
MAX_UNDO = 8


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


Event = Prefilled | Text | Finished


@dataclass(frozen=True)
class ContextItem:
    """Something that is in context, with its tokens and those of the template (and system prompt) before it."""

    kind: Literal["document", "user", "assistant"]
    name: str
    num_tokens: int


@dataclass(frozen=True)
class _State:
    """All that an undo brings back, besides the cache."""

    messages: tuple[Message, ...]
    items: tuple[ContextItem, ...] = ()
    # What of the last user message's content is in the cache while that message is still open (documents, and no
    # question yet); None when the conversation ends with an answer or is empty.
    open_content: str | None = None
    unfed: tuple[int, ...] = ()  # generated ids that are not in the cache yet: the last of an answer


@dataclass(frozen=True)
class _Step:
    """One thing done, and the moment before it; the snapshot is dropped when it is too old."""

    kind: Literal["document", "exchange"]
    state: _State
    snapshot: Snapshot | None


class ChatSession:
    """Ask an engine about documents, turn after turn.

    Invariant: cache and `unfed` ids together are the encoding of `messages`, up to the end of the last answer or of
    the open content.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, system: str | None = None) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.system = system or None
        self._state = _empty_state(self.system)
        self._steps: list[_Step] = []
        self._texts: list[tuple[str, str]] = []  # documents as (name, text), in order
        self._cancelled = False

    @property
    def messages(self) -> list[Message]:
        """The conversation so far; an open user message holds the documents loaded since the last answer."""
        return list(self._state.messages)

    @property
    def documents(self) -> list[str]:
        """Names of the documents in context."""
        return [item.name for item in self._state.items if item.kind == "document"]

    def context_items(self) -> list[ContextItem]:
        """Return everything that is in context, in order; the token counts add up to all of it."""
        return list(self._state.items)

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
        open_content = self._state.open_content
        content = question if open_content is None else f"{open_content}\n\n{question}"
        messages, token_ids = self._encode_user(content, closed=True)
        room = self.engine.context - self.engine.position
        if len(token_ids) >= room:
            raise ContextOverflowError(
                f"the question is {len(token_ids):,} tokens and {max(0, room):,} of {self.engine.context:,} are "
                f"free: shorten it, /reset, or start with --context {self.engine.position + len(token_ids) + 1024}"
            )
        return self._answer(messages, token_ids, sampling)

    def retry(self, sampling: Sampling) -> Iterator[Event]:
        """Answer the last question anew. Raises SettingsError where there is none."""
        if not self._steps or self._steps[-1].kind != "exchange":
            raise SettingsError("there is no answer to try again: ask something first")
        step = self._steps[-1]
        if step.snapshot is None:
            raise SettingsError("that answer is too far back to try again")
        question = self._state.messages[-2].content
        if step.state.open_content is not None:
            question = question.removeprefix(f"{step.state.open_content}\n\n")
        self.undo()
        return self.ask(question, sampling)

    def undo(self) -> bool:
        """Take back the last exchange or document; False where there is nothing (more) to take back."""
        if not self._steps or self._steps[-1].snapshot is None:
            return False
        step = self._steps.pop()
        self._return_to(step.snapshot, step.state)
        if step.kind == "document":
            self._texts.pop()
        return True

    def reset(self) -> None:
        """Forget the conversation and all documents."""
        self.engine.reset()
        self._state = _empty_state(self.system)
        self._steps.clear()
        self._texts.clear()

    def forget_conversation(self) -> None:
        """Forget all questions and answers; documents loaded before the first question stay."""
        for index, step in enumerate(self._steps):
            if step.kind == "exchange":
                assert step.snapshot is not None  # the first exchange's is never dropped
                self._return_to(step.snapshot, step.state)
                del self._steps[index:]
                del self._texts[index:]
                return

    def set_system(self, text: str | None) -> Iterator[Event]:
        """Begin anew with another system prompt: the conversation is forgotten, documents are read again.

        Raises ContextOverflowError, with nothing changed, where they no longer fit.
        """
        texts, before, state = list(self._texts), self.system, self._state
        self.system = text or None
        self._state = _empty_state(self.system)
        try:
            self._check_documents_fit(self._plan_documents(texts), used=0)
        except ContextOverflowError:
            self.system, self._state = before, state
            raise
        self.reset()
        return self.add_documents(texts) if texts else iter(())

    # --- documents -------------------------------------------------------------------------------------------------

    def _plan_documents(self, documents: Sequence[tuple[str, str]]) -> list["_PlannedDocument"]:
        planned = []
        state = self._state
        for name, text in documents:
            wrapped = f'<document name="{html.escape(name)}">\n{text}\n</document>'
            content = wrapped if state.open_content is None else f"{state.open_content}\n\n{wrapped}"
            messages, token_ids = self._encode_user(content, closed=False, state=state)
            fed = messages[-1].content
            items = (*state.items, ContextItem("document", name, len(token_ids) - len(state.unfed)))
            before, state = state, replace(state, messages=messages, items=items, open_content=fed, unfed=())
            planned.append(_PlannedDocument(name, text, token_ids, before=before, after=state))
        return planned

    def _check_documents_fit(self, planned: Sequence["_PlannedDocument"], *, used: int | None = None) -> None:
        used = self.engine.position if used is None else used
        total = sum(len(document.token_ids) for document in planned)
        free = self.engine.context - used - ROOM_TO_ASK
        if total <= free:
            return
        sizes = ", ".join(f"{document.name} {len(document.token_ids):,}" for document in planned)
        needed = used + total + ROOM_TO_ASK
        raise ContextOverflowError(
            f"{total:,} tokens of documents do not fit ({sizes}): the context is {self.engine.context:,}, "
            f"{used:,} are in use and {ROOM_TO_ASK} are kept for a question; "
            f"load fewer or start with --context {-(-needed // 1024)}K"
        )

    def _read_documents(self, planned: Sequence["_PlannedDocument"]) -> Iterator[Event]:
        self._cancelled = False
        total = sum(len(document.token_ids) for document in planned)
        started = time.perf_counter()
        done = 0
        for document in planned:
            snapshot = self.engine.snapshot()
            finished = False
            try:
                for count in self._prefill(document.token_ids):
                    yield Prefilled(done + count, total, time.perf_counter() - started)
                finished = True
            except Cancelled:
                pass
            finally:
                if not finished:
                    self._return_to(snapshot, document.before)
            if not finished:
                break
            done += len(document.token_ids)
            self._remember("document", document.before, snapshot)
            self._state = document.after
            self._texts.append((document.name, document.text))
        reason: Literal["loaded", "cancelled"] = "loaded" if done == total else "cancelled"
        yield Finished(reason, done, 0, time.perf_counter() - started, 0.0)

    # --- answers ---------------------------------------------------------------------------------------------------

    def _answer(self, messages: tuple[Message, ...], token_ids: list[int], sampling: Sampling) -> Iterator[Event]:
        self._cancelled = False
        engine, before, snapshot = self.engine, self._state, self.engine.snapshot()
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
                fed = engine.position - fed_before
                self._remember("exchange", before, snapshot)
                self._state = self._answered(messages, token_ids, produced, fed=fed, answer="".join(parts))
            else:
                self._return_to(snapshot, before)
        now = time.perf_counter()
        yield Finished(reason, len(token_ids), len(produced), decoding_since - started, now - decoding_since)

    def _answered(
        self, messages: tuple[Message, ...], token_ids: list[int], produced: list[int], *, fed: int, answer: str
    ) -> _State:
        """Return the state after an answer, `fed` ids of question and answer being in the cache."""
        state = self._state
        question = messages[-1].content
        if state.open_content is not None:
            question = question.removeprefix(f"{state.open_content}\n\n")
        return _State(
            messages=(*messages, Message("assistant", answer)),
            items=(
                *state.items,
                # The ids left over from the answer before are counted there.
                ContextItem("user", question, len(token_ids) - len(state.unfed)),
                ContextItem("assistant", answer, len(produced)),
            ),
            unfed=tuple([*token_ids, *produced][fed:]),
        )

    # --- tokens ----------------------------------------------------------------------------------------------------

    def _encode_user(
        self, content: str, *, closed: bool, state: _State | None = None
    ) -> tuple[tuple[Message, ...], list[int]]:
        """Return the messages with `content` as the last user message, and the ids still to be fed for it.

        closed: up to where the answer begins; else up to the end of the content, as far as the template keeps it.
        """
        state = state or self._state
        is_open = state.open_content is not None
        messages = state.messages[:-1] if is_open else state.messages
        last = len(messages)
        messages = (*messages, Message("user", content))
        pieces = self.tokenizer.chat_pieces(messages, add_generation_prompt=closed)
        at = max(index for index, piece in enumerate(pieces) if piece.message == last)
        if is_open:
            assert state.open_content is not None
            # A template may strip a content, so what was fed is found in what it made of this one.
            rest = pieces[at].text.removeprefix(state.open_content)
            begin, continues = at, True
            pieces[at] = replace(pieces[at], text=rest, after_special=False)
        else:
            begin = self._end_of_answer(pieces, state)
            continues = begin > 0
        end = len(pieces) if closed else at + 1
        token_ids = [*state.unfed, *self.tokenizer.encode_pieces(pieces[begin:end], continues=continues)]
        kept = content if closed or is_open else pieces[at].text
        return (*messages[:-1], Message("user", kept)), token_ids

    def _end_of_answer(self, pieces: Sequence[ChatPiece], state: _State) -> int:
        """Return the first piece after the last answer, 0 where there is none."""
        index = len(state.messages) - 1
        if index < 0 or state.messages[index].role != "assistant":
            return 0
        ends = [at + 1 for at, piece in enumerate(pieces) if piece.message == index]
        if ends:
            return ends[-1]
        # A blank answer leaves no piece of its own: it stood where the generation prompt of its question ends.
        return len(self.tokenizer.chat_pieces(state.messages[:index], add_generation_prompt=True))

    def _prefill(self, token_ids: Sequence[int]) -> Iterator[int]:
        for count in self.engine.prefill(token_ids):
            if self._cancelled:
                raise Cancelled
            yield count
        if self._cancelled:
            raise Cancelled

    # --- undo ------------------------------------------------------------------------------------------------------

    def _remember(self, kind: Literal["document", "exchange"], state: _State, snapshot: Snapshot) -> None:
        self._steps.append(_Step(kind, state, snapshot))
        first_exchange = next((i for i, step in enumerate(self._steps) if step.kind == "exchange"), None)
        for index in range(len(self._steps) - MAX_UNDO):
            if index != first_exchange and self._steps[index].snapshot is not None:
                self._steps[index] = replace(self._steps[index], snapshot=None)

    def _return_to(self, snapshot: Snapshot | None, state: _State) -> None:
        assert snapshot is not None
        self.engine.restore(snapshot)
        self._state = state


@dataclass(frozen=True)
class _PlannedDocument:
    name: str
    text: str
    token_ids: list[int]
    before: _State
    after: _State


def _empty_state(system: str | None) -> _State:
    return _State(messages=(Message("system", system),) if system else ())
