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
    ("cp850", _WEST),  # DOS
    ("mac_roman", _WEST),
    ("cp852", _CENTRE),
    ("mac_latin2", _CENTRE),
)
_ALL_WEST = frozenset("".join(_WEST))
_ANY_WEST = 0.9  # what a mixture of the languages of cp1252 is worth beside one language of another codec
_PAIR = re.compile(rb"[\x80-\xff](?=[\x80-\xff])")
_RUN = re.compile(rb"[\x80-\xff]+")
_IN_WORD = re.compile(rb"[A-Za-z][\x80-\xff]+|[\x80-\xff]+[A-Za-z]")
_MOST_PAIRS = 0.4  # of the bytes beyond ASCII; in Latin letters few words have two in a row
_SIGNS = frozenset("“”„‚‘’‹›«»–—…•·°§©®™€£¥¢¿¡ªº¹²³¼½¾×÷±µ\xa0\xad")
_WITHIN = frozenset("’‘·…/\xad\xa0–—")  # signs that may stand between two letters
_OPENING = frozenset("„‚¿¡")  # signs that never follow a letter
_DRAWN = frozenset(map(chr, range(0x2500, 0x25A0)))  # lines and shades of DOS
# What most text in these scripts is made of, the commonest first.
_HANZI = frozenset(
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事"
    "成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力它与长把机十民第公此"
    "已工使情明性知全三又关点正业外将两高间由问很最重并物手应战向头文体政美相见被利什二等产或新己制身果加西斯月话合回特代"
    "内信表化老给世位次度门任常先海通教儿原东声提立及比员解水名真论处走义各入几口认条平系气题活尔更别打女变四神总何电数安"
    "少报才结反受目太量再感建务做接必场件计管期市直德资命山金指克许统区保至队形社便空决治展马科司五基眼书非则听白却界达光"
    "放强即像难且权思王象完设式色路记南品住告类求据程北边死张该交规万取拉格望觉术领共确传师观清今切院让识候带导争运料报告"
    "测试文件合同编号项目目录会议纪要简历说明附件表格数据单位姓名地址电话邮箱日期备注价格总计您请谢网络用户密码邮件图片"
)
_HANZI_OLD = frozenset(
    "這個們來國時說會為對發後過還進經學動現當開從實無長機與將問關點頭應戰產見話體員題變電數報務資統區書記據"
    "測試檔案專說圖臺灣"
)
_HANGUL = frozenset(
    "이다는의에을를가고하은지로한기도서사자리인그라시나대있수아어해일정들게과보여만전부것으니면주장상제마동원스요우리세안녕문서보고계약회의"
)
_KANA = re.compile("[\u3041-\u3096\u30a1-\u30fa\u30fc]")
_COMMON_LETTERS = frozenset("оеаинтсрвлкмдпуяіαοιετσνηυρπκμλςάέήίόύώ")
_SHORT = 400  # bytes beyond ASCII; more are enough for charset-normalizer
_PLAUSIBLE = 0.72
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
        short = _script(sample) if sum(byte > 0x7F for byte in sample) <= _SHORT else None
        if short is not None and _decodes(data, short):
            return short
        for name in _normalizer(sample):
            if _decodes(data, name):
                return name
    for name in (latin, "cp1252"):
        if _decodes(data, name):
            return name
    return "latin-1"


