"""The transcript of a chat as Markdown, and the way to the clipboard (OSC 52)."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

from duolocal.errors import SettingsError
from duolocal.terminal.clean import clean_line
from duolocal.tokenizer import Message

# xterm and what follows it take about 75,000 bytes in one OSC 52 sequence, in Base64.
MAX_CLIPBOARD_BYTES = 74_994 // 4 * 3
_MARKS = {
    "cancelled": "*(stopped)*",
    "length": "*(cut off by max_tokens)*",
    "context": "*(cut off: the context is full)*",
}


def as_markdown(
    messages: Sequence[Message],
    *,
    model: str,
    documents: Sequence[str],
    questions: Mapping[int, str],
    ends: Mapping[int, str],
) -> str:
    """Write messages as Markdown.

    By message index, `questions` gives what the user typed (the message holds the documents as well) and `ends`
    says which answers ended early, and how. A user's message without a question holds documents alone.
    """
    parts = [f"# Chat with {model}"]
    if documents:
        parts.append("Documents: " + ", ".join(f"`{clean_line(name)}`" for name in documents))
    for index, message in enumerate(messages):
        if message.role == "user":
            if index in questions:
                parts += ["## You", questions[index].strip()]
            continue
        parts += ["## System" if message.role == "system" else f"## {model}", message.content.strip()]
        if index in ends and ends[index] in _MARKS:
            parts.append(_MARKS[ends[index]])
    return "\n\n".join(parts) + "\n"


def save(text: str, path: Path, *, overwrite: bool) -> None:
    """Write a transcript to a file; raises SettingsError when it exists or cannot be written."""
    try:
        with path.open("w" if overwrite else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise SettingsError(f"{path} exists: choose another name, or /save --force {path}") from None
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error.strerror or error}") from error


def clipboard_sequence(text: str) -> str:
    """Build the OSC 52 sequence that puts `text` on the terminal's clipboard; SettingsError when too long."""
    data = text.encode("utf-8", errors="replace")
    if len(data) > MAX_CLIPBOARD_BYTES:
        raise SettingsError(
            f"the text has {len(data):,} bytes and terminals take {MAX_CLIPBOARD_BYTES:,}: use /save FILE"
        )
    return f"\x1b]52;c;{base64.b64encode(data).decode('ascii')}\x07"
