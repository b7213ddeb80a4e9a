"""Which codec a text that is not UTF-8 is in: a guess, by what its characters would be.

Text in Latin letters is judged by the letters that each language has (European 8-bit encodings hold different letters
at the same places); for other scripts charset-normalizer judges, where it is installed.
"""

import re
import unicodedata

_SAMPLE = 65_536  # bytes of lines that are not ASCII
_UTF16_SAMPLE = 4096
_ENOUGH = 0.85  # share of a text's letters beyond ASCII that a language must explain

# Letters beyond ASCII, by the codecs that their languages are written in; earlier codecs win a tie.
_WEST = (
    "àâæçéèêëîïôœùûüÿ",
    "äöüß",
    "áéíñóúü",
    "àáâãçéêíóôõúü",
    "àèéìíîòóùú",
    "åäöæøéü",
    "éëïöüóè",
    "áéíóúýþæöð",
    "õäöüšž",
)
_CENTRE = ("ąćęłńóśźż", "áčďéěíňóřšťúůýž", "áäčďéíĺľňóôŕšťúýž", "áéíóöőúüű", "ăâîşţșț", "čšžćđ")
_LATIN = (
    ("cp1252", _WEST),
    ("cp1254", ("çğıöşüâîû",)),
    ("cp1250", _CENTRE),
    ("iso8859-2", _CENTRE),
    ("iso8859-3", ("ĉĝĥĵŝŭ",)),
    ("cp1257", ("ąčęėįšųūž", "āčēģīķļņšūž")),
)
_ALL_WEST = frozenset("".join(_WEST))
_ANY_WEST = 0.9  # what a mixture of the languages of cp1252 is worth beside one language of another codec
_PAIR = re.compile(rb"[\x80-\xff](?=[\x80-\xff])")
_MOST_PAIRS = 0.4  # of the bytes beyond ASCII; in Latin letters few words have two in a row
_SIGNS = frozenset("“”„‚‘’‹›«»–—…•·°§©®™€£¥¢¿¡ªº¹²³¼½¾×÷±µ\xa0\xad")
_OTHERS = [
    *("cp1251", "koi8_r", "koi8_u", "iso8859_5", "cp866"),  # Cyrillic
    *("cp1253", "iso8859_7", "cp737", "cp1255", "cp1256", "cp874", "cp1258"),  # Greek, Hebrew, Arabic, Thai, Vietnamese
    *("cp932", "shift_jis", "euc_jp", "gb18030", "big5", "cp949"),
]


def guess_encoding(data: bytes) -> str:
    """Name the likeliest codec of a text in an encoding with one or two bytes per character; it can decode `data`."""
    sample = _sample(data)
    latin, share = _latin(sample)
    if share < _ENOUGH:
        for name in _normalizer(sample):
            if _decodes(data, name):
                return name
    for name in (latin, "cp1252"):
        if _decodes(data, name):
            return name
    return "latin-1"


def has_normalizer() -> bool:
    """Tell whether other scripts than the Latin can be told apart."""
    import importlib.util

    return importlib.util.find_spec("charset_normalizer") is not None


def _sample(data: bytes) -> bytes:
    """Return the first lines that are not ASCII; in no encoding guessed here is a line break part of a character."""
    lines, length = [], 0
    for line in data.splitlines(keepends=True):
        if not line.isascii():
            lines.append(line)
            length += len(line)
            if length >= _SAMPLE:
                break
    return b"".join(lines)[: 4 * _SAMPLE]


def _latin(sample: bytes) -> tuple[str, float]:
    """Return the best codec of Latin letters, and the share of letters beyond ASCII that its language has."""
    best, most = "cp1252", 0.0
    beyond = sum(byte > 0x7F for byte in sample)
    if len(_PAIR.findall(sample)) > _MOST_PAIRS * beyond:
        return best, most  # whole words beyond ASCII: another script
    for codec, languages in _LATIN:
        text = sample.decode(codec, errors="replace").lower()
        found = [character for character in text if character > "\x7f" and character not in _SIGNS]
        if not found:
            return codec, 1.0
        for letters in languages:
            share = sum(character in letters for character in found) / len(found)
            if share > most:
                best, most = codec, share
    if most < _ANY_WEST:  # several languages, or names
        text = sample.decode("cp1252", errors="replace").lower()
        found = [character for character in text if character > "\x7f" and character not in _SIGNS]
        share = _ANY_WEST * sum(character in _ALL_WEST for character in found) / len(found)
        if share > most:
            best, most = "cp1252", share
    return best, most


def _normalizer(sample: bytes) -> list[str]:
    try:
        from charset_normalizer import from_bytes
    except ImportError:
        return []
    matches = from_bytes(sample, cp_isolation=_OTHERS, preemptive_behaviour=False)
    return [match.encoding for match in matches]


def _decodes(data: bytes, name: str) -> bool:
    try:
        data.decode(name)
    except UnicodeDecodeError:
        return False
    return True


def guess_utf16(data: bytes) -> str | None:
    """Return the byte order of UTF-16 without a mark; None for what is no text."""
    if len(data) < 4:
        return None
    sample = data[: min(len(data), _UTF16_SAMPLE) & ~1]
    best, most = None, 0
    for codec in ("utf-16-le", "utf-16-be"):
        try:
            text = sample.decode(codec)
        except UnicodeDecodeError as error:
            if error.start < len(sample) - 2:  # but for a pair that the sample cuts in two
                continue
            text = sample[: error.start].decode(codec)
        odd = sum(unicodedata.category(at) in ("Cc", "Cn", "Co") and at not in "\t\n\r\f" for at in text)
        # Every script has spaces, line ends or full stops; with the wrong order of bytes they are other signs.
        marks = sum(at in " \n\t.,\u3000\u3001\u3002" for at in text)
        if odd <= 0.01 * len(text) and marks > most:
            best, most = codec, marks
    return best if most and len(data) % 2 == 0 else None
