"""What the model is asked: presets, prompt files, lengths.

Owns the words and how long an answer may be. What they are in tokens is `frame`'s. The same prompt is put to a
document, to each part of a long one, and to the summaries of its parts: all share the tokens before the document.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from duolocal.errors import SettingsError
from duolocal.paths import user_path

DOCUMENT, LENGTH = "{document}", "{length}"
LENGTHS = ("short", "medium", "long")
DEFAULT_LENGTH = "medium"
MAX_TOKENS: Mapping[str, int] = {"short": 160, "medium": 320, "long": 1024}
_FREE_MAX_TOKENS = 512  # of a prompt that says nothing of length
_TOKENS_PER_WORD = 3  # room for languages other than English, where it is 1.4
MAX_WORDS = 20_000
_MAX_PROMPT_BYTES = 64 * 1024
_WORDS = re.compile(r"([0-9]{1,6})\s*(?:words?|w)?", re.IGNORECASE)


@dataclass(frozen=True)
class Preset:
    """A prompt that comes with duolocal, and its words for each length."""

    about: str  # for people
    template: str
    lengths: Mapping[str, str]
    words: str  # with {words}


# The instruction stands before the text: put after it, it made SmolLM2-135M speak of the text ("The text is in three
# sentences") or go on with it, and marks around a document made it write marks.
PRESETS: Mapping[str, Preset] = {
    "summary": Preset(
        "a summary with the key facts, names and numbers",
        "Summarize the following text {length}. Give its main points, names and numbers exactly as they are in the "
        "text.\n\n{document}",
        {
            "short": "in one or two sentences",
            "medium": "in up to five sentences",
            "long": "in several paragraphs",
        },
        "in about {words} words",
    ),
    "bullets": Preset(
        "the main points as a list",
        "List the main points of the following text as {length}. Begin every line with a dash, and give names and "
        "numbers exactly as they are in the text.\n\n{document}",
        {
            "short": "three bullet points",
            "medium": "five to seven bullet points",
            "long": "ten to fifteen bullet points",
        },
        "bullet points of about {words} words in all",
    ),
    "facts": Preset(
        "names, dates, numbers and what is said of them, one per line",
        "List the most important facts in the following text, one per line, {length}: names, dates and numbers exactly "
        "as they are in the text, and what it says of them.\n\n{document}",
        {"short": "five at most", "medium": "ten at most", "long": "as many as there are"},
        "about {words} words in all",
    ),
    "minutes": Preset(
        "what was discussed, decided, and who does what by when",
        "Write the minutes of the following text {length}: what was discussed, what was decided, and who will do what "
        "by when. Give names and numbers exactly as they are in the text.\n\n{document}",
        {"short": "in three sentences", "medium": "in short paragraphs", "long": "in detail"},
        "in about {words} words",
    ),
}
DEFAULT_PRESET = "summary"


@dataclass(frozen=True)
class Prompt:
    """What to ask about a text that stands between `before` and `after`."""

    name: str  # of the preset, or of the file
    before: str
    after: str = ""
    system: str | None = None
    length: str = ""  # as asked for: "medium", "200 words"; "" where the prompt leaves it open
    max_tokens: int = MAX_TOKENS[DEFAULT_LENGTH]  # of an answer

    @property
    def digest(self) -> str:
        """Return what tells prompts apart: 16 hex digits of all the words."""
        words = "\0".join((self.before, self.after, self.system or ""))
        return hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def make_prompt(wanted: str = DEFAULT_PRESET, *, length: str | None = None, system: str | None = None) -> Prompt:
    """Return the preset or the prompt file that `wanted` names; raises SettingsError with one line.

    A file is taken where `wanted` is no preset. It holds {document} once, and may hold {length}, which stands for
    words such as "in three to five sentences"; all other braces are text. length: "short", "medium", "long" or a number
    of words ("200 words").
    """
    preset = PRESETS.get(wanted)
    if preset is not None:
        return _filled(wanted, preset.template, preset, length, system)
    path = user_path(wanted)
    template = _read(wanted, path)
    shown = f"the prompt {path}"
    count = template.count(DOCUMENT)
    if count != 1:
        seen = "has no {document}" if not count else f"has {{document}} {count} times"
        raise SettingsError(f"{shown} {seen}: write it once, where the document goes")
    if not template.replace(DOCUMENT, "").strip():
        raise SettingsError(f"{shown} asks nothing: write an instruction beside {{document}}")
    if length is not None and LENGTH not in template:
        raise SettingsError(
            f"{shown} has no {{length}} for --length {length}: write it where the words for the length go, or leave "
            "--length out (--max-tokens limits the answer)"
        )
    return _filled(path.name, template, None, length, system)


def prompt_of(template: str, *, name: str = "own", length: str | None = None, system: str | None = None) -> Prompt:
    """Return a prompt of your own words: `template` holds {document} once. Raises SettingsError."""
    if template.count(DOCUMENT) != 1:
        raise SettingsError(f"the prompt {name} has {{document}} {template.count(DOCUMENT)} times: write it once")
    return _filled(name, template, None, length, system)


_ENDS = re.compile(r"[.!?…][\"'”’»)\]]*(?=\s|$)|[。！？][」』”’]*|\n")


def whole_sentences(text: str) -> str:
    """Return a text that was cut off as far as its last sentence or line that is whole; all of it where none is."""
    ends = [match.end() for match in _ENDS.finditer(text)]
    return text[: ends[-1]].rstrip() if ends else text


def _filled(name: str, template: str, preset: Preset | None, length: str | None, system: str | None) -> Prompt:
    before, _, after = template.partition(DOCUMENT)
    if LENGTH not in template:
        return Prompt(name, before, after, system or None, "", _FREE_MAX_TOKENS)
    words, shown, max_tokens = _length(length or DEFAULT_LENGTH, preset or PRESETS[DEFAULT_PRESET])
    return Prompt(name, before.replace(LENGTH, words), after.replace(LENGTH, words), system or None, shown, max_tokens)


def _length(wanted: str, preset: Preset) -> tuple[str, str, int]:
    """Return the words for a length, its name, and the tokens that an answer may have."""
    name = wanted.strip().lower()
    if name in LENGTHS:
        return preset.lengths[name], name, MAX_TOKENS[name]
    match = _WORDS.fullmatch(name)
    count = int(match[1]) if match else 0
    if not 1 <= count <= MAX_WORDS:
        raise SettingsError(
            f"--length is {wanted!r}: give {', '.join(LENGTHS)}, or a number of words such as '200 words', at most "
            f"{MAX_WORDS:,}"
        )
    return preset.words.replace("{words}", str(count)), f"{count} words", max(64, _TOKENS_PER_WORD * count)


def _read(wanted: str, path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_PROMPT_BYTES + 1)
    except FileNotFoundError:
        names = ", ".join(PRESETS)
        raise SettingsError(f"--prompt is {wanted!r}, and there is no such file: give one, or {names}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL inside the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SettingsError(f"the prompt {path} cannot be read: {reason}") from error
    if len(data) > _MAX_PROMPT_BYTES:
        raise SettingsError(
            f"the prompt {path} is larger than {_MAX_PROMPT_BYTES // 1024} KiB: name the instruction here, and the "
            "documents as INPUT"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingsError(f"the prompt {path} is no UTF-8 text (byte {error.start:,}): save it as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n")
