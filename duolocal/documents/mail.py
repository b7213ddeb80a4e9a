"""Mail (.eml, .mbox) and saved web pages (.mhtml) to text, with Python's email package.

Of a mail: the headers that matter, its text (HTML where it has no other), and a list of what is attached. Attached
files are not read. Of a saved page: all of its HTML.
"""

import email
import email.policy
import re
from collections.abc import Callable, Iterator
from email.header import decode_header
from email.message import Message

from duolocal.documents.converted import Assembler, ConversionError, Converted
from duolocal.documents.embedded import size_of, without_pictures
from duolocal.documents.html_text import declared_encoding, read_page
from duolocal.documents.text import NotTextError, decode
from duolocal.documents.told import Told

_HEADERS = ("From", "To", "Cc", "Date", "Subject")
_MAX_PARTS = 2_000  # of one mail
_MAX_MAILS = 20_000
_MAX_DEPTH = 20  # mails within mails
_STUB = 5  # times as long as the plain text is HTML that says more than it
_NEXT = re.compile(rb"^From [^\n]*\d{4}[^\n]*\n(?=[A-Za-z][A-Za-z0-9-]*:)", re.MULTILINE)
_APPLE = re.compile(rb"\A\s*\d+\s*\n(?=[A-Za-z][A-Za-z0-9-]*:)")  # the length that Apple Mail puts before a mail
_PLIST = re.compile(rb"<\?xml version[^>]*>\s*<!DOCTYPE plist.*\Z", re.DOTALL)


def convert(data: bytes, report: Callable[[int, int], None]) -> Converted:
    """Convert a mail, a mailbox or a saved web page; raises ConversionError."""
    data = data.replace(b"\r\n", b"\n")
    mails = _mails(data)
    if len(mails) > _MAX_MAILS:
        raise ConversionError(f"is a mailbox of {len(mails):,} mails, more than {_MAX_MAILS:,}: cut it up")
    assembler = Assembler()
    told = _Told()
    for number, raw in enumerate(mails, 1):
        message = email.message_from_bytes(raw, policy=email.policy.compat32)
        text = _saved_page(message, told) if _is_saved_page(message) else _mail(message, told, 0)
        subject = " ".join(_header(message, "Subject").split())[:80]
        assembler.add(f"mail {number}: {subject}" if subject else f"mail {number}", text)
        report(number, len(mails))
    if not assembler.text().strip():
        raise ConversionError("is a mail without text: open it in a mail program and save what it shows")
    parts = assembler.parts if len(mails) > 1 else ()
    read = Converted(assembler.text(), parts, told.notes(), num_replaced=told.num_replaced)
    return read if parts else without_pictures(read)


class _Told(Told):
    """What is told of all mails of a file."""

    num_replaced = 0
    is_locked = False

    def notes(self) -> tuple[str, ...]:
        locked = ("it is encrypted: save it decrypted to have its text",) if self.is_locked else ()
        return (*super().notes(), *locked)


def _mails(data: bytes) -> list[bytes]:
    if data.startswith(b"From "):
        starts = [match.start() for match in _NEXT.finditer(data)] or [0]
        raw = [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]
        return [re.sub(rb"^>(>*From )", rb"\1", one.partition(b"\n")[2], flags=re.MULTILINE) for one in raw]
    length = _APPLE.match(data)
    return [_PLIST.sub(b"", data[length.end() :])] if length else [data.lstrip(b"\n")]


def _is_saved_page(message: Message) -> bool:
    is_page = message.get_content_type() in ("multipart/related", "text/html") and not _header(message, "To")
    return is_page and (message["From"] is None or "saved by" in str(message["From"]).lower())


def _header(message: Message, name: str) -> str:
    """Return a header as text, whatever its encoding."""
    value = message.get(name)
    if value is None:
        return ""
    pieces = []
    try:
        decoded = decode_header(str(value).replace("\n", " "))
    except (ValueError, email.errors.MessageError):
        return str(value)
    for piece, charset in decoded:
        if isinstance(piece, str):
            pieces.append(piece)
        else:
            pieces.append(_decoded(piece, charset)[0])
    text = "".join(pieces)
    if any("\udc80" <= character <= "\udcff" for character in text):  # bytes that no header should have
        text = _decoded(text.encode("utf-8", "surrogateescape"), None)[0]
    return " ".join(text.split())


def _decoded(data: bytes, charset: str | None) -> tuple[str, int]:
    """Return bytes as text, and how many of them are unreadable."""
    if not data.strip():
        return "", 0
    try:
        found = decode(data, declared=charset)
    except NotTextError:
        text = data.decode("utf-8", errors="replace")
        return text, text.count("\ufffd")
    return found.text, found.num_replaced


