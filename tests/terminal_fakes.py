"""A session without a model, for the tests of the terminal: words are tokens, answers are given in advance."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from io import StringIO

from rich.console import Console

from duolocal.cache import CacheMemory
from duolocal.engine.engine import EngineMemory
from duolocal.engine.session import ContextItem, Event, Finished, Prefilled, Text
from duolocal.errors import ContextOverflowError
from duolocal.sampling import Sampling
from duolocal.settings import ChatSettings
from duolocal.terminal.chat import Chat
from duolocal.terminal.views import Facts
from duolocal.tokenizer import Message

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

    def memory(self) -> EngineMemory:
        return EngineMemory(
            weights=50 * 2**20, cache=CacheMemory(3 * 2**20, 2**20, 2 * 2**20), dense_16bit=24 * 2**20
        )


@dataclass
class FakeSession:
    answer: list[str] = field(default_factory=lambda: ["It is ", "**green**."])
    reason: str = "stop"
    engine: FakeEngine = field(default_factory=FakeEngine)
    messages: list[Message] = field(default_factory=list)
    items: list[ContextItem] = field(default_factory=list)
    samplings: list[Sampling] = field(default_factory=list)
    cancelled: bool = False
    cancel_after: int | None = None  # pieces of the answer after which somebody presses Ctrl-C

    def cancel(self) -> None:
        self.cancelled = True

    def _append(self, kind: str, name: str, text: str) -> int:
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
        self.messages.append(Message("assistant", said))
        count = self._append("assistant", "", said)
        yield Finished(reason, prompt, count, 0.5, 0.25)

    def retry(self, sampling: Sampling) -> Iterator[Event]:
        question = self.messages[-2].content
        self.undo()
        return self.ask(question, sampling)

    def add_document(self, name: str, text: str) -> Iterator[Event]:
        count = self._append("document", name, text)
        yield Prefilled(count // 2, count, 0.1)
        yield Prefilled(count, count, 0.2)

    def undo(self) -> bool:
        if not self.items:
            return False
        if self.items[-1].kind == "assistant":
            self._pop()
            del self.messages[-2:]
        self._pop()
        return True

    def reset(self) -> None:
        self.engine.position = 0
        self.items.clear()
        self.messages.clear()

    def set_system(self, text: str) -> Iterator[Event]:
        self.messages.insert(0, Message("system", text))
        yield Prefilled(1, 1, 0.1)

    def context_items(self) -> list[ContextItem]:
        return list(self.items)


def make_chat(session: FakeSession | None = None, *, columns: int = 80) -> tuple[Chat, StringIO]:
    """Return a chat over a fake session and what it prints, as plain text."""
    output = StringIO()
    console = Console(file=output, width=columns, height=24, force_terminal=False, highlight=False)
    chat = Chat(
        console,
        session or FakeSession(),  # type: ignore[arg-type]
        FACTS,
        ChatSettings(model="tiny", kv="int8"),
        Sampling(),
    )
    return chat, output
