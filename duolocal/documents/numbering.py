"""Numbers of lists as their programs show them: 3, 03, c, iii, third."""

from collections.abc import Callable

_Signs = tuple[tuple[int, str], ...]

_ROMAN: _Signs = ((1000, "m"), (900, "cm"), (500, "d"), (400, "cd"), (100, "c"), (90, "xc"), (50, "l"), (40, "xl"))
_ROMAN += ((10, "x"), (9, "ix"), (5, "v"), (4, "iv"), (1, "i"))
_ONES = (
    *("", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_NTH = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth"}
_NTH["twelve"] = "twelfth"
_CYRILLIC = "абвгдежзиклмнопрстуфхцчшщыэюя"
_GREEK = "αβγδεζηθικλμνξοπρστυφχψω"
_HEBREW_SIGNS = "ת ש ר ק צ פ ע ס נ מ ל כ טז טו י ט ח ז ו ה ד ג ב א"
_HEBREW_VALUES = (400, 300, 200, 100, 90, 80, 70, 60, 50, 40, 30, 20, 16, 15, *range(10, 0, -1))
_HEBREW: _Signs = tuple(zip(_HEBREW_VALUES, _HEBREW_SIGNS.split(), strict=True))
_HAN = "零一二三四五六七八九"
_KANA = "アイウエオカキクケコサシスセソタチツテトナニヌネノハヒフヘホマミムメモヤユヨラリルレロワヲン"
_HANGUL = "가나다라마바사아자차카타파하"
_STEMS, _BRANCHES = "甲乙丙丁戊己庚辛壬癸", "子丑寅卯辰巳午未申酉戌亥"


def letters(number: int, alphabet: str = "abcdefghijklmnopqrstuvwxyz") -> str:
    """Return a, b … z, aa, ab, as spreadsheets and web pages count."""
    text = ""
    while number > 0:
        number, rest = divmod(number - 1, len(alphabet))
        text = alphabet[rest] + text
    return text


def _repeated(number: int, alphabet: str = "abcdefghijklmnopqrstuvwxyz") -> str:
    """Return a, b … z, aa, bb, as Word counts."""
    times, rest = divmod(number - 1, len(alphabet))
    return alphabet[rest] * min(times + 1, 40)


def _summed(number: int, signs: _Signs) -> str:
    text = ""
    for value, sign in signs:
        times, number = divmod(number, value)
        text += sign * times
    return text


def roman(number: int) -> str:
    """Return i, ii, iii, iv."""
    return _summed(number, _ROMAN)


def _cardinal(number: int) -> str:
    if number < 20:
        return _ONES[number]
    if number < 100:
        return _TENS[number // 10] + (f"-{_ONES[number % 10]}" if number % 10 else "")
    for value, name in ((1000, "thousand"), (100, "hundred")):
        if number >= value:
            rest = _cardinal(number % value)
            return f"{_cardinal(number // value)} {name}" + (f" {rest}" if rest else "")
    raise AssertionError(number)


def _nth(number: int) -> str:
    text = _cardinal(number)
    at = max(text.rfind(" "), text.rfind("-")) + 1
    last = text[at:]
    return text[:at] + (_NTH.get(last) or (f"{last[:-1]}ieth" if last.endswith("y") else f"{last}th"))


def _ordinal(number: int) -> str:
    suffix = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


def _han(number: int) -> str:
    """Return 一, 十, 十一, 二十三, 一百零五."""
    if number > 9999:
        return "".join(_HAN[int(digit)] for digit in str(number))
    text, gap = "", False
    for value, unit in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit, number = divmod(number, value)
        if digit:
            text += ("零" if gap else "") + ("" if value == 10 and digit == 1 and not text else _HAN[digit]) + unit
        gap = not digit and bool(text)
        if not number:
            break
    return text


def _circled(number: int) -> str:
    return chr(0x2460 + number - 1) if number <= 20 else f"({number})"


_FORMATS: dict[str, Callable[[int], str]] = {
    "decimalZero": lambda number: f"{number:02}",
    "upperRoman": lambda number: roman(number).upper(),
    "lowerRoman": roman,
    "upperLetter": lambda number: _repeated(number).upper(),
    "lowerLetter": _repeated,
    "upperAlpha": lambda number: letters(number).upper(),
    "lowerAlpha": letters,
    "ordinal": _ordinal,
    "cardinalText": lambda number: _cardinal(number).capitalize(),
    "ordinalText": lambda number: _nth(number).capitalize(),
    "numberInDash": lambda number: f"- {number} -",
    "hex": lambda number: f"{number:X}",
    "chicago": lambda number: "*†‡§"[(number - 1) % 4] * min((number - 1) // 4 + 1, 40),
    "russianLower": lambda number: _repeated(number, _CYRILLIC),
    "russianUpper": lambda number: _repeated(number, _CYRILLIC).upper(),
    "lowerGreek": lambda number: letters(number, _GREEK),
    "hebrew1": lambda number: _summed(number, _HEBREW),
    "decimalEnclosedCircle": _circled,
    "decimalEnclosedCircleChinese": _circled,
    "decimalEnclosedFullstop": lambda number: f"{number}.",
    "decimalEnclosedParen": lambda number: f"({number})",
    "decimalFullWidth": lambda number: str(number).translate({48 + digit: 0xFF10 + digit for digit in range(10)}),
    "ideographDigital": lambda number: "".join(_HAN[int(digit)] for digit in str(number)).replace("零", "〇"),
    "japaneseDigitalTenThousand": lambda number: "".join(_HAN[int(digit)] for digit in str(number)).replace("零", "〇"),
    "aiueoFullWidth": lambda number: _repeated(number, _KANA),
    "ganada": lambda number: _repeated(number, _HANGUL),
    "ideographTraditional": lambda number: _repeated(number, _STEMS),
    "ideographZodiac": lambda number: _repeated(number, _BRANCHES),
}
_FORMATS |= dict.fromkeys(
    ("chineseCounting", "chineseCountingThousand", "taiwaneseCounting", "taiwaneseCountingThousand"), _han
)
_FORMATS |= dict.fromkeys(("japaneseCounting", "koreanCounting", "cjkIdeographic"), _han)
_FORMATS["aiueo"] = _FORMATS["aiueoFullWidth"]


def numbered(number: int, style: str) -> str:
    """Return a number in a style as OOXML names it, plainly where the style is unknown or cannot count so far."""
    if style == "none":
        return ""
    form = _FORMATS.get(style)
    return form(number) if form and 0 < number < 4000 else f"{number:02}" if style == "decimalZero" else str(number)