def _mail(message: Message, told: _Told, depth: int) -> str:
    """Return a mail as text: headers, text, what is attached."""
    headers = [f"{name}: {value}" for name in _HEADERS if (value := _header(message, name))]
    bodies: list[str] = []
    attached: list[str] = []
    for part in _parts(message):
        kind = part.get_content_type()
        if kind == "message/rfc822":
            inner = part.get_payload()
            if isinstance(inner, list) and inner and isinstance(inner[0], Message) and depth < _MAX_DEPTH:
                bodies.append("Attached mail:\n\n" + _mail(inner[0], told, depth + 1))
                continue
        if _is_text(part):
            text = _text(part, told)
            if text:
                bodies.append(text)
            continue
        told.is_locked = told.is_locked or kind in ("application/pkcs7-mime", "application/x-pkcs7-mime")
        told.is_locked = told.is_locked or message.get_content_type() == "multipart/encrypted"
        attached.append(_listed(part))
    if attached:
        told["attached"] += len(attached)
        bodies.append("Attached, not read:\n" + "\n".join(f"- {name}" for name in attached))
    return "\n".join(headers) + "\n\n" + "\n\n".join(bodies)


def _parts(message: Message) -> Iterator[Message]:
    """Yield the parts that a reader is shown: of several forms of a text the best, in the order of the mail."""
    stack, count = [message], 0
    while stack:
        part = stack.pop()
        count += 1
        if count > _MAX_PARTS:
            raise ConversionError(f"is a mail of more than {_MAX_PARTS:,} parts: it is made to harm")
        payload = part.get_payload()
        if part.is_multipart() and isinstance(payload, list) and part.get_content_type() != "message/rfc822":
            inner = [item for item in payload if isinstance(item, Message)]
            if part.get_content_type() == "multipart/alternative":
                inner = _best(inner)
            stack.extend(reversed(inner))
        else:
            yield part


def _best(parts: list[Message]) -> list[Message]:
    """Return plain text where there is some, and it is not a stub beside the HTML."""
    plain = [part for part in parts if part.get_content_type() == "text/plain" and _payload(part).strip()]
    others = [part for part in parts if part.get_content_type() != "text/plain"]
    rich = [part for part in others if any(inner.get_content_type() == "text/html" for inner in part.walk())]
    if plain and rich:
        page = next(inner for inner in rich[0].walk() if inner.get_content_type() == "text/html")
        text = read_page(_decoded(_payload(page), page.get_content_charset())[0]).text
        if len(text) > _STUB * len(_payload(plain[0]).strip()) + 200:
            plain = []
    chosen = plain or rich[-1:] or others[-1:] or parts[:1]
    rest = [part for part in others if part not in chosen and part not in rich and not _is_text(part)]
    # What stands beside the HTML in the same part is attached all the same.
    beside = [
        inner
        for part in rich
        if part not in chosen
        for inner in part.walk()
        if not inner.is_multipart() and not _is_text(inner)
    ]
    return [*chosen, *rest, *beside]


def _is_text(part: Message) -> bool:
    return (
        part.get_content_maintype() == "text"
        and part.get_content_disposition() != "attachment"
        and (part.get_content_subtype() in ("plain", "html", "markdown", "enriched", "richtext", "x-markdown"))
    )


def _payload(part: Message) -> bytes:
    payload = part.get_payload(decode=True)
    return payload if isinstance(payload, bytes) else b""


def _text(part: Message, told: _Told) -> str:
    data = _payload(part)
    told["damaged"] += bool(part.defects)
    charset = part.get_content_charset()
    if part.get_content_subtype() == "html":
        text, num_replaced = _decoded(data, charset or declared_encoding(data))
        page = read_page(text)
        told["hidden"] += page.num_hidden
        told.num_replaced += num_replaced
        return page.text
    text, num_replaced = _decoded(data, charset)
    told.num_replaced += num_replaced
    if part.get_param("format") == "flowed":
        text = re.sub(r"(?<=\S) \n(?=[^\s>])", " ", text)
    return text.strip()


def _listed(part: Message) -> str:
    """Return name, type and size of a part."""
    name = part.get_filename()
    shown = " ".join(_unheadered(name).split())[:120] if name else "without a name"
    payload = part.get_payload()
    length = len(payload) if isinstance(payload, str) else 0
    is_base64 = str(part.get("Content-Transfer-Encoding", "")).strip().lower() == "base64"
    return f"{shown} ({part.get_content_type()}, {size_of(length if is_base64 else length * 4 // 3)})"


def _unheadered(name: str) -> str:
    wrapper = Message()
    wrapper["Subject"] = name.replace("\n", " ")
    return _header(wrapper, "Subject")


def _saved_page(message: Message, told: _Told) -> str:
    """Return all HTML of a saved page, its title first; frames and sheets are pages of their own."""
    texts: list[str] = []
    for part in message.walk():
        if part.is_multipart():
            continue
        if part.get_content_type() in ("text/html", "application/xhtml+xml"):
            data = _payload(part)
            text, num_replaced = _decoded(data, part.get_content_charset() or declared_encoding(data))
            page = read_page(text)
            told["hidden"] += page.num_hidden
            told.num_replaced += num_replaced
            title = page.title if page.title and page.title not in page.text[:400] and page.text else ""
            texts += [f"# {title}"] if title and not texts else []
            texts += [page.text] if page.text else []
        elif part.get_content_type() == "text/plain":
            texts.append(_text(part, told))
        elif part.get_content_maintype() not in ("text", "application"):
            told["resource"] += 1
    return "\n\n".join(text for text in texts if text)
