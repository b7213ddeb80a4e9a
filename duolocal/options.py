"""Options declared once: the field of a frozen dataclass holds type, default, help, unit and check of an option.

    context: int | None = option(TOKENS, "tokens of context", default=None, metavar="SIZE")

The command line with its --help, /set, the words that ask for the same settings again and the table in the docs are
derived from the fields. Owns how a value is typed, checked and written; knows neither argparse nor any command.
"""

import difflib
import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from duolocal.errors import SettingsError
from duolocal.paths import user_path
from duolocal.sizes import format_tokens, parse_bytes, parse_threads, parse_tokens

REQUIRED: Any = MISSING
S = TypeVar("S")  # a dataclass of options


@dataclass(frozen=True)
class Kind:
    """How a value is typed.

    read: (text, name of the option) -> value; a ValueError, or a value that does not fit, is told with `wanted`.
    many: "" for one word, "each" where every word needs the option's name again, "run" where several may follow it.
    """

    read: Callable[[str, str], Any]
    wanted: str = ""
    fits: Callable[[Any], bool] = lambda value: True
    write: Callable[[Any], str] = str
    metavar: str | None = None
    many: str = ""
    is_flag: bool = False


@dataclass(frozen=True)
class Option:
    """What is declared of one option beside its name and default."""

    kind: Kind
    help: str
    metavar: str | None = None
    group: str | None = None
    also: tuple[str, ...] = ()  # further names, with their dashes
    default_help: str | None = None  # what the default stands for
    takes_none: bool = False  # whether the word none stands for None
    positional: bool = False

    def parse(self, text: str, name: str) -> Any:
        """Read one word; raises SettingsError that calls the option `name`."""
        if self.takes_none and text.strip().lower() == "none":
            return None
        try:
            value = self.kind.read(text, name)
        except ValueError:
            raise _refused(name, text, self.kind.wanted) from None
        if not self.kind.fits((value,) if self.kind.many else value):
            raise _refused(name, text, self.kind.wanted)
        return value

    def write(self, value: Any) -> str:
        """Write a value the way it is typed: the words of `many`, quoted as for a shell."""
        if value is None or value == ():
            return "none"
        if self.kind.many:
            return " ".join(shlex.quote(word.replace("\n", "\\n").replace("\t", "\\t")) for word in value)
        return self.kind.write(value)


def option(kind: Kind, help: str, *, default: Any = None, metavar: str | None = None, **more: Any) -> Any:
    """Declare an option as a field of a dataclass; one whose default is REQUIRED must be given. `more` as in Option."""
    return field(default=default, metadata={"option": Option(kind, help, metavar or kind.metavar, **more)})


def like(owner: type, name: str, *, default: Any = None, several: bool = False, **changes: Any) -> Any:
    """Declare an option as `owner` does, but for `changes`; several: it takes a list with commas."""
    there = owner.__dataclass_fields__[name]  # type: ignore[attr-defined]
    declared = declared_in(there)
    if several:
        changes["kind"] = listed(declared.kind)
    chosen = default if default is not None else (there.default,) if several else there.default
    return field(default=chosen, metadata={"option": replace(declared, **changes)})


def declared_in(item: "Field[Any]") -> Option:
    """Return what is declared of an option."""
    found: Option = item.metadata["option"]
    return found


def flag(name: str) -> str:
    """Return the option of a field: `--sink-size` of `sink_size`."""
    return "--" + name.replace("_", "-")


def default_text(item: "Field[Any]", value: Any) -> str:
    """Return what --help and the docs say of `value` as the default of an option, "" for nothing."""
    declared = declared_in(item)
    if declared.default_help is not None and value == item.default:
        return declared.default_help
    is_nothing = value is None or value is False or value is MISSING or value in ((), "")
    return "" if is_nothing else declared.write(value)


def _refused(name: str, value: object, wanted: str) -> SettingsError:
    if isinstance(value, str) and not value.strip():
        return SettingsError(f"{name} is empty: {wanted}")
    return SettingsError(f"{name} is {value!r}: {wanted}")


def check(settings: Any, spell: Callable[[str], str] = flag) -> None:
    """Raise SettingsError where a field holds what its option would not take; `spell` names the option."""
    for item in fields(settings):
        value, kind = getattr(settings, item.name), declared_in(item).kind
        if (value is not None or item.default is not None) and not kind.fits(value):
            raise _refused(spell(item.name), value, kind.wanted)


def words_of(settings: Any, *, always: Sequence[str] = (), without: Sequence[str] = ()) -> list[str]:
    """Return the words of a command line that ask for `settings`: what is no default, and `always`, not `without`."""
    words: list[str] = []
    for item in fields(settings):
        value = getattr(settings, item.name)
        if item.name not in without and (value != item.default or item.name in always):
            text = declared_in(item).write(value)
            words += [f"{flag(item.name)}={text}"] if text.startswith("-") else [flag(item.name), text]
    return words


def values_in(owner: type, words: Iterable[str]) -> dict[str, Any]:
    """Read what `words_of` wrote: field -> value. Words of options that `owner` has not are left out."""
    found: dict[str, Any] = {}
    named = {flag(item.name): item for item in fields(owner)}
    rest = iter(words)
    for word in rest:
        name, equals, text = word.partition("=")
        text = text if equals else next(rest, "")
        if name in named:
            found[named[name].name] = declared_in(named[name]).parse(text, name)
    return found


