"""Sessions of very many documents: nothing grows with the square of their number."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from torch import Tensor

from duolocal.engine.session import ChatSession
from duolocal.heads import HeadPlan
from duolocal.sessions.context import Origin
from duolocal.sessions.folder import ContextFolder
from duolocal.sessions.keeper import ContextKeeper
from tests.session_models import GREEDY, PLAN, finish, in_context, tiny_session

STREAMING = HeadPlan(((False, False), (False, False)), sink_size=4, recent_size=16, source="test")
ORIGIN = Origin("tiny", ("--model", "tiny"))


class ReadsAtOnce(ContextKeeper):
    """Reads all documents in chunks that know no documents, as if they were found in a store."""

    def look_up(
        self, session: ChatSession, token_ids: Sequence[int], ends: Sequence[int]
    ) -> tuple[str, dict[int, Tensor]]:
        for _ in session.engine.prefill(token_ids):
            pass
        return "one go", {}


def texts_of(value: object) -> Iterator[str]:
    """Yield every text in a value and what it holds; a turn's parent is not in it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from texts_of(inner)
    elif hasattr(value, "__dataclass_fields__"):
        yield from texts_of([inner for name, inner in vars(value).items() if name != "parent"])


@pytest.mark.parametrize(("count", "plan"), [(2000, STREAMING), (60, PLAN)])
def test_a_session_of_very_many_documents_opens(count: int, plan: HeadPlan, tmp_path: Path) -> None:
    documents = [(f"{at}.txt", f"Note {at}.") for at in range(count)]
    num_characters = sum(len(name) + len(text) for name, text in documents)
    session = tiny_session(tmp_path, context=1 << 18, chunk_size=4096, plan=plan)
    kind = ReadsAtOnce if plan is STREAMING else ContextKeeper
    keeper = session.keeper = kind(tmp_path / "sessions", ORIGIN)
    keeper.begin("many", session)
    keeper.save(session)
    finish(session.add_documents(documents))
    finish(session.ask("Which?", GREEDY))
    assert keeper.notes == []
    keeper.close()
    assert sum(map(len, texts_of(list(session.tree.turns.values())))) < num_characters + 30 * count
    folder = ContextFolder.open(tmp_path / "sessions" / "many.duo")
    assert folder.kind_bytes("turns") < num_characters + 8 * session.engine.position + 200 * count
    other = tiny_session(tmp_path, context=1 << 18, plan=plan)
    ContextKeeper(tmp_path / "sessions", ORIGIN).open("many", other)
    assert in_context(other) == in_context(session)
    assert other.texts == documents
    assert other.messages == session.messages
