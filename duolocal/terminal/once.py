"""One question, one answer, for scripts: the answer on stdout, nothing else there.

Exit codes: 0 answered, 3 the answer is not complete (max_tokens or the context ended it), 130 interrupted.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from duolocal.documents import Document
from duolocal.engine.session import ChatSession, Event, Finished, Prefilled, Text
from duolocal.processes import INTERRUPTED
from duolocal.reader.session import Picked
from duolocal.settings import Sampling
from duolocal.terminal import reader_view
from duolocal.terminal.clean import clean
from duolocal.terminal.consoles import say
from duolocal.terminal.progress import Bar, bar
from duolocal.terminal.stream import cancel_on_interrupt
from duolocal.terminal.views import Facts, retrieval_bytes, streaming_bytes

if TYPE_CHECKING:
    from duolocal.reader.session import ReadingSession
    from duolocal.sessions.keeper import ContextKeeper

EXIT_CODES = {"stop": 0, "length": 3, "context": 3, "cancelled": INTERRUPTED}
_WHY_CUT = {
    "length": "the answer was cut off by max_tokens: raise --max-tokens",
    "context": "the answer was cut off, the context is full: raise --context or load less",
}


@dataclass
class _Tally:
    """What a session said over one piece of work."""

    text: str = ""
    finished: Finished | None = None
    picked: Picked | None = None


def answer_once(
    session: ChatSession,
    facts: Facts,
    question: str,
    sampling: Sampling,
    *,
    documents: Sequence[Document] = (),
    as_json: bool = False,
    progress: Console,
    keeper: "ContextKeeper | None" = None,
    reader: "ReadingSession | None" = None,
) -> int:
    """Answer one question over documents on stdout; return the exit code. `progress` is a console on stderr.

    documents: no two of one name; keeper: of sessions and documents on disk, whose notes go to stderr; reader: reads
    the documents for the question, and tells on stderr what the answer was made of.

    Raises ContextOverflowError before work when something does not fit.
    """
    for note in (document.note for document in documents):
        if note:
            say(note)
    _print_notes(keeper)
    num_read, read_s = 0, 0.0
    events: Iterable[Event | Picked]
    files = {document.name: document for document in documents}
    if reader is not None:
        for name, document in files.items():
            reader.add(name, document.text)
    with cancel_on_interrupt(session if reader is None else reader) as insist:
        if documents and reader is None:
            named = [(document.name, document.text) for document in documents]
            with bar(progress, "counting tokens", ""):
                events = session.add_documents(named)
            tally = _consume(events, "reading documents", progress, insist)
            _print_notes(keeper)
            assert tally.finished is not None, "a session ends every reading with Finished"
            if tally.finished.reason == "cancelled":
                return EXIT_CODES["cancelled"]
            num_read, read_s = tally.finished.prompt_tokens, tally.finished.prefill_s
        writer = None if as_json else _Writer()
        events = session.ask(question, sampling) if reader is None or not files else reader.ask(question, sampling)
        tally = _consume(events, "reading", progress, insist, writer)
    finished = tally.finished
    assert finished is not None, "a session ends every answer with Finished"
    if writer is not None:
        writer.end()
    else:
        report = _report(session, facts, tally, num_read + finished.prompt_tokens, read_s + finished.prefill_s)
        if reader is not None:
            picked = {} if tally.picked is None else reader_view.picked_report(tally.picked, files)
            report["documents"] = [{"name": name, "characters": len(document.text)} for name, document in files.items()]
            report["reader"] = {"kind": "retrieve", **picked}
        print(json.dumps(report, ensure_ascii=False))
    sys.stdout.flush()
    if tally.picked is not None and not as_json:
        _print_picked(tally.picked, files)
    _print_notes(keeper)
    if finished.reason in _WHY_CUT:
        say(_WHY_CUT[finished.reason])
    return EXIT_CODES[finished.reason]


def _print_notes(keeper: "ContextKeeper | None") -> None:
    for note in keeper.notes if keeper is not None else ():
        say(note)
    if keeper is not None:
        keeper.notes.clear()


def _print_picked(picked: Picked, files: Mapping[str, Document]) -> None:
    say(reader_view.headline(picked))
    for source in picked.passages:
        say(f"passage in {reader_view.place(source, files)}, score {source.score:.2f}")


class _Writer:
    """Writes the answer as it comes: raw into a pipe, made harmless on a terminal."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._ends_line = True

    def write(self, text: str) -> None:
        if text:
            sys.stdout.write(clean(text) if self._is_terminal else text)
            sys.stdout.flush()
            self._ends_line = text.endswith("\n")

    def end(self) -> None:
        if not self._ends_line:
            sys.stdout.write("\n")


def _consume(
    events: Iterable[Event | Picked],
    reading: str,
    progress: Console,
    insist: Callable[[], None],
    writer: _Writer | None = None,
) -> _Tally:
    tally = _Tally()
    with ExitStack() as stack:
        shown: Bar | None = stack.enter_context(bar(progress, reading, "tokens"))
        for event in events:
            insist()
            if isinstance(event, Prefilled):
                if shown is not None:
                    shown.update(event.done, event.total, event.elapsed_s)
            elif isinstance(event, Text):
                tally.text += event.text
                if writer is not None:
                    stack.close()  # takes the bar away before the answer appears
                    shown = None
                    writer.write(event.text)
                elif shown is not None:
                    shown.describe("answering")
            elif isinstance(event, Picked):
                tally.picked = event
            elif isinstance(event, Finished):
                tally.finished = event
    return tally


def _report(session: ChatSession, facts: Facts, answer: _Tally, num_prompt: int, prefill_s: float) -> dict[str, Any]:
    finished = answer.finished
    assert finished is not None
    documents = [item for item in session.context_items() if item.kind == "document"]
    memory, speculation = session.engine.memory(), session.engine.speculation

    def rate(count: int, elapsed_s: float) -> float | None:
        return round(count / elapsed_s, 2) if elapsed_s > 0 else None

    return {
        "text": answer.text,
        "finish_reason": finished.reason,
        "model": facts.model,
        "tokens": {
            "prompt": num_prompt,
            "completion": finished.completion_tokens,
            "context": session.engine.position,
            "limit": facts.context,
        },
        "timings": {
            "load_s": round(facts.load_s, 4),
            "prefill_s": round(prefill_s, 4),
            "decode_s": round(finished.decode_s, 4),
            "prefill_tokens_per_s": rate(num_prompt, prefill_s),
            "decode_tokens_per_s": rate(finished.completion_tokens, finished.decode_s),
        },
        "speculation": None if speculation is None else asdict(speculation.counts),
        "kv": {
            "format": facts.kv_format,
            "retrieval_bytes": retrieval_bytes(memory),
            "streaming_bytes": streaming_bytes(memory),
            "digests_bytes": memory.cache.digests,
            "beyond_device_bytes": memory.cache.outer_blocks,
            "dense_16bit_bytes": memory.dense_16bit,
        },
        "documents": [{"name": item.name, "tokens": item.num_tokens} for item in documents],
        "notes": list(facts.notes),
    }
