"""What `duolocal sessions` and the chat show of saved contexts. Loads no torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from duolocal.commands.sessions import Listing, One, Removed
from duolocal.errors import SessionError
from duolocal.paths import sessions_folder
from duolocal.sessions.folder import KINDS, ContextFolder, bytes_on_disk, remove
from duolocal.sessions.names import DOCUMENTS, contexts_in, is_saved, no_session, session_path
from duolocal.terminal import figures
from duolocal.terminal.clean import clean_line
from duolocal.terminal.consoles import new_console, print_prose
from duolocal.terminal.tables import fact_table, new_table

_WIDE = 72  # columns; below there is no column for the time
_LEAST_NAME = 8  # columns that a name is cut to at most


def _report(path: Path) -> dict[str, Any]:
    """Return what a saved context says of itself; one that cannot be read says why."""
    report: dict[str, Any] = {"name": path.stem, "path": str(path)}
    try:
        report["bytes"] = bytes_on_disk(path)
        folder = ContextFolder.open(path)
        fields = folder.fields()
        identity = fields.inner("identity")
        documents = fields.array("documents", longest=1 << 20)
        if not all(isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) for item in documents):
            raise fields.wrong("documents", "names and tokens")
        report |= {
            "kind": fields.text("kind"),
            "model": fields.text("model"),
            "tokens": fields.integer("num_tokens", most=1 << 40),
            "turns": fields.integer("num_turns", most=1 << 31),
            "saved": fields.text("saved"),
            "documents": [{"name": name, "tokens": tokens} for name, tokens in documents],
            "read_ahead": fields.integer("read_ahead", most=1 << 40),
            "kv": identity.text("kv"),
            "dtype": identity.text("dtype"),
            "rope": identity.inner("rope").text("shown"),
            "options": fields.texts("options"),
            "rings": len(folder.segments["rings"]),
            "kinds": {kind: folder.kind_bytes(kind) for kind in KINDS},
        }
    except SessionError as error:
        report["error"] = str(error)
    except OSError as error:
        report["error"] = f"{path} cannot be read: {error.strerror or error}"
    return report


def show_list(options: Listing) -> int:
    """List sessions and kept documents; return the exit code."""
    console, folder = new_console(), sessions_folder(options.sessions_folder)
    sessions = [_report(path) for path in contexts_in(folder)]
    documents = [_report(path) for path in contexts_in(folder / DOCUMENTS)]
    if options.json:
        print(json.dumps({"folder": str(folder), "sessions": sessions, "documents": documents}, ensure_ascii=False))
        return 0
    if not sessions and not documents:
        print_prose(console, f"nothing is saved in {clean_line(str(folder))}; chat --session NAME begins a session")
        return 0
    saved = ["<saved (UTC)"] if console.width >= _WIDE else []
    table = new_table("~name", ">tokens", ">turns", ">size", *saved, "~model, documents")
    for report in sessions:
        table.add_row(*_row(report, report["name"], with_time=bool(saved)))
    for report in documents:
        table.add_row(*_row(report, f"{DOCUMENTS}/{report['name']}", with_time=bool(saved)))
    console.print(table)
    total = figures.size(sum(report.get("bytes", 0) for report in (*sessions, *documents)))
    print_prose(console, f"{total} in {clean_line(str(folder))}", "dim")
    return 0


def _row(report: dict[str, Any], name: str, *, with_time: bool) -> list[Text]:
    size = figures.size(report.get("bytes", 0))
    tokens = turns = saved = ""
    if "error" in report:
        about = Text(clean_line(report["error"]), "red")
    else:
        names = ", ".join(item["name"] for item in report["documents"][:4])
        more = f" and {len(report['documents']) - 4} more" if len(report["documents"]) > 4 else ""
        text = f"{report['model']}: {names}{more}" if names else report["model"]
        if report["read_ahead"]:
            text += f" (a reading was stopped after {report['read_ahead']:,} tokens)"
        about = Text(clean_line(text))
        tokens, turns = f"{report['tokens']:,}", str(report["turns"]) if report["kind"] == "session" else ""
        saved = report["saved"].replace("T", " ")[:16]
    cells = (name, tokens, turns, size, *([saved] if with_time else []))
    return [*(Text(clean_line(cell)) for cell in cells), about]


def show_info(one: One, options: Listing) -> int:
    """Show one session; return the exit code. Raises SessionError where there is none or it is damaged."""
    report = _report(_existing(sessions_folder(options.sessions_folder), one.name))
    if options.json:
        print(json.dumps(report, ensure_ascii=False))
        return 1 if "error" in report else 0
    if "error" in report:
        raise SessionError(report["error"])
    table = fact_table()
    table.add_row("session", Text(clean_line(one.name)))
    table.add_row("folder", Text(clean_line(report["path"])))
    table.add_row("size", _sizes(report))
    table.add_row("saved", Text(clean_line(report["saved"])))
    table.add_row("model", Text(clean_line(report["model"])))
    table.add_row("start with", Text(clean_line(" ".join(report["options"]))))
    table.add_row("cache", Text(clean_line(f"KV {report['kv']}, {report['dtype']}, RoPE scaling {report['rope']}")))
    table.add_row("context", f"{figures.tokens(report['tokens'])}, {figures.counted(report['turns'], 'question')}")
    for document in report["documents"]:
        table.add_row("document", Text(clean_line(f"{document['name']}: {figures.tokens(document['tokens'])}")))
    if report["read_ahead"]:
        table.add_row("stopped", f"a reading was stopped after {figures.tokens(report['read_ahead'])}")
    new_console().print(table)
    return 0


def _sizes(report: dict[str, Any]) -> str:
    """Say what takes how much: going back to a turn at once takes a ring, which is large beside a short context."""
    kinds, rings = report["kinds"], report["rings"]
    places = figures.counted(rings, "place")
    return (
        f"{figures.size(report['bytes'])}: keys and values {figures.size(kinds['blocks'])}, recent tokens at {places} "
        f"to go on from {figures.size(kinds['rings'])}, texts and ids {figures.size(kinds['turns'] + kinds['tokens'])}"
    )


def _existing(folder: Path, name: str) -> Path:
    """Return where a session, or a kept document by the name that `list` gives it, is."""
    kept = name.removeprefix(f"{DOCUMENTS}/")
    path = session_path(folder if kept == name else folder / DOCUMENTS, kept)
    if not is_saved(path):
        raise no_session(folder, name)
    return path


def remove_sessions(removed: Removed, options: Listing) -> int:
    """Remove sessions and kept documents, all that are named or none; return the exit code."""
    folder = sessions_folder(options.sessions_folder)
    paths = [_existing(folder, name) for name in removed.names]
    paths += contexts_in(folder / DOCUMENTS) if removed.documents else []
    sizes = {path: bytes_on_disk(path) for path in paths}
    for path in sizes:
        remove(path)
    freed = sum(sizes.values())
    if options.json:
        print(json.dumps({"removed": [str(path) for path in sizes], "bytes": freed}, ensure_ascii=False))
        return 0
    console = new_console()
    for path, size in sizes.items() if len(sizes) > 1 else ():
        console.print(Text(clean_line(f"{path.stem}: {figures.size(size)}")))
    console.print(Text(f"removed {figures.counted(len(sizes), 'saved context')}, {figures.size(freed)}"))
    return 0


def turns_view(rows: Sequence[tuple[int, int | None, str, str, int, str, bool, bool]], *, columns: int) -> Table:
    """List turns: (number, after, kind, name, tokens, lines that end there, on the way here, current).

    Where `columns` are few, names are cut; numbers never are, and marks go on in a further line.
    """
    headings = ("turn", "after", "what", "name", "tokens", "")
    table = new_table(*map("".join, zip(">><<>~", headings, strict=True)))
    shown = [
        (
            str(number),
            "" if after is None else str(after),
            kind,
            clean_line(" ".join(name.split())),
            f"{tokens:,}",
            " ".join(filter(None, ("<- here" if current else "", lines))),
        )
        for number, after, kind, name, tokens, lines, _, current in rows
    ]
    widths = [max(map(cell_len, column)) for column in zip(headings, *shown, strict=True)]
    room = columns - sum(widths) + widths[3] - 2 * (len(widths) - 1)
    for row, cells in zip(rows, shown, strict=True):
        texts = [Text(cell, "" if row[6] else "dim") for cell in cells]
        texts[3].truncate(max(_LEAST_NAME, room), overflow="ellipsis")
        table.add_row(*texts)
    return table
