"""The Keeper of a chat: a named session saved after every turn, checkpoints while documents are read, reuse.

Owns when something is written and where; what is written is `context`'s. It never raises while a session works: what
went wrong is a note, and the work goes on.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from duolocal.engine.session import ChatSession
from duolocal.engine.turns import Turn
from duolocal.errors import SessionError, SettingsError
from duolocal.sessions.context import (
    MIN_RINGS,
    ContextWriter,
    Origin,
    TakenUp,
    check_shapes,
    load_ring,
    open_session,
    stored_tokens,
    usable,
)
from duolocal.sessions.folder import ContextFolder, new_bytes, remove
from duolocal.sessions.identity import identify
from duolocal.sessions.names import is_saved, make_folder, no_session, session_path
from duolocal.sessions.store import DocumentStore

EVERY_S = 2.0  # seconds of reading between two checkpoints, at least
WORTH_S = 10.0  # what takes less time to read is not stored unasked
SHARE = 0.02  # of the time of reading that checkpoints may take


class ContextKeeper:
    """Keeps one chat's context in files.

    store: where documents that take long to read are kept unasked; None for nowhere. every_s, worth_s, share: as
    EVERY_S, WORTH_S and SHARE. notes: lines for people, to be shown and cleared by whoever shows. extra: of the chat,
    saved with a session.
    """

    def __init__(
        self,
        folder: Path,
        origin: Origin,
        *,
        store: DocumentStore | None = None,
        every_s: float = EVERY_S,
        worth_s: float = WORTH_S,
        share: float = SHARE,
        extra: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self.folder = folder
        self.name: str | None = None  # of the session that is kept up to date
        self.notes: list[str] = []
        self.extra = extra
        self.origin = origin
        self._store = store
        self._every_s, self._worth_s, self._share = every_s, worth_s, share
        self._session: ContextWriter | None = None
        self._next: tuple[str, ContextWriter] | None = None  # a session that `save` will go over to
        self._document: ContextWriter | None = None  # the store's file for what is being read
        self._reading_since: float | None = None
        self._read_from = 0  # tokens in the context then
        self._storing = False  # whether what is being read may go into the store
        self._due = 0.0
        self._total = 0  # tokens in the context when the reading is done
        self._num_documents = 0  # that are being read

    # --- named sessions --------------------------------------------------------------------------------------------

    def open(self, name: str, session: ChatSession) -> Mapping[str, Any]:
        """Make the saved session `name` the one that runs and is kept; returns the `extra` it was saved with.

        Raises SessionError, SettingsError or ContextOverflowError; then the session is what it was, unless said.
        """
        path = session_path(self.folder, name)
        if not is_saved(path):
            raise no_session(self.folder, name)
        if self._session is not None and self._session.folder.path == path:
            raise SettingsError(f"session {name} is the one that is open; /goto goes to an earlier turn of it")
        folder = ContextFolder.open(path, writable=True)
        before, self._session = self._session, None  # not to be overwritten by what happens on the way
        had = session.engine.position
        try:
            writer = open_session(folder, session, name=name, origin=self.origin)
        except BaseException:
            folder.close()
            if had == session.engine.position:
                self._session = before
            raise
        if before is not None:
            before.close()
        self._session, self.name = writer, name
        extra = folder.description.get("extra")
        return extra if isinstance(extra, dict) else {}

    @property
    def num_ahead(self) -> int:
        """Tokens of a reading that was stopped, which the open session has on disk and not in its context."""
        return 0 if self._session is None else self._session.num_ahead

    def begin(self, name: str, session: ChatSession, *, overwrite: bool = False) -> int:
        """Return the bytes that saving the session as `name` will write; the next `save` does it.

        Raises SettingsError for a name that is taken or none, SessionError where the disk has no room.
        """
        path = session_path(self.folder, name)
        if self._session is not None and self._session.folder.path == path:
            writer = self._session
        elif path.is_file():
            raise SettingsError(
                f"session {name} was saved by an older duolocal: choose another name, or remove it first"
            )
        elif is_saved(path) and not overwrite:
            raise SettingsError(f"there is a session {name} already: choose another name, or /save --force {name}")
        else:
            make_folder(self.folder)
            writer = ContextWriter(ContextFolder.create(path), self.origin)
        wanted = writer.plan(session, kind="session", extra=self.extra())
        try:
            writer.folder.check_space(wanted.segments)
        except SessionError:
            if writer is not self._session:
                writer.close()
            raise
        self._next = None if writer is self._session else (name, writer)
        return new_bytes(wanted.segments)

    def save(self, session: ChatSession) -> int:
        """Bring the session's file up to date; returns its size in bytes. Raises SessionError."""
        following, self._next = self._next, None
        writer = self._session if following is None else following[1]
        assert writer is not None
        try:
            writer.commit(session, writer.plan(session, kind="session", extra=self.extra()))
        except SessionError:
            if writer is not self._session:
                writer.close()
            raise
        if following is not None:
            if self._session is not None:
                self._session.close()
            self.name, self._session = following
        return writer.folder.nbytes

    def close(self) -> None:
        """Let go of all files."""
        for writer in (self._session, self._document):
            if writer is not None:
                writer.close()
        self._session = self._document = self.name = None

    # --- what a session calls --------------------------------------------------------------------------------------

    def look_up(
        self, session: ChatSession, token_ids: Sequence[int], ends: Sequence[int]
    ) -> tuple[str, dict[int, Tensor]] | None:
        """See `duolocal.engine.session.Keeper`."""
        self._end_reading()
        self._reading_since = time.perf_counter()
        self._due = self._reading_since + self._every_s
        self._read_from = session.engine.position
        self._total = session.engine.position + len(token_ids)
        self._num_documents = len(ends)
        # Only documents, and no conversation, are kept unasked.
        self._storing = self._store is not None and all(turn.kind != "exchange" for turn in session.tree.current.way())
        try:
            found = self._in_session(session, token_ids, ends) or self._in_store(session, token_ids, ends)
        except SessionError as error:
            self.notes.append(str(error))
            return None
        if found is None:
            return None
        origin, taken, writer = found
        engine, base = session.engine, session.engine.position
        block_size = engine.cache.layout.block_size
        try:
            if base:
                taken.check(engine, base // block_size)
            there = taken.folder.segments["rings"]
            passed = [ring for ring in there if ring.count in ends and base < ring.count <= taken.num_tokens]
            rings = {ring.count: load_ring(taken.folder, ring, engine) for ring in passed}
            taken.into(engine, keep=base, ring=rings.get(taken.num_tokens))
            self._read_from = taken.num_tokens
        except SessionError as error:
            self.notes.append(f"{error}")
            if writer is not self._session:
                writer.close()
                self._document = None
            return None
        self.notes.append(
            f"{taken.num_tokens - base:,} of {len(token_ids):,} tokens were read before: opened from {origin}"
        )
        whole = taken.num_tokens // block_size
        if writer is self._session or base < block_size:
            writer.adopt(engine, whole)
            for ring in passed:
                writer.adopt_ring(rings[ring.count], ring)
        if writer is not self._session:
            if self._session is None and self._storing and taken.num_tokens == len(taken.token_ids):
                self._document = writer  # what is read after it is added to the same file
            else:
                writer.close()
        return origin, rings

    def chunk_read(self, session: ChatSession) -> None:
        """See `duolocal.engine.session.Keeper`."""
        if self._reading_since is None or time.perf_counter() < self._due:
            return
        if session.engine.position < self._total and (self._session or self._document or self._is_long(session)):
            self._checkpoint(session)  # at the end of all there will be a turn to save

    def turn_added(self, session: ChatSession, turn: Turn) -> None:
        """See `duolocal.engine.session.Keeper`."""
        notes = len(self.notes)
        reading, self._reading_since = self._reading_since, None
        if self._session is not None:
            ahead, before = self._session.num_ahead, self._session.token_ids
            self._keep_session(session)
            if ahead and self._session.token_ids[: len(before)] != before:
                self.notes.append(f"the {ahead:,} tokens of the reading that was stopped are not kept any more")
        elif reading is not None and (self._document is not None or time.perf_counter() - reading >= self._worth_s):
            self._keep_document(session)
        kept = self._session or self._document
        if reading is not None and session.engine.position > turn.end and kept is not None and len(self.notes) == notes:
            self.notes.append(f"{session.engine.position:,} tokens are kept: the same command goes on from there")
        self._end_reading()

    def forgotten(self, session: ChatSession) -> None:
        """See `duolocal.engine.session.Keeper`."""
        self._reading_since = None
        self._end_reading()
        if self._session is not None:  # what took hours to read is not thrown away with it
            self.notes.append(f"session {self.name} stays as it was saved; this chat has no name now")
            self._session.close()
            self._session = self.name = None

    # --- inside ----------------------------------------------------------------------------------------------------

    def _is_long(self, session: ChatSession) -> bool:
        """Whether reading is going to take long enough to be stored, by what it took so far."""
        assert self._reading_since is not None
        done = session.engine.position - self._read_from
        needed_s = (time.perf_counter() - self._reading_since) * (self._total - self._read_from) / max(1, done)
        return needed_s >= self._worth_s

    def _checkpoint(self, session: ChatSession) -> None:
        began = time.perf_counter()
        if self._session is not None:
            self._keep_session(session)
        else:
            self._keep_document(session)
        now = time.perf_counter()
        self._due = now + max(self._every_s, (now - began) / self._share)

    def _keep_session(self, session: ChatSession) -> None:
        try:
            self.save(session)
        except SessionError as error:
            self.notes.append(f"not saved: {error}")

    def _keep_document(self, session: ChatSession) -> None:
        """Bring the store's file for what is being read up to date; begin one where there is none."""
        if not self._storing or self._store is None:
            return
        try:
            if self._document is None:
                needed = self._needed_bytes(session)
                folder = self._store.begin(needed)
                if folder is None:
                    self._storing = False
                    self.notes.append(
                        f"what is read is not kept for next time: it takes {needed / 1e6:,.0f} MB, too much for the "
                        f"store ({self._store.limit / 1e6:,.0f} MB) or the disk; --keep SIZE changes the store, "
                        "--session NAME keeps it under a name"
                    )
                    return
                self._document = ContextWriter(folder, self.origin)
                self.notes.append(
                    f"kept for next time in {self._store.place} ({needed / 1e6:,.0f} MB, readable by you alone); "
                    "--keep off keeps nothing"
                )
            wanted = self._document.plan(session, kind="documents")
            held = self._document.folder.description
            if any(held.get(key) != wanted.description[key] for key in ("num_tokens", "read_ahead")):
                self._document.commit(session, wanted)
                self._store.shrink_to(self._store.limit, keep=self._document.folder.path)
        except SessionError as error:
            self._storing = False
            self.notes.append(f"what is read is not kept for next time: {error}")
            self._end_reading()

    def _needed_bytes(self, session: ChatSession) -> int:
        engine = session.engine
        blocks = self._total // engine.cache.layout.block_size * engine.plan.num_retrieval
        rings = min(MIN_RINGS, self._num_documents) * engine.cache.ring.nbytes
        return blocks * engine.cache.layout.record_bytes + rings + 4 * self._total

    def _end_reading(self) -> None:
        if self._document is not None:
            self._document.close()
            self._document = None

    def _in_session(
        self, session: ChatSession, token_ids: Sequence[int], ends: Sequence[int]
    ) -> tuple[str, TakenUp, ContextWriter] | None:
        """Return what the session's own file holds of a reading that was stopped."""
        if self._session is None:
            return None
        taken = usable(self._session.folder, self._session.token_ids, session.engine.token_ids, token_ids, ends)
        return None if taken is None else (f"session {self.name}", taken, self._session)

    def _in_store(
        self, session: ChatSession, token_ids: Sequence[int], ends: Sequence[int]
    ) -> tuple[str, TakenUp, ContextWriter] | None:
        """Return the longest beginning of what is to be read that the store has."""
        if self._store is None:
            return None
        before = session.engine.token_ids
        best: TakenUp | None = None
        for path in self._store.candidates(identify(session.engine, session.tokenizer)):
            try:
                folder = ContextFolder.open(path, writable=True)
            except SessionError:
                continue  # another process reads or writes it
            try:
                check_shapes(folder, session.engine)
                taken = usable(folder, stored_tokens(folder, session.engine), before, token_ids, ends)
            except SessionError:
                folder.close()
                with contextlib.suppress(SessionError):
                    remove(path)  # damaged, and it can be made again
                continue
            if taken is not None and (best is None or taken.num_tokens > best.num_tokens):
                if best is not None:
                    best.folder.close()
                best = taken
            else:
                folder.close()
        if best is None:
            return None
        self._store.touch(best.folder.path)
        return "the store of documents", best, ContextWriter(best.folder, self.origin)
