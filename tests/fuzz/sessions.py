"""Saved contexts. What opens must be the context that was saved, down to the next answer.

One in three is damaged in its manifest or its turns and then signed anew, so that the checks behind the digests are
reached; of those any context is allowed, and no crash.
"""

import contextlib
import json
import random
import zlib
from pathlib import Path

from duolocal.engine.session import ChatSession, Finished
from duolocal.errors import SessionError
from duolocal.sessions.context import ContextWriter, Origin, check_shapes, open_session, stored_tokens, usable
from duolocal.sessions.folder import ContextFolder, _digest
from duolocal.sessions.identity import compatible, identify
from duolocal.sessions.names import MANIFEST
from duolocal.settings import Sampling
from tests.fuzz.base import Target, Wrong, copy_seed, pick
from tests.fuzz.damage import damaged_bytes, damaged_json, flipped_bits, json_bytes
from tests.session_models import tiny_session
from tests.tokenizer_files import chatml, write

_CONTEXT, _WANTED, _SIGNED = "book.duo", "wanted.json", "signed"
_ORIGIN = Origin("tiny", ("--model", "tiny"))
_GREEDY = Sampling(temperature=0, max_tokens=4)
_DOCUMENTS = [("a.txt", "The mill stood by the river. " * 12), ("b.txt", "Beta. " * 40)]


def make_session_seeds(place: Path) -> None:
    """Write a session, one that was saved many times, one that was stopped while reading, and stored documents."""
    for name in ("talk", "often", "stopped", "documents"):
        folder = place / name
        folder.mkdir()
        write(folder, chatml())
        session = tiny_session(folder, context=640)
        writer = ContextWriter(ContextFolder.create(folder / _CONTEXT), _ORIGIN)
        kind = "documents" if name == "documents" else "session"

        def save(writer: ContextWriter = writer, session: ChatSession = session, kind: str = kind) -> None:
            writer.commit(session, writer.plan(session, kind=kind))

        if name == "stopped":
            events = session.add_documents(_DOCUMENTS)
            for count, _ in enumerate(events):
                if count == 3:
                    save()
                    session.cancel()
        else:
            for event in session.add_documents(_DOCUMENTS):
                assert not isinstance(event, Finished) or event.reason == "loaded"
        if name in ("talk", "often"):
            for question in ("Where?", "Why there?"):
                for _ in session.ask(question, _GREEDY):
                    pass
                if name == "often":
                    save()
            session.undo()
            for _ in session.ask("And when?", _GREEDY):
                pass
        if name != "stopped":
            save()
        writer.close()
        (folder / _WANTED).write_text(json.dumps(_answer(folder)))
        for lock in folder.glob(".*.lock"):
            lock.unlink()


def _answer(place: Path) -> list[int]:
    """Open a context and ask; return all ids. Raises SessionError."""
    session = tiny_session(place, context=640)
    folder = ContextFolder.open(place / _CONTEXT)
    if folder.description.get("kind") == "documents":
        _take_up(folder, session)
        taken = list(session.engine.token_ids)
        return [*taken, _checksum(session), *session.engine.generate(taken[-1:], _GREEDY)]
    open_session(folder, session, name="book", origin=_ORIGIN)
    taken = [*session.engine.token_ids, _checksum(session)]
    for _ in session.add_documents(_DOCUMENTS) if not session.texts else ():
        pass
    for _ in session.ask("What was the last word?", _GREEDY):
        pass
    return [*taken, *session.engine.token_ids]


def _checksum(session: ChatSession) -> int:
    """Return a checksum of all that may be read in the cache: one wrong bit may change an answer much later."""
    cache = session.engine.cache
    held = cache.ring.positions(cache.num_tokens) >= 0
    ring = cache.ring.data[:, :, :, held].contiguous()
    return zlib.crc32(ring.numpy().tobytes(), zlib.crc32(cache.pool.read(0, cache.pool.num_blocks).numpy().tobytes()))


def _take_up(folder: ContextFolder, session: ChatSession) -> None:
    saved = folder.description.get("identity")
    if not isinstance(saved, dict) or not compatible(saved, identify(session.engine, session.tokenizer)):
        raise SessionError(f"{folder.path}: belongs to another start: read again")
    check_shapes(folder, session.engine)
    token_ids = [token for document in session._plan_documents(_DOCUMENTS) for token in document.token_ids]
    taken = usable(folder, stored_tokens(folder, session.engine), [], token_ids, [])
    if taken is None:
        raise SessionError(f"{folder.path}: holds nothing of these documents: read again")
    taken.into(session.engine)


def read_session(folder: Path) -> None:
    """Open a context and ask one question."""
    found = _answer(folder)
    if not (folder / _SIGNED).exists() and found != json.loads((folder / _WANTED).read_text()):
        raise Wrong("a damaged context was opened as another one")


def damage_session(seeds: Path, out: Path, rng: random.Random) -> Path:
    place = copy_seed(pick(seeds, rng), out)
    folder = place / _CONTEXT
    kind = rng.randrange(9)
    if kind < 3:
        _sign_anew(folder, rng)
        (place / _SIGNED).touch()
        return place
    path = folder / MANIFEST if kind < 5 else rng.choice(sorted(folder.iterdir()))
    content = path.read_bytes()
    if kind == 8:
        path.unlink()
        return place
    if kind in (3, 5):
        content = damaged_bytes(content, rng)
    elif kind in (4, 6):
        content = flipped_bits(content, rng)
    elif rng.random() < 0.5:
        content = content[: rng.randrange(len(content))]
    else:
        content += rng.choice((b"\0", content, rng.randbytes(100)))
    path.write_bytes(content)
    return place


def _sign_anew(folder: Path, rng: random.Random) -> None:
    """Damage the manifest, or the turns, and have the checksums fit."""
    value = json.loads((folder / MANIFEST).read_bytes())
    description, segments = value["description"], value["segments"]
    if segments["turns"] and rng.random() < 0.4:
        entry = rng.choice(segments["turns"])
        data = json_bytes(damaged_json(json.loads((folder / entry[0]).read_bytes()), rng), rng)
        (folder / entry[0]).write_bytes(data)
        entry[2:] = [len(data), zlib.crc32(data)]
    elif rng.random() < 0.4:
        segments = damaged_json(segments, rng)
    else:
        part = rng.choice([key for key in ("identity", "tree") if description[key] is not None])
        if rng.random() < 0.7:
            description[part] = damaged_json(description[part], rng)
        else:
            description = damaged_json(description, rng)
    value |= {"description": description, "segments": segments}
    with contextlib.suppress(RecursionError):
        value["sha256"] = _digest(description, segments)
    (folder / MANIFEST).write_bytes(json_bytes(value, rng))


SESSION = Target("session", "session", damage_session, read_session)
