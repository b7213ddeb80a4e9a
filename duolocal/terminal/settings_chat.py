"""The chat's commands over settings and speeds: /stats, /set."""

import shlex
from dataclasses import fields

from rich.text import Text

from duolocal.errors import SettingsError
from duolocal.options import change, find, flag, words_of
from duolocal.settings import LoadSettings, Sampling
from duolocal.terminal import views
from duolocal.terminal.chat_state import ChatState, CommandHost, Commands, no_words
from duolocal.terminal.clean import clean_line
from duolocal.terminal.tables import bare_table

COMMANDS = Commands()
_NEEDS_RESTART = tuple(item.name for item in fields(LoadSettings))


@COMMANDS.add("/stats", "speeds, memory by head class, head plan, KV format")
def stats(host: CommandHost, rest: str) -> None:
    """Show what the model takes, and how fast it was."""
    no_words("stats", rest)
    state = host.state
    engine = state.session.engine
    host.show(
        views.stats_view(
            state.facts, engine.position, engine.memory(), state.last_answer, state.last_load, engine.speculation
        )
    )


@COMMANDS.add(
    "/set [NAME VALUE]",
    "show or change the sampling settings, at once",
    words=[item.name for item in fields(Sampling)],
)
def set_value(host: CommandHost, rest: str) -> None:
    """Show the sampling settings, or change one."""
    state = host.state
    if not rest:
        table = bare_table()
        for item in fields(Sampling):
            table.add_row(Text(item.name, "bold"), Text(clean_line(_shown(state.sampling, item.name))))
        host.show(table)
        host.note("fixed until a restart: " + ", ".join(_NEEDS_RESTART))
        return
    name, _, value = rest.replace("=", " ", 1).partition(" ")
    name, value = name.lstrip("-").replace("-", "_"), value.strip()
    if name in _NEEDS_RESTART:
        if value:
            find(state.settings, name).parse(value, name)  # what a restart would refuse
        words = _restart_words(state, name, value or "VALUE")
        raise SettingsError(f"{name} is fixed while the model is loaded; restart with: {shlex.join(words)}")
    if value:
        state.sampling = change(state.sampling, name, value, also=_NEEDS_RESTART)
    host.note(f"{name} = {_shown(state.sampling, name)}")


def _shown(sampling: Sampling, name: str) -> str:
    """Write one setting the way /set reads it; raises SettingsError for an unknown name."""
    return find(sampling, name).write(getattr(sampling, name, None))


def _restart_words(state: ChatState, name: str, value: str) -> list[str]:
    words = [*words_of(state.settings, always=("model",), without=(name,)), flag(name), value]
    if state.reader is not None:
        words += ["--reader", "retrieve"]
    # Of a zip archive every member has the archive's path.
    paths = list(dict.fromkeys(str(state.files[name].path) for name in state.documents if name in state.files))
    return [*state.program.split(), *words, *(["--doc", *paths] if paths else [])]
