"""A saved session and the documents it was read from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from duolocal.documents import Document, Part
from duolocal.engine.session import ChatSession
from duolocal.errors import SettingsError
from duolocal.sessions.keeper import ContextKeeper
from duolocal.sessions.names import is_saved, near_names, session_path

# Of what is known of a document's file: field -> its type, as JSON holds it.
_FIELDS = {"encoding": str, "num_bytes": int, "num_replaced": int, "kind": str, "digest": str}


def begin_or_open(
    keeper: ContextKeeper, session: ChatSession, name: str, *, system: str | None
) -> dict[str, Document] | None:
    """Open the session of a name and return its documents, or begin it and return None. Raises DuoLocalError."""
    if not is_saved(session_path(keeper.folder, name)):
        near = near_names(keeper.folder, name)
        keeper.begin(name, session)
        keeper.save(session)
        meant = f" (there is also {', '.join(near)})" if near else ""
        keeper.notes.append(f"session {name} is new{meant}; it is saved after every turn in {keeper.folder}")
        return None
    extra = keeper.open(name, session)
    if system is not None and system != session.system:
        raise SettingsError(
            f"session {name} has another system message: leave --system out, or begin a session of another name"
        )
    return documents_of(session, extra)


def extra_of(files: Mapping[str, Document]) -> dict[str, Any]:
    """Return what a session is saved with besides itself: where the documents came from."""
    return {
        "documents": {
            name: {
                "path": str(document.path),
                "parts": [[part.label, part.start] for part in document.parts],
                "notes": document.notes,
                **{field: getattr(document, field) for field in _FIELDS},
            }
            for name, document in files.items()
        }
    }


def documents_of(session: ChatSession, extra: Mapping[str, Any]) -> dict[str, Document]:
    """Return the documents of a session that was opened, by name, with what is known of their files."""
    known = extra.get("documents")
    found = {}
    for name, text in session.texts:
        about = known.get(name) if isinstance(known, dict) else None
        about = about if isinstance(about, dict) else {}
        fields: dict[str, Any] = {"encoding": "utf-8", "num_bytes": len(text.encode("utf-8", "replace"))}
        fields |= {field: about[field] for field, kind in _FIELDS.items() if isinstance(about.get(field), kind)}
        parts, notes = about.get("parts"), about.get("notes")
        if isinstance(parts, list) and all(map(_is_part, parts)):
            fields["parts"] = tuple(Part(label, start) for label, start in parts)
        if isinstance(notes, list) and all(isinstance(note, str) for note in notes):
            fields["notes"] = tuple(notes)
        path = about.get("path")
        found[name] = Document(name, Path(path if isinstance(path, str) and "\0" not in path else name), text, **fields)
    return found


def _is_part(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int