def change(settings: S, name: str, text: str, *, also: Sequence[str] = ()) -> S:
    """Return `settings` with one field as typed in one line; SettingsError for an unknown name or a wrong value.

    `also` are further names to suggest for a misspelt one.
    """
    declared = find(settings, name, also=also)
    if not declared.kind.many:
        return replace(settings, **{name: declared.parse(text, name)})  # type: ignore[type-var]
    try:
        words = [] if text.strip().lower() == "none" else shlex.split(text)
    except ValueError:
        raise SettingsError(f"{name} is {text!r}: close the quote") from None
    # A newline cannot be typed in one line.
    typed = tuple(declared.parse(word.replace("\\n", "\n").replace("\\t", "\t"), name) for word in words)
    return replace(settings, **{name: typed})  # type: ignore[type-var]


def find(settings: Any, name: str, *, also: Sequence[str] = ()) -> Option:
    """Return the option of a field; raises SettingsError with a suggestion."""
    named = {item.name: declared_in(item) for item in fields(settings)}
    if name not in named:
        close = difflib.get_close_matches(name, [*named, *also], n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(named)}"
        raise SettingsError(f"unknown setting {name!r}: {hint}")
    return named[name]


def refuse_unknown(given: Iterable[str], names: Sequence[str]) -> None:
    """Raise SettingsError where one of the names that were given is not among `names`."""
    for unknown in given:
        if unknown not in names:
            close = difflib.get_close_matches(unknown, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
            raise SettingsError(f"no setting is called {unknown!r}: {hint}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def counted(least: int = 1, write: Callable[[Any], str] = format_tokens) -> Kind:
    """Return the kind of a number of tokens, or of other things that are counted, from `least` (0 or 1)."""

    def read(text: str, name: str) -> int:
        return 0 if least == 0 and text.strip() == "0" else parse_tokens(text, name)

    return Kind(read, f"give {least} or more", lambda value: _is_whole(value) and value >= least, write, "N")


def whole(wanted: str, least: int | None = None, most: int | None = None) -> Kind:
    """Return the kind of a whole number between two bounds, None for no bound."""

    def fits(value: Any) -> bool:
        return _is_whole(value) and (least is None or value >= least) and (most is None or value <= most)

    return Kind(lambda text, name: int(text), f"give {wanted}", fits, metavar="N")


def number(wanted: str, fits: Callable[[float], bool]) -> Kind:
    """Return the kind of a finite number."""

    def is_right(value: Any) -> bool:
        known = (isinstance(value, float) and math.isfinite(value)) or _is_whole(value)
        return known and fits(value)

    return Kind(lambda text, name: float(text), f"give {wanted}", is_right, metavar="R")


def choice(*known: str) -> Kind:
    """Return the kind of one word of several."""
    return Kind(lambda text, name: text, f"give one of {', '.join(known)}", lambda value: value in known)


def nonempty(wanted: str) -> Kind:
    """Return the kind of a text that may not be empty."""
    return Kind(lambda text, name: text, wanted, lambda value: isinstance(value, str) and bool(value.strip()))


def path(wanted: str) -> Kind:
    """Return the kind of a path, `~` for the home folder; it may not be empty."""

    def read(text: str, name: str) -> Path:
        if not text.strip():
            raise ValueError(text)
        return user_path(text)

    return Kind(read, wanted, metavar="FILE")


def repeated(each: Kind, many: str = "each") -> Kind:
    """Return the kind of an option that may be given several times; its value is a tuple."""

    def fits(value: Any) -> bool:
        return isinstance(value, tuple) and all(map(each.fits, value))

    return replace(each, many=many, fits=fits)


def listed(each: Kind, known: Sequence[str] = (), *, ascending: bool = False, empty: bool = False) -> Kind:
    """Return the kind of a list with commas, every value once; empty: the word none stands for no value.

    known: the words that it may have; the error names the one that is not there.
    """

    def read(text: str, name: str) -> tuple[Any, ...]:
        if empty and text.strip() == "none":
            return ()
        words = [word.strip() for word in text.split(",")]
        if not all(words):
            raise SettingsError(f"{name} is {text!r}: a value is missing; give one, or several with commas between")
        for word in words:
            if known and word not in known:
                raise SettingsError(f"{name} has {word!r}: give a list of {', '.join(known)}")
        values = dict.fromkeys(Option(each, "").parse(word, name) for word in words)
        return tuple(sorted(values)) if ascending else tuple(values)

    def write(values: Any) -> str:
        return ",".join(each.write(value) for value in values if value is not None)

    return Kind(read, write=write, metavar="LIST")


ANY = Kind(lambda text, name: text)
FLAG = Kind(lambda text, name: True, is_flag=True)
TOKENS = counted()
BYTES = Kind(parse_bytes, "give 0 or more", lambda value: _is_whole(value) and value >= 0, metavar="SIZE")
THREADS = Kind(parse_threads, "give 1 or more", lambda value: _is_whole(value) and value >= 1, metavar="N")
RATIO = number("a ratio between 0 and 1", lambda value: 0 <= value <= 1)
flagged = partial(option, FLAG, default=False)
