"""What a chat begins with: settings, model, what keeps its context, what reads its documents. Prints nothing."""

from dataclasses import fields, replace
from pathlib import Path

from duolocal.commands.chat import Chat
from duolocal.commands.sessions import keep_bytes
from duolocal.engine.engine import Engine
from duolocal.engine.events import QUIET, LoadEvents
from duolocal.engine.session import ChatSession
from duolocal.models.loader import ModelSource, open_model
from duolocal.models.quantized import quantize_on_load
from duolocal.options import values_in, words_of
from duolocal.paths import sessions_folder
from duolocal.reader import PASSAGE_TOKENS, Retriever
from duolocal.reader.session import ReadingSession
from duolocal.sessions.context import Origin
from duolocal.sessions.folder import ContextFolder
from duolocal.sessions.keeper import ContextKeeper
from duolocal.sessions.names import is_saved, session_path
from duolocal.sessions.store import DocumentStore
from duolocal.settings import FirstUse, LoadSettings
from duolocal.startup import without_collection
from duolocal.tokenizer import load_tokenizer

CHARACTERS_PER_TOKEN = 4  # of ordinary text: enough to tell a page from a book
# What a chat takes from its session where nothing was asked.
TAKEN = frozenset(
    ("model", "context", "kv", "heads", "sink_size", "recent_size", "dtype", "rope", "weights", "outer_weights")
)


def open_session(
    model: str | Path | ModelSource,
    settings: LoadSettings,
    *,
    system: str | None = None,
    events: LoadEvents = QUIET,
    first_use: FirstUse = FirstUse(),  # noqa: B008  frozen
    reading: int = 0,
) -> ChatSession:
    """Load a model (`open_model`) and open a conversation over it; the rest as of `Engine.load`."""
    with without_collection():
        source = quantize_on_load(open_model(model), settings.weights)
        tokenizer = load_tokenizer(source)
    engine = Engine.load(source, settings, events=events, first_use=first_use, reading=reading)
    return ChatSession(engine, tokenizer, system=system)


def make_reader(options: Chat, session: ChatSession) -> ReadingSession | None:
    """Return what reads documents for each question, None where they go into the context. Raises SettingsError."""
    if options.reader == "full":
        return None
    passages = PASSAGE_TOKENS if options.passages is None else options.passages
    return ReadingSession(session, Retriever(session.engine, session.tokenizer, passage_tokens=passages))


def settings_of_session(options: Chat, settings: LoadSettings) -> tuple[LoadSettings, str | None]:
    """Return the settings with what `--session` was saved with where nothing was asked, and a line that says so."""
    if options.session is None:
        return settings, None
    path = session_path(sessions_folder(options.sessions_folder), options.session)
    if not is_saved(path):
        return settings, None
    saved = values_in(LoadSettings, ContextFolder.open(path).fields().texts("options"))
    taken = {
        item.name: saved[item.name]
        for item in fields(LoadSettings)
        if item.name in TAKEN & saved.keys() and getattr(settings, item.name) == item.default
    }
    if not taken:
        return settings, None
    asked = words_of(replace(LoadSettings(), **taken))
    return replace(settings, **taken), f"as session {options.session} was saved: {' '.join(asked)}"


def origin_of(settings: LoadSettings, engine: Engine) -> Origin:
    """Return what a session is saved with, so that it opens with it: what was asked, and what was chosen unasked."""
    plan, dtype = engine.plan, str(engine.transformer.dtype).removeprefix("torch.")
    chosen = replace(settings, context=engine.context, kv=engine.kv, dtype=dtype)
    if settings.heads == "auto" and plan.num_streaming:  # the same ranking, cut at the same place
        chosen = replace(chosen, heads=f"{plan.num_retrieval / (plan.num_retrieval + plan.num_streaming):g}")
    elif settings.heads == "auto":  # also when the model's heads are known by then
        chosen = replace(chosen, heads="all", sink_size=plan.sink_size, recent_size=plan.recent_size)
    return Origin(settings.model, tuple(chosen.options()))


def make_keeper(options: Chat, settings: LoadSettings, *, private: bool) -> ContextKeeper:
    """Return what keeps the contexts of a chat. private: a document came through a pipe; it is stored nowhere unasked.

    Raises SettingsError.
    """
    at = sessions_folder(options.sessions_folder)
    limit = keep_bytes(options.keep)
    store = DocumentStore(at, limit) if limit and not private else None
    return ContextKeeper(at, Origin(settings.model), store=store)
