"""Numbers as people type them: `32K`, `1M`, `131072` tokens, `24GiB`, CPU threads."""

import re
from fractions import Fraction

from duolocal.errors import SettingsError

_NUMBER = re.compile(r"([0-9][0-9_,]*(?:\.[0-9]+)?)\s*([A-Za-z]*)")
_TOKEN_UNITS = {"": 1, "k": 2**10, "m": 2**20}
_BYTE_UNITS = {"": 1, "b": 1} | {
    spelling: factor
    for letter, power in (("k", 1), ("m", 2), ("g", 3), ("t", 4))
    for spelling, factor in (
        (letter, 1024**power),
        (letter + "ib", 1024**power),
        (letter + "b", 1000**power),
    )
}
_MAX_TOKENS = 2**31 - 1  # positions are 32-bit numbers in the block tables
MAX_THREADS = 256  # of one pool


def _parse(text: str, units: dict[str, int], option: str, wanted: str) -> int:
    match = _NUMBER.fullmatch(text.strip())
    factor = units.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise SettingsError(f"{option} is {text!r}: give {wanted}")
    value = Fraction(match[1].replace("_", "").replace(",", "")) * factor
    if value.denominator != 1:
        raise SettingsError(f"{option} is {text!r}, which is no whole number: give {wanted}")
    return int(value)


def parse_tokens(text: str, option: str = "--context") -> int:
    """Read a number of tokens: `131072`, `32K` (32 x 1024), `1M` (1024 x 1024); raises SettingsError."""
    value = _parse(text, _TOKEN_UNITS, option, "a number of tokens such as 131072, 32K or 1M")
    if not 1 <= value <= _MAX_TOKENS:
        raise SettingsError(f"{option} is {text!r}: give between 1 and {_MAX_TOKENS:,} tokens")
    return value


def parse_bytes(text: str, option: str) -> int:
    """Read a number of bytes: `24GiB` and `24G` are x 1024^3, `24GB` is x 1000^3; raises SettingsError."""
    return _parse(text, _BYTE_UNITS, option, "a size such as 24GiB, 500MB or 1073741824")


def parse_threads(text: str, option: str = "--threads") -> int:
    """Read a number of CPU threads; raises SettingsError."""
    count = int(text) if text.strip().isascii() and text.strip().isdigit() else 0
    if not 1 <= count <= MAX_THREADS:
        raise SettingsError(f"{option} is {text!r}: give a number from 1 to {MAX_THREADS}")
    return count


def format_tokens(count: int) -> str:
    """Write a number of tokens the way people type it: 32768 is `32K`, 1000 stays `1000`."""
    for letter, factor in (("M", 2**20), ("K", 2**10)):
        if count >= factor and count % factor == 0:
            return f"{count // factor}{letter}"
    return str(count)
