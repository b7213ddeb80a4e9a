"""Reading values out of the JSON of a saved context: each is of the kind that was written, or it is refused."""

from collections.abc import Mapping
from typing import Any

from duolocal.errors import SessionError

HINT = "remove the session and read the documents again"


class Fields:
    """One JSON object of a file; every wrong value raises SessionError with one line that names it."""

    def __init__(self, raw: object, where: str, inside: str = "") -> None:
        self._where, self._inside = where, inside
        if not isinstance(raw, dict):
            raise self.wrong(inside or "the description", "an object")
        self._raw: Mapping[str, Any] = raw

    def wrong(self, name: str, wanted: str) -> SessionError:
        """Return the error for a value that is not what was `wanted`."""
        return SessionError(f"{self._where}: {name} is not {wanted}: it is damaged or of another version; {HINT}")

    def _get(self, name: str, kind: type, wanted: str) -> Any:
        value = self._raw.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.wrong(self._label(name), wanted)
        return value

    def _label(self, name: str) -> str:
        return f"{self._inside}.{name}" if self._inside else name

    def integer(self, name: str, *, most: int, least: int = 0) -> int:
        """Return a whole number from `least` to `most`."""
        value: int = self._get(name, int, "a whole number")
        if not least <= value <= most:
            raise self.wrong(self._label(name), f"a number from {least} to {most}")
        return value

    def integers(self, name: str, *, most: int, longest: int) -> list[int]:
        """Return a list of whole numbers from 0 to `most`."""
        values = self.array(name, longest=longest)
        if not all(type(value) is int and 0 <= value <= most for value in values):
            raise self.wrong(self._label(name), f"a list of numbers from 0 to {most}")
        return values

    def text(self, name: str, *, longest: int = 1000) -> str:
        """Return a string."""
        value: str = self._get(name, str, "a string")
        if len(value) > longest:
            raise self.wrong(self._label(name), f"a string of up to {longest} characters")
        return value

    def array(self, name: str, *, longest: int) -> list[Any]:
        """Return a list, whose entries are not checked."""
        value: list[Any] = self._get(name, list, "a list")
        if len(value) > longest:
            raise self.wrong(self._label(name), f"a list of up to {longest} values")
        return value

    def texts(self, name: str, *, longest: int = 10_000) -> list[str]:
        """Return a list of strings."""
        values = self.array(name, longest=longest)
        if not all(isinstance(value, str) for value in values):
            raise self.wrong(self._label(name), "a list of strings")
        return values

    def inner(self, name: str) -> "Fields":
        """Return an object inside this one."""
        return Fields(self._raw.get(name), self._where, self._label(name))

    def of(self, raw: object, inside: str) -> "Fields":
        """Return an object that belongs to this one and is called `inside`."""
        return Fields(raw, self._where, inside)

    def raw(self, name: str) -> object:
        """Return a value as it is, None where it is absent."""
        return self._raw.get(name)
