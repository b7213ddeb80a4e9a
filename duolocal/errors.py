"""Failures that a user can act on.

Each is raised where it is found with one line: what was wrong, the value seen, the value wanted, what to do.
Only the command line turns one into a printed line and an exit code. Messages quote files and names of strangers:
whatever is in them, a message is one line without control characters.
"""

import errno

_LONGEST = 1000  # characters of a message
_ENDING = 300  # of them kept of the end, where it says what to do


def one_line(text: str) -> str:
    """Return `text` as one line that any terminal can show: line breaks are spaces, control characters visible.

    Beyond 1,000 characters the middle is left out.
    """
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - _ENDING - 3]} … {text[-_ENDING:]}"
    return text.strip() if text.isprintable() else "".join(map(_printable, text.strip()))


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    if character.isspace():
        return " "
    return chr(0x2400 + ord(character)) if character < " " else "\ufffd"  # ␛, as the terminal shows names


def refusal(error: OSError | MemoryError) -> str:
    """Return what the system refused as one line: the file, if one is known, and why."""
    if isinstance(error, MemoryError):
        return "the memory of this machine is used up: close other programs, or use a smaller --context"
    reason = error.strerror or str(error) or type(error).__name__
    name = error.filename.decode(errors="replace") if isinstance(error.filename, bytes) else error.filename
    advice = {
        errno.ENOSPC: "free some space",
        errno.EDQUOT: "free some space",
        errno.EACCES: "look at the permissions of the file and its folders",
        errno.EPERM: "look at the permissions of the file and its folders",
        errno.EROFS: "use another place",
        errno.ENAMETOOLONG: "use a shorter name",
    }.get(error.errno or 0)
    return one_line(": ".join(str(part) for part in (name, reason, advice) if part is not None))


class DuoLocalError(Exception):
    """A failure the user can act on; `str()` is one line."""

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class SettingsError(DuoLocalError):
    """An option, or a combination of options, that cannot be used."""


class ConfigError(DuoLocalError):
    """A model configuration that duolocal would compute wrongly, or cannot read."""


class ModelFileError(DuoLocalError):
    """A corrupt, truncated or unsupported model file: names the file, the tensor and the reason."""


class ModelNotFoundError(DuoLocalError):
    """A name or path that leads to no model."""


class DownloadError(DuoLocalError):
    """A model that could not be fetched: says what to place where."""


class TokenizerError(DuoLocalError):
    """A tokenizer or chat template that is missing or cannot be used."""


class ContextOverflowError(DuoLocalError):
    """Text that does not fit into the context, refused before any work."""


class MemoryLimitError(DuoLocalError):
    """Settings that need more memory than there is, refused before any work."""


class DocumentError(DuoLocalError):
    """A document that cannot be read as text."""


class SummaryFileError(DuoLocalError):
    """A file of summaries that cannot be written, or that is damaged."""


class KernelError(DuoLocalError):
    """Compiled kernels that cannot be built or run on this machine."""


class SessionError(DuoLocalError):
    """A saved context that cannot be opened, does not belong to this model and settings, or cannot be written."""
