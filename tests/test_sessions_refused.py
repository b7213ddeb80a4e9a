"""A saved context that belongs to another model or other choices is refused: what differs, what to start with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from duolocal.engine.session import ChatSession
from duolocal.errors import DuoLocalError
from duolocal.heads import HeadPlan
from duolocal.models.config import RopeScaling
from duolocal.models.outer_weights import OuterChange, OuterQuantized
from duolocal.sessions.context import Origin
from duolocal.sessions.identity import compatible
from duolocal.sessions.keeper import ContextKeeper
from tests.session_models import GREEDY, PLAN, finish, in_context, tiny_session


def keeper_for(folder: Path, *options: str) -> ContextKeeper:
    return ContextKeeper(folder, Origin("tiny", ("--model", "tiny", *options)))


def save(folder: Path, session: ChatSession, *options: str) -> None:
    finish(session.ask("Where did the mill stand?", GREEDY))
    keeper = keeper_for(folder, *options)
    keeper.begin("book", session)
    keeper.save(session)
    keeper.close()


def refusal(folder: Path, session: ChatSession, *options: str) -> str:
    with pytest.raises(DuoLocalError) as caught:
        keeper_for(folder, *options).open("book", session)
    assert in_context(session) == []
    message = str(caught.value)
    assert message.isprintable()
    return message


OTHER_PLAN = HeadPlan(((True, True), (False, True)), sink_size=4, recent_size=64, source="test")


@pytest.mark.parametrize(
    ("saved", "now", "options", "message"),
    [
        ({}, {"kv": "int4"}, (), "KV format int8 (now int4): start with --kv int8"),
        ({}, {"seed": 3}, (), "other weights (tiny): start with --model tiny"),
        ({"fingerprint": "a" * 64}, {}, ("--weights", "nf4"), "start with --model tiny --weights nf4"),
        ({}, {"dtype": torch.float64}, (), "compute type float32 (now float64): start with --dtype float32"),
        (
            {},
            {"plan": OTHER_PLAN},
            ("--heads", "0.5"),
            "2 of 4 retrieval heads, sink 4, recent 64 (now 3 of 4 retrieval heads, sink 4, recent 64): "
            "start with --heads 0.5",
        ),
        ({}, {"plan": replace(PLAN, sink_size=5)}, (), "(now 2 of 4 retrieval heads, sink 5, recent 64)"),
        ({}, {"plan": replace(PLAN, recent_size=65)}, (), "(now 2 of 4 retrieval heads, sink 4, recent 65)"),
        (
            {},
            {"rope_scaling": RopeScaling("linear", 2.0)},
            ("--rope", "none"),
            "RoPE scaling none (now linear factor 2.0): start with --rope none",
        ),
        ({}, {"rope_theta": 20000.0}, (), "saved with another RoPE: start with --context 2K, or"),
        (
            {"rope_scaling": RopeScaling("dynamic"), "context": 8192},
            {"rope_scaling": RopeScaling("dynamic"), "context": 12288},
            (),
            "RoPE scaling dynamic factor 2.0 (now dynamic factor 3.0): start with --context 8K",
        ),
    ],
)
def test_what_differs_is_named(
    saved: dict[str, Any], now: dict[str, Any], options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    save(tmp_path, tiny_session(tmp_path, **saved), *options)
    said = refusal(tmp_path, tiny_session(tmp_path, **now))
    assert said.startswith("session book was saved with ")
    assert message in said
    assert said.endswith("or read the documents again") or said.endswith(": read the documents again")
    keeper_for(tmp_path).open("book", tiny_session(tmp_path, **saved))  # and as it was saved it opens


def test_all_that_differs_is_in_one_line(tmp_path: Path) -> None:
    save(tmp_path, tiny_session(tmp_path))
    said = refusal(tmp_path, tiny_session(tmp_path, kv="16", dtype=torch.float64, plan=replace(PLAN, sink_size=9)))
    assert "sink 4, recent 64 (now" in said and "KV format int8 (now 16)" in said and "float32 (now float64)" in said
    assert "start with --kv int8, --dtype float32, or" in said


def test_another_tokenizer_or_template_is_refused(tmp_path: Path) -> None:
    save(tmp_path, tiny_session(tmp_path))
    other = tiny_session(tmp_path)
    other.tokenizer.fingerprint = "0" * 64
    assert "another tokenizer or chat template" in refusal(tmp_path, other)
    other = tiny_session(tmp_path)
    other.tokenizer._parts = replace(other.tokenizer._parts, template=f"{other.tokenizer._parts.template} ")
    assert "another tokenizer or chat template" in refusal(tmp_path, other)


def with_outer(session: ChatSession, wanted: str, before: str = "bf16") -> ChatSession:
    """Give the model what `--outer-weights` leaves in its source; the fingerprint stays, as there."""
    source = session.engine.source
    assert source is not None
    after = {"int8": "Q8_0", "int4": "Q4_1"}[wanted]
    change = OuterChange("lm_head", before, after, 10, 5)  # type: ignore[arg-type]
    session.engine.source = replace(source, tensors=OuterQuantized(source.tensors, wanted, {"lm_head.weight": change}))
    return session


def test_outer_weights_count(tmp_path: Path) -> None:
    save(tmp_path, with_outer(tiny_session(tmp_path), "int8"), "--outer-weights", "int8")
    said = refusal(tmp_path, tiny_session(tmp_path))
    assert "lm_head and embedding as f32 and Q8_0 (now f32 and f32): start with --outer-weights int8" in said
    assert "(now f32 and Q4_1)" in refusal(tmp_path, with_outer(tiny_session(tmp_path), "int4"))
    twice = with_outer(tiny_session(tmp_path), "int8", before="Q8_1")
    assert "(now f32 and Q8_0 of Q8_1)" in refusal(tmp_path, twice)
    keeper_for(tmp_path).open("book", with_outer(tiny_session(tmp_path), "int8"))


def test_a_context_of_another_length_opens_where_it_fits(tmp_path: Path) -> None:
    save(tmp_path, tiny_session(tmp_path, context=2048))
    for context in (64, 4096):
        session = tiny_session(tmp_path, context=context, chunk_size=3)
        keeper_for(tmp_path).open("book", session).keys()
        assert session.engine.position > 0


@pytest.mark.parametrize("wrong", [10**400, -(10**400), float("nan"), float("inf"), True, None, "1", [1.0]])
def test_numbers_that_are_no_frequencies_are_another_rope(wrong: object) -> None:
    """A JSON integer may be larger than any float."""
    now = {"rope": {"frequencies": [1.0, 0.5], "scale": 1.0}}
    assert compatible(now, now)
    assert not compatible({"rope": {"frequencies": [1.0, wrong], "scale": 1.0}}, now)
    assert not compatible({"rope": {"frequencies": [1.0, 0.5], "scale": wrong}}, now)
