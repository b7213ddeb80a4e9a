"""Text from a model, a document or a file name, made harmless for a terminal.

A model can be talked into writing escape sequences that retitle a window, write to the clipboard or hide
text. Whatever is not ours passes through here before it is printed to a terminal.
"""

# C0 (but tab and newline), DEL and C1 become visible; carriage returns, which would overwrite a line, go.
_CONTROLS: dict[int, str | None] = {code: chr(0x2400 + code) for code in range(0x20)}
_CONTROLS |= {0x7F: "\u2421", 0x0D: None}
_CONTROLS |= dict.fromkeys(range(0x80, 0xA0), "\ufffd")
# Bidirectional overrides, embeddings and isolates can make a line read differently from what it says.
_CONTROLS |= dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd")
# Lone surrogates come from undecodable file names and cannot be written.
_CONTROLS |= dict.fromkeys(range(0xD800, 0xE000), "\ufffd")
del _CONTROLS[0x09], _CONTROLS[0x0A]

_ONE_LINE = {0x09: " ", 0x0A: "\u2424"}


def clean(text: str) -> str:
    """Make terminal control characters in untrusted text visible; tabs and newlines stay."""
    return text.translate(_CONTROLS)


def clean_line(text: str) -> str:
    """Make untrusted text harmless and one line: for names and paths."""
    return clean(text).translate(_ONE_LINE)
