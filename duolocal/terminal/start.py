"""Starts what the chat needs: finds or fetches the model, loads it, opens a session; shows the progress."""

import time
from dataclasses import dataclass

from rich.console import Console

from duolocal.engine.engine import Engine
from duolocal.engine.session import ChatSession
from duolocal.models.loader import open_model
from duolocal.models.quantized import quantize_on_load
from duolocal.settings import FirstUse, LoadSettings
from duolocal.startup import without_collection
from duolocal.terminal.clean import clean_line
from duolocal.terminal.fetching import fetch
from duolocal.terminal.progress import bar
from duolocal.terminal.views import Facts
from duolocal.tokenizer import load_tokenizer

CHARACTERS_PER_TOKEN = 4  # of ordinary text: enough to tell a page from a book


@dataclass(frozen=True)
class Started:
    """An open session and what there is to say about it."""

    session: ChatSession
    facts: Facts


def start(
    settings: LoadSettings,
    *,
    system: str | None,
    progress: Console,
    first_use: FirstUse = FirstUse(),  # noqa: B008  frozen
    reading: int = 0,
) -> Started:
    """Load the model that `settings` names and open a session; bars go to `progress`. Raises DuoLocalError.

    first_use, reading: as of `Engine.load`.
    """
    name = clean_line(settings.model)
    path = fetch(settings.model, progress)
    began_s = time.perf_counter()
    with bar(progress, f"loading {name}", "layers") as shown:
        with without_collection():
            source = quantize_on_load(open_model(path), settings.weights)
            tokenizer = load_tokenizer(source)
        engine = Engine.load(source, settings, events=shown, first_use=first_use, reading=reading)
        session = ChatSession(engine, tokenizer, system=system)
    plan = engine.plan
    return Started(
        session,
        Facts(
            model=settings.model,
            weight_format=source.weight_format,
            kv_format=engine.kv,
            context=engine.context,
            num_retrieval=plan.num_retrieval,
            num_heads=plan.num_retrieval + plan.num_streaming,
            sink_size=plan.sink_size,
            recent_size=plan.recent_size,
            plan_source=plan.source,
            notes=tuple(engine.notes),
            load_s=time.perf_counter() - began_s,
        ),
    )
