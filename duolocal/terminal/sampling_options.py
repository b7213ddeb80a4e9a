"""Sampling settings as people type them, for the options of the CLI and for /set."""

import difflib
import shlex
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

from duolocal.errors import SettingsError
from duolocal.sampling import Sampling
from duolocal.settings import parse_tokens


def _number(kind: Callable[[str], Any], wanted: str) -> Callable[[str, str], Any]:
    def parse(name: str, text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise SettingsError(f"{name} is {text!r}: give {wanted}") from None

    return parse


def _stop(name: str, text: str) -> tuple[str, ...]:
    try:
        words = shlex.split(text)
    except ValueError:
        raise SettingsError(f"{name} is {text!r}: close the quote") from None
    # A newline cannot be typed in one line.
    return tuple(word.replace("\\n", "\n").replace("\\t", "\t") for word in words)


_PARSERS: dict[str, Callable[[str, str], Any]] = {
    "temperature": _number(float, "a number such as 0.7"),
    "top_k": _number(int, "a whole number; 0 switches it off"),
    "top_p": _number(float, "a number between 0 and 1"),
    "min_p": _number(float, "a number between 0 and 1"),
    "repetition_penalty": _number(float, "a number such as 1.1; 1 switches it off"),
    "seed": _number(int, "a whole number, or none"),
    "max_tokens": lambda name, text: parse_tokens(text, name),
    "stop": _stop,
}
_NONE_ALLOWED = {"seed": None, "max_tokens": None, "stop": ()}


def change(sampling: Sampling, name: str, text: str, *, also: Sequence[str] = (), shown: str | None = None) -> Sampling:
    """Return `sampling` with one setting changed; SettingsError for an unknown name or a value that is wrong.

    `also` are further names to suggest for a misspelt one; `shown` is how the user called the setting.
    """
    _check_name(name, also)
    value: Any
    if text.strip().lower() == "none" and name in _NONE_ALLOWED:
        value = _NONE_ALLOWED[name]
    else:
        value = _PARSERS[name](shown or name, text)
    return replace(sampling, **{name: value})


def show_value(sampling: Sampling, name: str) -> str:
    """Write one setting the way `change` reads it."""
    _check_name(name)
    value = getattr(sampling, name)
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return " ".join(shlex.quote(word.replace("\n", "\\n").replace("\t", "\\t")) for word in value)
    return str(value)


def _check_name(name: str, also: Sequence[str] = ()) -> None:
    names = [item.name for item in fields(Sampling)]
    if name not in names:
        close = difflib.get_close_matches(name, [*names, *also], n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
        raise SettingsError(f"unknown setting {name!r}: {hint}")
