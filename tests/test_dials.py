"""Automatic settings: the best measured quality that fits, never what was fixed, the same for planner and engine."""

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from duolocal import cli
from duolocal.engine import engine as engine_module
from duolocal.engine import planning
from duolocal.engine.automatic import choose, fit
from duolocal.engine.engine import Engine
from duolocal.engine.known_model import OpenedModel, known_model
from duolocal.engine.measured import Measured, measured, remember_kv
from duolocal.engine.planning import Planned, plan_settings
from duolocal.engine.resolve import resolve
from duolocal.errors import MemoryLimitError
from duolocal.heads import HeadPlan, choose_heads
from duolocal.models.loader import open_model
from duolocal.models.names import MODELS
from duolocal.plan.dials import (
    FREE_OF_COST,
    KEPT_BACK,
    LITTLE_KL,
    Cost,
    Dials,
    Solution,
    Space,
    smaller_chunks,
    solve,
    usable,
    with_kept_back,
)
from duolocal.plan.fitting import Free, fits, offloaded
from duolocal.plan.memory import GIB, plan_memory
from duolocal.plan.request import Request
from duolocal.plan.weights import weights_by_arithmetic
from duolocal.quant.kv import kv_layout
from duolocal.settings import FirstUse, LoadSettings
from tests.tiny import save_checkpoint

LLAMA = MODELS["llama3-8b-awq"].config
BF16 = torch.bfloat16


def cut(share: float) -> HeadPlan:
    return choose_heads(share, num_layers=32, num_kv_heads=8, fingerprint=None, can_rank=True).plan


PLANS: dict[float | None, HeadPlan] = {None: cut(1.0), **{share: cut(share) for share in (0.75, 0.5, 0.25)}}
WEIGHTS = {
    name: weights_by_arithmetic(
        LLAMA, layers="AWQ", outer="F16", kernels="triton", dtype=BF16, device="cuda", outer_weights=name
    )
    for name in ("auto", "int8", "int4")
}


def request_of(dials: Dials, context: int = 2**19) -> Request:
    return Request(
        config=LLAMA,
        heads=PLANS[dials.heads],
        layout=kv_layout(dials.kv, head_dim=128, dtype=BF16),
        weights=WEIGHTS[dials.outer],
        context=context,
        chunk_size=dials.chunk_size,
        dtype=BF16,
        kernels="triton",
        device="cuda",
        outer="memory",
    )


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """Draw which dials are fixed, and what was measured: not always that fewer bits cost more."""

    def dial(values: list[Any]) -> dict[Any, Cost]:
        first = draw(st.integers(0, len(values) - 1))
        kept = values[first:] if draw(st.booleans()) else [values[first]]
        kl = st.sampled_from([0.0, 0.0001, 0.004, 0.015, 0.02, 0.05, 0.3])
        costs: dict[Any, Cost] = {value: Cost(draw(kl), 0.0, draw(st.booleans())) for value in kept}
        return costs

    chunks = smaller_chunks(4096) if draw(st.booleans()) else [4096]
    return Space(
        dial([None, 0.75, 0.5, 0.25]), dial(["16", "int8", "k8v4", "int4"]), dial(["auto", "int8", "int4"]), chunks
    )


def feasible(space: Space, free: Free) -> list[tuple[float, bool, Dials]]:
    """Return (loss, beyond the device, dials) of every combination that has room, found one by one."""
    found = []
    for heads, kv, outer, chunk in itertools.product(space.heads, space.kv, space.outer, space.chunk_sizes):
        dials = Dials(heads, kv, outer, chunk)
        request = request_of(dials)
        if fits(plan_memory(request), free):
            found.append((space.loss(dials), False, dials))
        elif next(offloaded(request, free), None) is not None:
            found.append((space.loss(dials), True, dials))
    return found


def beyond(solution: Solution) -> bool:
    return plan_memory(solution.request).offloaded


