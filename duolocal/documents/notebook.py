"""Jupyter notebooks to Markdown: texts, code and what it printed, cell by cell; pictures as short notes."""

import json
import re
from collections.abc import Callable
from typing import Any

from duolocal.documents.converted import Assembler, ConversionError, Converted
from duolocal.documents.embedded import left_out, pictures_note, without_pictures
from duolocal.documents.html_text import read_page
from duolocal.documents.text import NotTextError, decode
from duolocal.documents.told import Told

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours of tracebacks
_TEXTS = ("text/markdown", "text/latex", "text/plain", "text/html", "application/json")
_OLD_TYPES = {"text": "text/plain", "html": "text/html"} | {key: f"image/{key}" for key in ("png", "jpeg")}
_OLD_TYPES["svg"] = "image/svg+xml"  # as the third format calls them
_MAX_CELLS = 100_000


def convert(data: bytes, report: Callable[[int, int], None]) -> Converted:
    """Convert a notebook; its parts are its cells. Raises ConversionError."""
    try:
        content = json.loads(decode(data).text)
        if not isinstance(content, dict):
            raise ValueError("it is no object")
        sheets = content.get("worksheets") or [content]  # of the third format
        cells = [cell for sheet in sheets for cell in sheet.get("cells", [])]
    except (NotTextError, ValueError, AttributeError, TypeError) as error:
        raise ConversionError(f"is a damaged notebook ({error}): open it in Jupyter and save it anew") from None
    if len(cells) > _MAX_CELLS:
        raise ConversionError(f"is a notebook of more than {_MAX_CELLS:,} cells: cut it up")
    reader = _Reader(_language(content))
    for number, cell in enumerate(cells, 1):
        if isinstance(cell, dict):
            reader.cell(cell, number)
        else:
            reader.told["unknown"] += 1
        report(number, len(cells))
    if not reader.assembler.text().strip():
        raise ConversionError("is a notebook without text: load another")
    return Converted(reader.assembler.text(), reader.assembler.parts, reader.notes())


def _language(content: dict[str, Any]) -> str:
    metadata = content.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    for key, name in (("language_info", "name"), ("kernelspec", "language")):
        found = metadata.get(key)
        if isinstance(found, dict) and isinstance(found.get(name), str):
            return re.sub(r"\W", "", found[name])[:20]
    return "python"


class _Reader:
    def __init__(self, language: str) -> None:
        self.assembler = Assembler()
        self.told = Told()
        self._language = language
        self._num_pictures = self._length = 0

    def notes(self) -> tuple[str, ...]:
        return (*pictures_note(self._num_pictures, self._length), *self.told.notes())

    def cell(self, cell: dict[str, Any], number: int) -> None:
        source = self._without_pictures(_text(cell.get("source", cell.get("input", ""))).strip("\n"))
        kind = cell.get("cell_type")
        pieces = []
        if kind == "code":
            language = cell.get("language") if isinstance(cell.get("language"), str) else self._language
            if source.strip():
                pieces.append(_fenced(source, str(language)))
            outputs = cell.get("outputs")
            for output in outputs if isinstance(outputs, list) else []:
                text = self._output(output) if isinstance(output, dict) else ""
                if text.strip():
                    pieces.append(text)
        elif kind == "heading":
            level = cell.get("level")
            pieces.append("#" * (level if isinstance(level, int) and 0 < level < 7 else 1) + f" {source}")
        else:
            pieces.append(source)
            attachments = cell.get("attachments")
            for name, content in attachments.items() if isinstance(attachments, dict) else []:
                for media, value in content.items() if isinstance(content, dict) else []:
                    pieces.append(f"{name}: {self._picture(str(media), _text(value))}")
        self.assembler.add(f"cell {number}", "\n\n".join(pieces))

    def _output(self, output: dict[str, Any]) -> str:
        kind = output.get("output_type")
        if kind == "stream":
            return self._printed(_text(output.get("text", "")))
        if kind in ("error", "pyerr"):
            trace = output.get("traceback")
            text = "\n".join(map(str, trace)) if isinstance(trace, list) and trace else f"{output.get('evalue')}"
            return self._printed(text)
        found = output.get("data")
        data: dict[str, Any] = (
            found
            if isinstance(found, dict)
            else {_OLD_TYPES[key]: value for key, value in output.items() if key in _OLD_TYPES}
        )
        pieces = [
            self._picture(media, _text(value))
            for media, value in data.items()
            if media.startswith(("image/", "audio/", "video/", "application/pdf"))
        ]
        best = next((media for media in _TEXTS if data.get(media)), None)
        if best == "text/html":
            pieces.append(read_page(_text(data[best])).text)
        elif best == "application/json":
            pieces.append(self._printed(json.dumps(data[best], ensure_ascii=False)))
        elif best == "text/plain":
            pieces.append(self._printed(_text(data[best])))
        elif best is not None:
            pieces.append(self._without_pictures(_text(data[best])))
        elif not pieces:
            self.told["unknown"] += 1
        return "\n\n".join(pieces)

    def _printed(self, text: str) -> str:
        text = _ESCAPES.sub("", text)
        text = "\n".join(line.rpartition("\r")[2] for line in text.split("\n"))  # what a progress bar left
        return _fenced(self._without_pictures(text.strip("\n")), "") if text.strip() else ""

    def _picture(self, media: str, value: str) -> str:
        self._num_pictures += 1
        self._length += len(value)
        return left_out(media, len(value))

    def _without_pictures(self, text: str) -> str:
        read = without_pictures(Converted(text))
        if read.notes:
            self._num_pictures += read.text.count(" left out: ") - text.count(" left out: ")
            self._length += len(text) - len(read.text)
        return read.text


def _text(value: object) -> str:
    """Return a text that may be written line by line."""
    if isinstance(value, list):
        return "".join(item for item in value if isinstance(item, str))
    return value if isinstance(value, str) else ""


def _fenced(text: str, language: str) -> str:
    fence = "```" if "```" not in text else "~~~~"
    return f"{fence}{language}\n{text}\n{fence}"
