"""The front door for Python: a chat about documents in a few calls (docs/python.md).

Owns which calls there are; model, context and conversation are the session's, as in the terminal. Prints nothing: what
the terminal would say beside an answer is in `Chat.notes`.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, overload

from duolocal.chat import kept, opening
from duolocal.commands.chat import Chat as Options
from duolocal.documents import Document, gather, load_all
from duolocal.documents.loading import beside, summary
from duolocal.engine.engine import Engine
from duolocal.engine.events import QUIET, LoadEvents
from duolocal.engine.resolve import settings_with
from duolocal.engine.session import Event, Finished, Text
from duolocal.errors import DocumentError, SettingsError
from duolocal.models.loader import ModelSource
from duolocal.options import refuse_unknown
from duolocal.plan.free import settled_model
from duolocal.reader.session import Picked
from duolocal.settings import AUTO_MODEL, CHAT_SAMPLING, FirstUse, LoadSettings, Sampling
from duolocal.sources import Source, find_sources

_OPTIONS = ("system", "reader", "passages", "session", "keep", "sessions_folder")
_LOADING, _SAMPLING, _FIRST_USE = (
    tuple(item.name for item in fields(owner)) for owner in (LoadSettings, Sampling, FirstUse)
)


class Answer(str):
    """The text of an answer, with what it took: `finished.reason` is "stop" where it is complete."""

    finished: Finished


class Chat:
    """A model, documents and a conversation about them.

    Options are those of `duolocal chat` by their names, with the same defaults: of LoadSettings (`context=32768`; or
    all as one value, `settings`), of Sampling (`temperature=0`), of FirstUse (`quick=True`), and system, reader,
    passages, session, keep (bytes) and sessions_folder. events: told of what takes time while loading; on_event: gets
    what the session yields, such as Prefilled while it reads. Every call raises DuoLocalError with one line that says
    what to do, before any work is done in vain.
    """

    def __init__(
        self,
        model: str | Path | ModelSource = AUTO_MODEL,
        settings: LoadSettings | None = None,
        *,
        events: LoadEvents = QUIET,
        on_event: Callable[[Event | Picked], None] = lambda event: None,
        **options: Any,
    ) -> None:
        refuse_unknown(options, (*_LOADING, *_SAMPLING, *_FIRST_USE, *_OPTIONS))

        def given(names: Iterable[str]) -> dict[str, Any]:
            return {name: options[name] for name in names if name in options}

        asked = Options(**given(_OPTIONS))
        self.sampling = replace(CHAT_SAMPLING, **given(_SAMPLING))
        first_use = FirstUse(**given(_FIRST_USE))
        self.notes: list[str] = []
        self._files: dict[str, Document] = {}
        self._on_event = on_event
        self._running: Generator[str, None, None] | None = None
        settings, taken = opening.settings_of_session(asked, settings_with(model, settings, given(_LOADING)))
        settings, reason = settled_model(settings)
        self.notes += [note for note in (taken, reason) if note]
        self._keeper = opening.make_keeper(asked, settings, private=False)
        source = settings.model if not isinstance(model, ModelSource) else model
        if isinstance(model, ModelSource):
            settings = replace(settings, model=str(model.path))  # a session finds it again
        self.session = opening.open_session(source, settings, system=asked.system, events=events, first_use=first_use)
        self.session.keeper = self._keeper
        self._keeper.origin = opening.origin_of(settings, self.engine)
        self._keeper.extra = lambda: kept.extra_of(self._files)
        self._reader = opening.make_reader(asked, self.session)
        self.notes += self.engine.notes
        if asked.session is not None:
            found = kept.begin_or_open(self._keeper, self.session, asked.session, system=asked.system)
            self._files |= found or {}
        self._take_notes()

    @property
    def engine(self) -> Engine:
        """The engine below: token ids in, token ids out."""
        return self.session.engine

    @property
    def documents(self) -> list[str]:
        """Names of the documents that answers are made from."""
        return list(self.session.documents if self._reader is None else self._reader.documents)

    def add(self, *documents: str | Path | Document) -> "Chat":
        """Load files, folders, patterns and zip archives, and read them into the context: all of them, or none.

        With `reader="retrieve"` they are read for each question instead. What was left out or could not be read whole
        is in `notes`. Returns the chat.
        """
        self._end_running()
        loaded: list[Document] = []
        for document in documents:
            if isinstance(document, str | Path):
                read = load_all(gather([document]))
                left_out = summary(read.skipped)
                self.notes += [left_out] if left_out else []
                loaded += read.documents
            elif isinstance(document, Document):
                loaded.append(document)
            else:
                raise DocumentError(f"{document!r} is no document: give a path, or a text with add_text(text, name)")
        named, notes = beside(loaded, {name: self._files.get(name) for name in self.documents})
        self.notes += notes + [document.note for document in named.values() if document.note]
        texts = [(name, document.text) for name, document in named.items()]
        if self._reader is not None:
            for name, text in texts:
                self._reader.add(name, text)
            self._files |= named
        elif texts:
            events = self.session.add_documents(texts)
            self._files |= named  # before the reading, for what is saved on the way
            self._consume(events)
        return self

    def add_text(self, text: str, name: str) -> "Chat":
        """Read a text into the context as a document of that name; returns the chat."""
        if not isinstance(text, str) or not text.strip():
            raise DocumentError(f"{name}: the text is {text!r:.40}: give one that is not empty")
        return self.add(
            Document(name, Path(name), text, encoding="utf-8", num_bytes=len(text.encode("utf-8", "replace")))
        )

    @overload
    def ask(self, question: str, *, stream: Literal[False] = False, **sampling: Any) -> Answer: ...

    @overload
    def ask(self, question: str, *, stream: Literal[True], **sampling: Any) -> Iterator[str]: ...

    def ask(self, question: str, *, stream: bool = False, **sampling: Any) -> Answer | Iterator[str]:
        """Answer a question about the documents and the conversation so far.

        stream: return an iterator of pieces of the answer instead of the whole; the next call of the chat ends an
        answer that was not read to its end, and what there is of it stays in the conversation. sampling: fields of
        Sampling for this answer. What ended an answer that is not complete is in `notes`.
        """
        if not isinstance(question, str):
            raise SettingsError(f"the question is {question!r}: give a text")
        refuse_unknown(sampling, _SAMPLING)
        drawn = replace(self.sampling, **sampling)
        self._end_running()
        asked = self._reader if self._reader is not None and self._reader.documents else self.session
        events = asked.ask(question, drawn)
        if not stream:
            return self._consume(events)
        self._running = self._stream(events)
        return self._running

    def undo(self, count: int = 1) -> "Chat":
        """Take back the last `count` questions or documents; returns the chat. Raises SettingsError."""
        self._end_running()
        if not self.session.undo(count):
            raise SettingsError(f"there are fewer than {count} questions and documents to take back")
        self._take_notes()
        return self

    def sources(self, count: int = 3) -> list[Source]:
        """Return the passages that were looked at most for the last answer, best first. Raises SettingsError."""
        self._end_running()
        return find_sources(self.session, count=count)

    def save(self, name: str, *, overwrite: bool = False) -> "Chat":
        """Keep the chat as a session, from now on after every turn; returns the chat. Raises DuoLocalError."""
        self._end_running()
        self._keeper.begin(name, self.session, overwrite=overwrite)
        self._keeper.save(self.session)
        return self

    def open(self, name: str) -> "Chat":
        """Go on with a saved session of this model and these settings, prefilling nothing; returns the chat.

        `Chat(session=NAME)` takes model and settings from the session. Raises DuoLocalError.
        """
        self._end_running()
        self._files = kept.documents_of(self.session, self._keeper.open(name, self.session))
        self._take_notes()
        return self

    def close(self) -> None:
        """Let go of the files of saved contexts; `with Chat(...) as chat` does it."""
        self._end_running()
        self._keeper.close()

    def __enter__(self) -> "Chat":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _heard(self, events: Iterator[Event | Picked]) -> Generator[Event | Picked, None, None]:
        """Pass events on, to `on_event` as well, and note what a person should know of their end."""
        try:
            for event in events:
                self._on_event(event)
                if isinstance(event, Finished) and event.reason in ("length", "context"):
                    full = "the context is full" if event.reason == "context" else "max_tokens was reached"
                    self.notes.append(f"the answer was cut off: {full}")
                yield event
        finally:
            events.close()  # type: ignore[attr-defined]  # of a generator: an answer so far is kept
            self._take_notes()

    def _stream(self, events: Iterator[Event | Picked]) -> Generator[str, None, None]:
        with closing(self._heard(events)) as heard:
            for event in heard:
                if isinstance(event, Text):
                    yield event.text

    def _consume(self, events: Iterator[Event | Picked]) -> Answer:
        pieces: list[str] = []
        finished: Finished | None = None
        for event in self._heard(events):
            if isinstance(event, Text):
                pieces.append(event.text)
            elif isinstance(event, Finished):
                finished = event
        assert finished is not None, "a session ends all work with Finished"
        answer = Answer("".join(pieces))
        answer.finished = finished
        return answer

    def _end_running(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None

    def _take_notes(self) -> None:
        self.notes += self._keeper.notes
        self._keeper.notes.clear()