def guess_names(names: list[bytes]) -> str:
    """Name the codec of file names that are none in ASCII; where nothing speaks for another it is that of DOS."""
    together = b"\n".join(names)
    if _decodes(together, "utf-8"):
        return "utf-8"
    sample = _sample(together)
    script = _script(sample)
    if script and _decodes(together, script):
        return script
    latin, share = _latin(sample)
    return latin if share >= _ENOUGH and latin in ("cp1252", "cp1250", "cp852", "mac_roman") else "cp437"


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
    runs = len(_RUN.findall(sample))
    if len(_PAIR.findall(sample)) > _MOST_PAIRS * beyond and len(_IN_WORD.findall(sample)) < 0.5 * runs:
        return best, most  # whole words beyond ASCII: another script
    for codec, languages in _LATIN:
        found = _beyond(sample.decode(codec, errors="replace"))
        if not found and codec == "cp1252":
            return codec, 1.0
        for letters in languages:
            share = sum(character in letters for character in found) / max(1, len(found))
            if share > most:
                best, most = codec, share
    if most < _ANY_WEST:  # several languages, or names
        found = _beyond(sample.decode("cp1252", errors="replace"))
        share = _ANY_WEST * sum(character in _ALL_WEST for character in found) / len(found)
        if share > most:
            best, most = "cp1252", share
    return best, most


def _beyond(text: str) -> list[str]:
    """Return what must be letters beyond ASCII, in lower case; "?" for a sign or capital where none can stand."""
    found = []
    before = " "
    for at, character in enumerate(text):
        if character > "\x7f" and character not in _DRAWN:
            after = text[at + 1 : at + 2]
            if character in _SIGNS:
                is_inside = before.isalpha() and after.isalpha() and character not in _WITHIN
                if is_inside or (before.isalpha() and character in _OPENING):
                    found.append("?")
            else:
                found.append("?" if character.isupper() and before.islower() else character.lower())
        before = character
    return found


def _script(sample: bytes) -> str | None:
    """Return the codec in which a short text is most likely words of another script; None where none is likely."""
    best, most = None, _PLAUSIBLE
    for codec in ("gb18030", "cp932", "euc_jp", "big5", "cp949", "cp1251", "koi8_r", "cp866", "cp1253"):
        try:
            text = sample.decode(codec)
        except UnicodeDecodeError:
            continue
        value = _plausible(text)
        if value > most:
            best, most = codec, value
    return best


def _plausible(text: str) -> float:
    """Return how much a text looks like words of one script, from 0 to 1."""
    found = [character for character in text if character > "\x7f"]
    if not found:
        return 0.0
    is_japanese = len(_KANA.findall(text)) >= 0.2 * len(found)
    total, before = 0.0, " "
    for at, character in enumerate(text):
        if character > "\x7f":
            neighbours = before + text[at + 1 : at + 2]
            is_mixed = any(other.isalpha() and other < "\x80" for other in neighbours) and ord(character) < 0x0460
            total += 0.0 if is_mixed else _weight(character, before, is_japanese=is_japanese)
        before = character
    return total / len(found)


def _weight(character: str, before: str, *, is_japanese: bool) -> float:
    code = ord(character)
    if 0x4E00 <= code < 0xA000:
        common = character in _HANZI or character in _HANZI_OLD
        return 1.0 if common else 0.85 if is_japanese else 0.7 if _is_simple(character) else 0.3
    if 0xAC00 <= code < 0xD7A4:
        return 1.0 if character in _HANGUL else 0.7 if _is_simple(character) else 0.2
    if _KANA.match(character):
        return 1.0 if is_japanese else 0.5
    if character.isalpha() and character.isupper() and before.islower():
        return 0.0
    if 0x0370 <= code <= 0x045F:
        return 1.0 if character.lower() in _COMMON_LETTERS else 0.5
    return 0.9 if character in "，。、；：？！（）《》“”「」・　" else 0.0


def _is_simple(character: str) -> bool:
    """Tell whether a character is one of those that its country's first standard put among the common ones."""
    for codec, first, last in (
        ("gb2312", 0xB0, 0xD7),
        ("euc_kr", 0xB0, 0xC8),
        ("euc_jp", 0xB0, 0xCF),
        ("big5", 0xA4, 0xC6),
    ):
        try:
            encoded = character.encode(codec)
        except UnicodeEncodeError:
            continue
        if first <= encoded[0] <= last:
            return True
    return False


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
