"""Signs of the symbol fonts of Office files, which have no meaning without their font, as Unicode."""

_GREEK = "ΑΒΧΔΕΦΓΗΙϑΚΛΜΝΟΠΘΡΣΤΥςΩΞΨΖ", "αβχδεφγηιϕκλμνοπθρστυϖωξψζ"
_SYMBOL = {
    **{0x41 + at: sign for at, sign in enumerate(_GREEK[0])},
    **{0x61 + at: sign for at, sign in enumerate(_GREEK[1])},
    **{code: chr(code) for code in b" !#%&()+,./0123456789:;<=>?[]_{|}"},
    **{0x22: "∀", 0x24: "∃", 0x27: "∋", 0x2A: "∗", 0x2D: "−", 0x40: "≅", 0x5C: "∴", 0x5E: "⊥", 0x7E: "∼"},
    **dict(enumerate("ϒ′≤⁄∞ƒ♣♦♥♠↔←↑→↓°±″≥×∝∂•÷≠≡≈…", 0xA1)),
    **dict(enumerate("ℵℑℜ℘⊗⊕∅∩∪⊃⊇⊄⊂⊆∈∉∠∇®©™∏√⋅¬∧∨⇔⇐⇑⇒⇓◊", 0xC0)),
    **{0xE1: "⟨", 0xE5: "∑", 0xF1: "⟩", 0xF2: "∫"},
}
_WINGDINGS = {
    **{0x2A: "✉", 0x36: "⌛", 0x4A: "☺", 0x4B: "😐", 0x4C: "☹", 0x6C: "●", 0x6D: "❍", 0x6E: "■", 0x6F: "☐", 0x71: "❑"},
    **{0x74: "⧫", 0x75: "◆", 0x76: "❖", 0x77: "⬥", 0x9E: "·", 0x9F: "•", 0xA1: "○", 0xA7: "▪", 0xA8: "☐", 0xAB: "★"},
    **{0xD8: "➢", 0xDF: "←", 0xE0: "→", 0xE1: "↑", 0xE2: "↓", 0xE8: "➔", 0xEF: "⇦", 0xF0: "⇨", 0xFB: "✗", 0xFC: "✓"},
    **{0xFD: "☒", 0xFE: "☑"},
}
_FONTS = {
    "symbol": _SYMBOL,
    "wingdings": _WINGDINGS,
    "wingdings 2": {0x4F: "✗", 0x50: "✓", 0x51: "☒", 0x52: "☑", 0x53: "☒", 0x54: "☒", 0x98: "•", 0xA3: "☐"},
    "webdings": {0x31: "☐", 0x61: "✓", 0x63: "☐", 0x67: "■", 0x72: "✗"},
}
_FONTS["wingdings 3"] = {0x22: "▲", 0x7D: "▶", 0x75: "▶", 0x74: "◀", 0x70: "▲", 0x71: "▼"}
_PRIVATE = range(0xF000, 0xF100)  # where Word puts the signs of such fonts


def is_symbol_font(font: str | None) -> bool:
    """Tell whether the letters of a font are signs."""
    return font is not None and font.lower() in _FONTS


def symbol(code: int, font: str) -> str:
    """Return the sign of a font at a code; U+FFFD where it is not known."""
    signs = _FONTS.get(font.lower())
    if signs is None:
        return "\ufffd" if code in _PRIVATE or not 32 <= code < 0xD800 else chr(code)
    return signs.get(code & 0xFF, "\ufffd")


def in_symbols(text: str, font: str) -> str:
    """Return a text that is set in a symbol font."""
    return "".join(symbol(ord(sign), font) if not sign.isspace() else sign for sign in text)
