"""A session without a model, for the tests of the terminal: words are tokens, answers are given in advance."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import Literal

from rich.console import Console

from duolocal.cache import CacheMemory
from duolocal.engine.engine import EngineMemory
from duolocal.engine.session import ContextItem, Event, Finished, Prefilled, Text
from duolocal.engine.speculation import Speculation
from duolocal.errors import ContextOverflowError
from duolocal.settings import LoadSettings, Sampling
from duolocal.terminal.chat import Chat
from duolocal.terminal.chat_state import ChatState
from duolocal.terminal.views import Facts
from duolocal.tokenizer import Message

Reason = Literal["stop", "length", "context", "cancelled"]
Kind = Literal["document", "user", "assistant"]

FACTS = Facts(
    model="tiny",
    weight_format="Q4_1",
    kv_format="int8",
    context=1000,
    num_retrieval=45,
    num_heads=90,
    sink_size=64,
    recent_size=256,
    plan_source="measured",
    notes=("RoPE scaling: yarn, factor 4",),
    load_s=1.25,
)


@dataclass
class FakeEngine:
    position: int = 0
    speculation: Speculation | None = field(default_factory=Speculation)

    def memory(self) -> EngineMemory:
        return EngineMemory(weights=50 * 2**20, cache=CacheMemory(3 * 2**20, 2**20, 2 * 2**20), dense_16bit=24 * 2**20)


@dataclass
class FakeSession:
    answer: list[str] = field(default_factory=lambda: ["It is ", "**green**."])
    reason: Reason = "stop"
    engine: FakeEngine = field(default_factory=FakeEngine)
    messages: list[Message] = field(default_factory=list)
    items: list[ContextItem] = field(default_factory=list)
    system: str | None = None
    samplings: list[Sampling] = field(default_factory=list)
    cancelled: bool = False
    cancel_after: int | None = None  # pieces of the answer after which somebody presses Ctrl-C

    def cancel(self) -> None:
        self.cancelled = True

    def _append(self, kind: Kind, name: str, text: str) -> int:
        count = len(text.split())
        if self.engine.position + count > FACTS.context:
            raise ContextOverflowError(f"{count:,} tokens do not fit: {FACTS.context - self.engine.position:,} free")
        self.items.append(ContextItem(kind, name, count))
        self.engine.position += count
        return count

    def _pop(self) -> None:
        self.engine.position -= self.items.pop().num_tokens

    def ask(self, text: str, sampling: Sampling) -> Iterator[Event]:
        self.samplings.append(sampling)
        self.cancelled = False
        prompt = self._append("user", text, text)
        self.messages.append(Message("user", text))
        yield Prefilled(prompt, prompt, 0.5)
        said = ""
        reason = self.reason
        for count, piece in enumerate(self.answer):
            if count == self.cancel_after:
                self.cancel()
            if self.cancelled:
                reason = "cancelled"
                break
            said += piece
            yield Text(piece)
        if reason == "cancelled" and not said:
            self._pop()
            self.messages.pop()
            yield Finished("cancelled", prompt, 0, 0.5, 0.0)
            return
        self.messages.append(Message("assistant", said))
        count = self._append("assistant", "", said)
        yield Finished(reason, prompt, count, 0.5, 0.25)

    def retry(self, sampling: Sampling) -> Iterator[Event]:
        question = self.messages[-2].content
        self.undo()
        return self.ask(question, sampling)

    @property
    def documents(self) -> list[str]:
        return [item.name for item in self.items if item.kind == "document"]

    def add_documents(self, documents: Sequence[tuple[str, str]]) -> Iterator[Event]:
        total = sum(len(text.split()) for _, text in documents)
        if self.engine.position + total > FACTS.context:
            raise ContextOverflowError(f"{total:,} tokens of documents do not fit")
        return self._read(documents, total)

    def _read(self, documents: Sequence[tuple[str, str]], total: int) -> Iterator[Event]:
        self.cancelled = False
        done = 0
        for name, text in documents:
            yield Prefilled(done, total, 0.1)
            if self.cancelled:
                break
            done += self._append("document", name, text)
        reason: Literal["loaded", "cancelled"] = "loaded" if done == total else "cancelled"
        yield Finished(reason, done, 0, 0.2, 0.0)

    def undo(self, count: int = 1) -> bool:
        for _ in range(count):
            if not self.items:
                return False
            if self.items[-1].kind == "assistant":
                self._pop()
                del self.messages[-2:]
            self._pop()
        return True

    def go_back(self, count: int) -> Iterator[Event] | None:
        return iter((Finished("loaded", 0, 0, 0.0, 0.0),)) if self.undo(count) else None

    def reset(self) -> None:
        self.engine.position = 0
        self.items.clear()
        self.messages.clear()

    def forget_conversation(self) -> None:
        while self.items and self.items[-1].kind != "document":
            self.undo()

    def set_system(self, text: str | None) -> Iterator[Event]:
        self.reset()
        self.system = text
        if text:
            self.messages.append(Message("system", text))
        return iter(())

    def context_items(self) -> list[ContextItem]:
        return list(self.items)


def make_chat(session: FakeSession | None = None, *, columns: int = 80) -> tuple[Chat, StringIO]:
    """Return a chat over a fake session and what it prints, as plain text."""
    output = StringIO()
    console = Console(file=output, width=columns, height=24, force_terminal=False, highlight=False)
    state = ChatState(
        session or FakeSession(),  # type: ignore[arg-type]
        FACTS,
        LoadSettings(model="tiny", kv="int8"),
        Sampling(),
    )
    return Chat(console, state), output


def unwrapped(text: str) -> str:
    """Return prose as one line: where it was wrapped depends on the lengths of paths in it."""
    return " ".join(text.split())