@given(spaces(), st.integers(4 * 16, 48 * 16), st.sampled_from([0, 8, 64]))
def test_the_choice_is_the_best_of_all(space: Space, sixteenths: int, host: int) -> None:
    free = Free(sixteenths * GIB // 16, host * GIB)
    solution = solve(space, request_of, free)
    roomy = feasible(space, usable(free))
    if solution is None:
        assert not roomy and not any(not far for _, far, _ in feasible(space, free))
        return
    dials = solution.dials
    assert dials.heads in space.heads and dials.kv in space.kv and dials.outer in space.outer
    assert fits(plan_memory(solution.request), free)
    placed = replace(request_of(dials), kv_device_memory=solution.request.kv_device_memory)
    assert solution.request == placed
    little = [loss for loss, far, _ in roomy if not far and loss <= LITTLE_KL]
    much = [loss for loss, _, _ in roomy if loss > LITTLE_KL]
    most = max(loss for rung in space.rungs if (loss := space.loss(rung)) <= LITTLE_KL)
    if little:  # on the device, and nothing that costs less has room there
        assert not beyond(solution) and space.loss(dials) == min(little)
        largest = [one.chunk_size for loss, far, one in roomy if not far and replace(one, chunk_size=0) == _bare(dials)]
        assert dials.chunk_size == max(largest)
    elif any(far and loss == most for loss, far, _ in roomy):  # beyond it, the same that costs little
        assert beyond(solution) and space.loss(dials) == most
    elif much:
        assert space.loss(dials) == min(much)
    else:
        every = itertools.product(space.heads, space.kv, space.outer, space.chunk_sizes)
        totals = [plan_memory(request_of(Dials(*values))).total for values in every]
        assert plan_memory(request_of(dials)).total == min(totals)


def _bare(dials: Dials) -> Dials:
    return replace(dials, chunk_size=0)


@given(spaces(), st.integers(4 * 16, 48 * 16), st.integers(0, 8 * 16), st.sampled_from([0, 8, 64]))
def test_more_memory_is_never_worse(space: Space, sixteenths: int, more: int, host: int) -> None:
    less = solve(space, request_of, Free(sixteenths * GIB // 16, host * GIB))
    if less is not None:
        better = solve(space, request_of, Free((sixteenths + more) * GIB // 16, host * GIB))
        assert better is not None and space.loss(better.dials) <= space.loss(less.dials)


def test_half_a_gibibyte_is_kept_back_and_of_a_small_device_less() -> None:
    assert [Free(n * GIB).device - usable(Free(n * GIB)).device for n in (4, 8, 24)] == [GIB // 4, KEPT_BACK, KEPT_BACK]
    for needed in (1, 1000, 300 << 20, 7 * GIB, 30 * GIB):
        assert usable(Free(with_kept_back(needed))).device >= needed > usable(Free(with_kept_back(needed) - 17)).device


# --- what may be chosen, and what is known of it ---------------------------------------------------------------------


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("COLUMNS", "500")


def planned(memory: int, **settings: Any) -> Planned:
    card = None if settings.get("device") == "cpu" else "rtx4090"
    return plan_settings(LoadSettings("llama3-8b-awq", **settings), memory=memory * GIB, card=card)


@given(
    st.integers(3, 60),
    st.sampled_from(["auto", "all", "0.5", "published@0.25"]),
    st.sampled_from(["auto", "16", "int8", "int4"]),
    st.sampled_from(["auto", "int8"]),
    st.sampled_from([None, 1024]),
)
def test_what_was_fixed_is_never_changed(memory: int, heads: str, kv: str, outer: str, chunk: int | None) -> None:
    found = planned(memory, context=2**20, heads=heads, kv=kv, outer_weights=outer, chunk_size=chunk)
    request = found.request
    fixed = {"all": 256, "0.5": 128, "published@0.25": 64}
    assert request.heads.num_retrieval in ([fixed[heads]] if heads in fixed else [128, 64])
    assert kv in ("auto", found.kv) and request.layout == kv_layout(found.kv, head_dim=128, dtype=BF16)
    assert outer == "auto" or request.weights.output_bytes < 0.6 * 2**30
    assert request.chunk_size in ([chunk] if chunk else smaller_chunks(4096))
    assert request.context == 2**20
    if found.fits:
        assert found.plan.with_process <= memory * GIB and found.line is not None


def test_the_headline_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", "llama3-8b-awq", "--context", "1M", "--memory", "24GiB", "--card", "rtx4090"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "context 1,048,576, KV int4, 128 of 256 KV heads retrieval; 22.7 GiB of 24 GiB" in out
    assert (
        "50% of the KV heads keep the whole context (published pattern Llama-3-8B-Instruct-Gradient-1048k, 128 of 256 "
        "KV heads), int4 KV: what that costs is not measured for this model; --context "
    ) in out and " GiB would keep int8 KV" in out
    assert "trained for 1,048,576 tokens" in " ".join(out.split())
    assert "fits, all blocks on the device: 1.3 GiB of 24 GiB are left" in out


def test_what_the_line_says_holds() -> None:
    """The memory and the context that buy the default buy it, and much less does not."""
    line = planned(24, context=2**20).line
    assert line is not None
    context, memory = re.search(r"--context (\d+)K or (\d+) GiB would keep int8 KV", line).groups()  # type: ignore[union-attr]
    assert planned(int(memory), context=2**20).kv == "int8" and planned(int(memory) - 2, context=2**20).kv != "int8"
    assert planned(24, context=int(context) * 1024).kv == "int8"
    assert planned(24, context=(int(context) + 40) * 1024).kv != "int8"
    roomy = planned(80, context=2**20)
    assert roomy.line is not None and roomy.line.endswith("; --heads all fits too, and answers slower")
    all_heads = planned(24, context=2**20, heads="all", kv="int4")
    assert not all_heads.fits and [one.options[0] for one in all_heads.nearest] == ["--heads", "--context"]


def test_suggestions_are_what_their_options_come_to() -> None:
    for settings in ({"heads": "1.0"}, {"heads": "1.0", "kv": "int8"}, {"kv": "16", "heads": "0.5"}):
        found = planned(24, context=2**20, **settings)
        assert not found.fits and found.nearest
        for setting in found.nearest:
            assert setting.plan == plan_memory(setting.request) and setting.plan.with_process <= 24 * GIB
            names = {"--heads": "heads", "--kv": "kv", "--context": "context"}
            options = dict(zip(setting.options[::2], setting.options[1::2], strict=True))
            changed: dict[str, Any] = {names[name]: value for name, value in options.items()}
            if "context" in changed:
                changed["context"] = int(changed["context"].removesuffix("K")) * 1024
            assert planned(24, **({"context": 2**20} | settings | changed)).request == setting.request


def test_blocks_go_beyond_the_device_before_a_split_that_costs_much() -> None:
    settings = LoadSettings("llama3-8b-awq", context=2**20)
    resolved = resolve(settings, known_model("llama3-8b-awq"), on_card=True, fetch=False)
    with_host, alone = fit(resolved, Free(16 * GIB, 64 * GIB)), fit(resolved, Free(16 * GIB))
    assert with_host is not None and alone is not None
    assert (with_host.request.heads.num_retrieval, with_host.resolved.kv) == (128, "int4")
    assert plan_memory(with_host.request).offloaded and "blocks beyond the device" in with_host.line
    assert alone.request.heads.num_retrieval == 64 and not plan_memory(alone.request).offloaded
    assert "would keep 50% of the heads and int8 KV" in alone.line
    assert alone.resolved.fit_note is not None and alone.resolved.fit_note in alone.resolved.notes


def test_too_little_memory_names_what_fits_or_says_that_nothing_does(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", "llama3-8b-awq", "--context", "1M", "--card", "rtx4080", "--memory"]
    assert cli.main([*words, "9GiB"]) == 1
    out = capsys.readouterr().out
    assert "does not fit: " in out and "--context 222K" in out and "--heads 0.33 --context" in out
    assert cli.main([*words, "4GiB"]) == 1
    assert "no setting of this model fits" in capsys.readouterr().out


def test_without_a_context_or_a_gpu() -> None:
    found = planned(64, device="cpu")
    assert found.fits and (found.request.context, found.request.device, found.kv) == (32768, "cpu", "int8")
    assert found.plan.host_weights == 0


def test_a_model_that_no_pattern_is_known_for_keeps_all_heads_as_long_as_it_fits() -> None:
    def heads_and_kv(memory: int) -> tuple[int, str, str]:
        settings = LoadSettings("qwen3-4b", context=2**18)
        found = plan_settings(settings, memory=memory * GIB, card="rtx4090")
        assert found.fits
        return found.request.heads.num_retrieval, found.kv, " ".join(found.notes)

    count, kv, notes = heads_and_kv(40)
    assert (count, kv) == (288, "int8") and "planned as it starts" in notes
    count, kv, notes = heads_and_kv(24)
    assert (count, kv) == (288, "k8v4") and "KV formats are measured on first use" in notes
    count, kv, notes = heads_and_kv(17)
    assert (count, kv) == (192, "int4") and "its heads are ranked and KV formats are measured on first use" in notes


@pytest.mark.real
def test_costs_are_told_only_where_they_were_measured(smollm2_path: Path) -> None:
    known = measured(open_model(smollm2_path).fingerprint)
    assert known.of_heads(0.5).measured and known.of_kv("int4").measured and known.of_outer("int4").measured
    assert not known.of_heads(2 / 3).measured  # between two that were
    assert known.of_heads(0.5).kl > known.of_heads(2 / 3).kl > known.of_heads(0.75).kl
    nothing = Measured()
    stand_ins = (nothing.of_heads(0.5), nothing.of_kv("int4"), nothing.of_outer("int4"))
    assert [one.measured for one in stand_ins] == [False] * 3
    assert [one.kl for one in stand_ins] == [known.of_heads(0.5).kl, known.of_kv("int4").kl, known.of_outer("int4").kl]
    assert nothing.of_kv("16") == nothing.of_heads(1.0) == nothing.of_outer("auto") == FREE_OF_COST


def test_what_was_measured_of_the_cost_is_told_apart(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama", max_position_embeddings=2048)
    source = open_model(tmp_path)
    remember_kv(source.fingerprint, "int8", [{"kv": "int8", "mean_kl": 0.0004, "perplexity_rise": 0.001}])
    lines = {}
    for heads in ("0.5", "all"):
        settings = LoadSettings(str(tmp_path), context=2048, kernels="torch", heads=heads)
        lines[heads] = choose(resolve(settings, OpenedModel(source)), Free(GIB)).line
    figures = "int8 KV: measured KL about 0.0004, perplexity about +0.1%"
    assert lines["0.5"].endswith(f"{figures} for the KV format, not for the heads")
    assert lines["all"] == f"every KV head keeps the whole context, {figures}"


@pytest.mark.real
def test_a_measured_model_says_what_it_costs(smollm2_path: Path) -> None:
    resolved = resolve(LoadSettings(str(smollm2_path), kernels="torch"), OpenedModel(open_model(smollm2_path)))
    best = choose(resolved, Free(64 * GIB))
    assert (best.resolved.kv, best.resolved.heads.plan.num_retrieval) == ("k8v4", 45)
    assert "k8v4 KV: measured KL about 0.029, perplexity about +0.6%" in best.line and best.resolved.fit_note is None
    needed = plan_memory(replace(best.resolved, chunk_size=64).request()).total
    tight = choose(resolved, Free(with_kept_back(needed) - 2))
    assert (tight.resolved.kv, tight.resolved.kv_note) == ("int4", None)
    assert "int4 KV, chunks of " in tight.line and "measured KL about 0.033, perplexity about +1.2%" in tight.line


# --- one verdict ----------------------------------------------------------------------------------------------------


def test_planner_and_engine_have_one_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From memory for everything down to none: both refuse, or both run the same."""
    folder = tmp_path / "model"
    save_checkpoint(folder, "llama", vocab_size=1024, max_position_embeddings=2048, num_hidden_layers=3)
    settings = LoadSettings(str(folder), context=2048, kernels="torch", device="cpu")
    resolved = resolve(settings, OpenedModel(open_model(folder)))
    most = with_kept_back(plan_memory(resolved.request()).total)
    seen: set[Any] = set()
    for percent in range(105, 0, -12):
        free = Free(most * percent // 100)
        monkeypatch.setattr(engine_module, "free_places", lambda *_, free=free: free)
        monkeypatch.setattr(planning, "free_places", lambda *_, free=free: free)
        plan = plan_settings(settings)
        if not plan.fits:
            with pytest.raises(MemoryLimitError) as caught:
                Engine.load(str(folder), settings, first_use=FirstUse(quick=True))
            assert "\n" not in str(caught.value)
            seen.add("refused")
            continue
        if plan.request.heads.num_streaming:  # of which ranking comes first, as it is said
            assert any("its heads are ranked" in note for note in plan.notes)
            seen.add("ranked")
            continue
        engine = Engine.load(str(folder), settings, first_use=FirstUse(quick=True))
        assert (engine.kv, engine.plan, engine.chunk_size) == (plan.kv, plan.request.heads, plan.request.chunk_size)
        said = any(note == f"so that it fits: {plan.line}" for note in engine.notes)
        assert said == ((engine.kv, engine.chunk_size) != ("int8", 512) or "lm_head" in str(plan.line))
        seen.add((engine.kv, engine.chunk_size))
    assert {"refused", ("int8", 512), ("int8", 64)} <= seen
