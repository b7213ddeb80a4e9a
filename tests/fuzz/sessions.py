"""Files of saved contexts. What opens must be the context that was saved, down to the next answer.

One in three files is damaged in its description alone and then signed anew, so that the checks behind the digest are
reached; of those any context is allowed, and no crash.
"""

import json
import random
import zlib
from pathlib import Path

from duolocal.engine.session import ChatSession, Finished
from duolocal.errors import SessionError
from duolocal.sessions.context import ContextWriter, Origin, check_shapes, open_session, usable
from duolocal.sessions.file import ContextFile
from duolocal.sessions.identity import compatible, identify
from duolocal.sessions.layout import ALIGNMENT, SLOT_BYTES, SLOTS, slot_bytes
from duolocal.settings import Sampling
from tests.fuzz.base import Target, Wrong, copy_seed, pick
from tests.fuzz.damage import damaged_bytes, damaged_json, flipped_bits, json_bytes, set_number
from tests.session_models import tiny_session
from tests.tokenizer_files import chatml, write

_FILE, _WANTED, _SIGNED = "book.duo", "wanted.json", "signed"
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
        writer = ContextWriter(ContextFile.create(folder / _FILE), _ORIGIN)
        kind = "documents" if name == "documents" else "session"

        def save(writer: ContextWriter = writer, session: ChatSession = session, kind: str = kind) -> None:
            writer.commit(session.engine, writer.plan(session, kind=kind))

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


def _answer(folder: Path) -> list[int]:
    """Open a file and ask; return all ids. Raises SessionError."""
    session = tiny_session(folder, context=640)
    file = ContextFile.open(folder / _FILE)
    assert file.opened is not None
    try:
        if file.opened.description.get("kind") == "documents":
            _take_up(file, session)
            taken = list(session.engine.token_ids)
            return [*taken, _digest(session), *session.engine.generate(taken[-1:], _GREEDY)]
        open_session(file, session, name="book", origin=_ORIGIN)
        taken = [*session.engine.token_ids, _digest(session)]
        for _ in session.add_documents(_DOCUMENTS) if not session.texts else ():
            pass
        for _ in session.ask("What was the last word?", _GREEDY):
            pass
    finally:
        file.close()
    return [*taken, *session.engine.token_ids]


def _digest(session: ChatSession) -> int:
    """Return a checksum of all that may be read in the cache: one wrong bit may change an answer much later."""
    cache = session.engine.cache
    held = cache.ring.positions(cache.num_tokens) >= 0
    ring = cache.ring.data[:, :, :, held].contiguous()
    return zlib.crc32(ring.numpy().tobytes(), zlib.crc32(cache.pool.read(0, cache.pool.num_blocks).numpy().tobytes()))


def _take_up(file: ContextFile, session: ChatSession) -> None:
    assert file.opened is not None
    saved = file.opened.description.get("identity")
    if not isinstance(saved, dict) or not compatible(saved, identify(session.engine, session.tokenizer)):
        raise SessionError(f"{file.path}: belongs to another start: read again")
    check_shapes(file, session.engine)
    token_ids = [token for document in session._plan_documents(_DOCUMENTS) for token in document.token_ids]
    taken = usable(file, [], token_ids, [])
    if taken is None:
        raise SessionError(f"{file.path}: holds nothing of these documents: read again")
    taken.into(session.engine)


def read_session(folder: Path) -> None:
    """Open a file and ask one question."""
    found = _answer(folder)
    if not (folder / _SIGNED).exists() and found != json.loads((folder / _WANTED).read_text()):
        raise Wrong("a damaged file was opened as another context")


def damage_session(seeds: Path, out: Path, rng: random.Random) -> Path:
    folder = copy_seed(pick(seeds, rng), out)
    path = folder / _FILE
    content = path.read_bytes()
    kind = rng.randrange(9)
    if kind < 3:
        content = _signed(content, rng)
        (folder / _SIGNED).touch()
    elif kind == 3:
        content = damaged_bytes(content, rng, head=ALIGNMENT)
    elif kind == 4:  # a number of the header
        at = rng.choice((16, *(slot + field for slot in SLOTS for field in (0, 8, 16))))
        content = set_number(content, at, 4 if at == 16 else 8, rng)
    elif kind == 5:
        content = flipped_bits(content, rng)
    elif kind == 6:
        content = content[: rng.choice((rng.randrange(len(content)), len(content) - rng.randrange(1, 5000)))]
    elif kind == 7:
        content += rng.choice((b"\0", content, rng.randbytes(100), bytes(ALIGNMENT)))
    else:
        offset, length = _description(content)[1:3]
        content = content[:offset] + damaged_bytes(content[offset : offset + length], rng) + content[offset + length :]
    path.write_bytes(content)
    return folder


def _description(content: bytes) -> tuple[int, int, int]:
    """Return the slot that counts, and offset and length of the description."""
    slot = max(SLOTS, key=lambda at: int.from_bytes(content[at : at + 8], "little"))
    offset, length = (int.from_bytes(content[slot + at : slot + at + 8], "little") for at in (8, 16))
    return slot, offset, length


def _signed(content: bytes, rng: random.Random) -> bytes:
    slot, offset, length = _description(content)
    value = json.loads(content[offset : offset + length])
    if rng.random() < 0.8:  # in one part, or the large ones would take it all
        part = rng.choice(("index", "description", "chat", "identity"))
        holder = value if part in value else value["description"]
        holder[part] = damaged_json(holder[part], rng) if holder[part] is not None else rng.choice(([], {}, 3))
    else:
        value = damaged_json(value, rng)
    data = json_bytes(value, rng)
    at = -(-len(content) // ALIGNMENT) * ALIGNMENT
    signed = slot_bytes(int.from_bytes(content[slot : slot + 8], "little") + 1, at, data)
    assert len(signed) == SLOT_BYTES
    return content[:slot] + signed + content[slot + SLOT_BYTES :].ljust(at - slot - SLOT_BYTES, b"\0") + data


SESSION = Target("session", "session", damage_session, read_session)
