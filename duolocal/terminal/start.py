"""Starts what the chat needs: finds or fetches the model, loads it, opens a session; shows the progress."""

import time
from dataclasses import dataclass

from rich.console import Console

from duolocal.chat.opening import open_session
from duolocal.engine.session import ChatSession
from duolocal.settings import FirstUse, LoadSettings
from duolocal.terminal.clean import clean_line
from duolocal.terminal.fetching import fetch
from duolocal.terminal.progress import bar
from duolocal.terminal.views import Facts


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
        session = open_session(path, settings, system=system, events=shown, first_use=first_use, reading=reading)
    engine, plan = session.engine, session.engine.plan
    assert engine.source is not None
    return Started(
        session,
        Facts(
            model=settings.model,
            weight_format=engine.source.weight_format,
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
