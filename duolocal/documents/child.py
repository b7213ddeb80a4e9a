"""The process that converts formats, seen from inside: limits first, then one file after the other.

A request is a JSON line {"kind", "num_bytes"} and the bytes; an answer is any number of lines {"done", "total"}, then
one with what was found out, followed by the text in UTF-8. Imports neither torch nor a library before it is needed.
"""

import importlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from duolocal.documents.converted import ConversionError, Converted
from duolocal.errors import one_line
from duolocal.processes import answer_on_stdout, limit_memory, peak_bytes, send

MEMORY_BYTES = 2 * 2**30  # address space of this process
_DEEP = 3000  # Python frames; deeper nesting than any document has ends in RecursionError, not in a crash

_UNWRITABLE = re.compile("[\0\ud800-\udfff]")  # by UTF-8, and by what reads C strings; one character for one

Report = Callable[[int, int], None]
_READERS = {  # module, and what a file of that kind is called
    "html": ("html_text", "a web page"),
    "pdf": ("pdf", "a PDF"),
    "docx": ("docx", "a Word document"),
    "epub": ("epub", "an EPUB book"),
    "xlsx": ("xlsx", "an Excel workbook"),
    "pptx": ("pptx", "a PowerPoint file"),
    "mail": ("mail", "a mail"),
    "mhtml": ("mail", "a saved web page"),
    "notebook": ("notebook", "a Jupyter notebook"),
    "rtf": ("rtf", "a rich-text file"),
    "odt": ("odf", "an OpenDocument text"),
    "ods": ("odf", "an OpenDocument sheet"),
    "odp": ("odf", "an OpenDocument presentation"),
}


def convert_bytes(data: bytes, kind: str, report: Report = lambda done, total: None) -> Converted:
    """Convert in this process, without any limit of time or memory; raises ConversionError."""
    module, called = _READERS[kind]
    try:
        converted: Converted = importlib.import_module(f"duolocal.documents.{module}").convert(data, report)
    except (ConversionError, MemoryError):
        raise
    except RecursionError:
        raise ConversionError(f"is nested deeper than {called} can be: it is damaged or made to harm") from None
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}")[:200]
        raise ConversionError(
            f"cannot be read as {called} ({reason}): it may be damaged; open it elsewhere and save it anew"
        ) from error
    return replace(converted, text=_UNWRITABLE.sub("\ufffd", converted.text))


def main() -> None:
    """Serve requests until stdin ends."""
    replies = answer_on_stdout()
    limit_memory(MEMORY_BYTES, file_bytes=0)
    sys.setrecursionlimit(_DEEP)

    def report(done: int, total: int) -> None:
        send(replies, {"done": done, "total": total})

    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        answer, text = _answer(sys.stdin.buffer.read(request["num_bytes"]), request["kind"], report)
        payload = text.encode()
        send(replies, answer | {"text_bytes": len(payload), "peak_bytes": peak_bytes()}, payload)


def _answer(data: bytes, kind: str, report: Report) -> tuple[dict[str, Any], str]:
    try:
        converted = convert_bytes(data, kind, report)
    except ConversionError as error:
        return {"error": str(error)}, ""
    except MemoryError:
        return {"error": f"needs more than {MEMORY_BYTES // 2**30} GiB of memory to be converted: cut it up"}, ""
    answer = {
        "parts": [(part.label, part.start) for part in converted.parts],
        "notes": converted.notes,
        "encoding": converted.encoding,
        "num_replaced": converted.num_replaced,
    }
    return answer, converted.text
