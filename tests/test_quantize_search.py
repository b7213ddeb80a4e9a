"""AWQ's searches against float64 and plain loops; and that they find what rounding alone loses."""

import pytest
import torch
from torch import Tensor

from duolocal.quant import awq_search
from duolocal.quant.awq_search import (
    CLIP_GRID,
    CLIP_STEPS,
    InputSummary,
    clip_groups,
    relative_error,
    scales_for,
    search_clip,
    search_scales,
)
from duolocal.quant.rounding import round_to_nearest

GROUP = 32


def weight_and_inputs(seed: int = 0, *, hot: float = 30.0) -> tuple[Tensor, Tensor]:
    """Return a weight [48, 128] and inputs [400, 128], four channels of which are `hot` times the others."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(48, 128, generator=generator) * 0.05
    inputs = torch.randn(400, 128, generator=generator)
    inputs[:, [3, 40, 70, 127]] *= hot
    return weight, inputs


def summary_of(inputs: Tensor, *, parts: int = 5, seed: int = 0) -> InputSummary:
    summary = InputSummary(inputs.shape[1], num_tokens=inputs.shape[0], seed=seed)
    for part in inputs.tensor_split(parts):
        summary.add(part)
    return summary


def output_error(weight: Tensor, approximation: Tensor, inputs: Tensor) -> float:
    """Return ‖X (W' − W)ᵀ‖² / ‖X Wᵀ‖² in float64."""
    x = inputs.double()
    difference = x @ (approximation.double() - weight.double()).T
    return float(difference.square().sum() / (x @ weight.double().T).square().sum())


def rounded_with(weight: Tensor, scales: Tensor) -> Tensor:
    return round_to_nearest(weight * scales, group_size=GROUP).decode() / scales


def test_folded_rows_have_the_same_products_and_every_token_counts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(awq_search, "MAX_ROWS", 150)
    _, inputs = weight_and_inputs()
    summary = summary_of(inputs, parts=7)
    rows = summary.rows()
    assert rows.shape == (128, 128)
    wanted = inputs.double().T @ inputs.double()
    found = rows.double().T @ rows.double()
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert torch.allclose(summary.mean_abs, inputs.abs().mean(0), rtol=1e-6)


def test_few_rows_are_kept_as_they_are():
    _, inputs = weight_and_inputs()
    assert torch.equal(summary_of(inputs[:90], parts=3).rows(), inputs[:90])


def test_wide_inputs_are_drawn_by_seed_and_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(awq_search, "MAX_ROWS", 100)
    _, inputs = weight_and_inputs()
    one, same, other = (summary_of(inputs, parts=parts, seed=seed) for parts, seed in ((5, 1), (9, 1), (5, 2)))
    assert one.rows().shape == (100, 128)
    assert torch.equal(one.rows(), same.rows())
    assert not torch.equal(one.rows(), other.rows())
    assert torch.allclose(one.mean_abs, inputs.abs().mean(0), rtol=1e-6)  # of all tokens
    where = [int((inputs == row).all(1).nonzero()) for row in one.rows()]
    assert where == sorted(set(where))


@pytest.mark.parametrize("seed", range(3))
def test_scales_beat_plain_rounding_where_few_channels_are_hot(seed: int):
    weight, inputs = weight_and_inputs(seed)
    found = search_scales([weight], inputs, inputs.abs().mean(0), group_size=GROUP)
    plain = output_error(weight, rounded_with(weight, torch.ones(128)), inputs)
    scaled = output_error(weight, rounded_with(weight, found.scales), inputs)
    assert found.alpha > 0
    assert found.plain_loss == pytest.approx(plain, rel=1e-3)
    assert found.loss == pytest.approx(scaled, rel=1e-3)
    assert scaled < 0.5 * plain


def test_the_loss_is_the_least_of_the_grid():
    weight, inputs = weight_and_inputs(7, hot=5)
    mean_abs = inputs.abs().mean(0)
    found = search_scales([weight], inputs, mean_abs, group_size=GROUP)
    losses = {
        step / 20: output_error(weight, rounded_with(weight, scales_for(mean_abs, step / 20)), inputs)
        for step in range(20)
    }
    assert min(losses, key=losses.__getitem__) == found.alpha


def test_linears_of_one_group_count_alike_whatever_their_size():
    weight, inputs = weight_and_inputs()
    mean_abs = inputs.abs().mean(0)
    both = search_scales([weight, weight * 1000], inputs, mean_abs, group_size=GROUP)
    alone = search_scales([weight], inputs, mean_abs, group_size=GROUP)
    assert (both.alpha, both.loss) == (alone.alpha, pytest.approx(alone.loss, rel=1e-2))


def test_scales_stay_within_a_hundredfold_and_share_what_means_share():
    mean_abs = torch.tensor([0.0, 1e-30, 1.0, 1.0, 1e6])
    for step in range(20):
        scales = scales_for(mean_abs, step / 20)
        assert scales.min() >= 0.0099 and scales.max() <= 101 and scales[2] == scales[3]
        assert float(scales.max() * scales.min()) == pytest.approx(1, rel=1e-3)
    assert torch.equal(scales_for(torch.zeros(4), 0.5), torch.ones(4))


def naive_clip(weight: Tensor, inputs: Tensor) -> Tensor:
    """Return the limits [out_features, groups] by trying every one on the products themselves, in float64."""
    limits = torch.empty(weight.shape[0], weight.shape[1] // GROUP)
    for group in range(limits.shape[1]):
        columns = slice(group * GROUP, (group + 1) * GROUP)
        x = inputs[:, columns].double()
        for row in range(weight.shape[0]):
            part = weight[row, columns]
            most = part.abs().max()
            best = None
            for step in range(CLIP_STEPS):
                limit = most * (1 - step / CLIP_GRID)
                tried = round_to_nearest(part.clamp(-limit, limit)[None], group_size=GROUP).decode()[0]
                error = float((x @ (tried - part).double()).square().sum())
                if best is None or error < best[0]:
                    best = error, limit
            assert best is not None
            limits[row, group] = best[1]
    return limits


def test_clipping_is_the_search_written_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(awq_search, "_TILE_ELEMENTS", 7 * 128)  # tiles that do not divide the rows
    weight, inputs = weight_and_inputs(3, hot=4)
    weight = weight[:16] * torch.randn(16, 128, generator=torch.Generator().manual_seed(9)).abs() ** 1.5
    found = search_clip(weight, inputs, group_size=GROUP)
    wanted = naive_clip(weight, inputs)
    # Two limits whose errors tie in float32 may change places.
    assert (found == wanted).float().mean() > 0.95
    assert (wanted < weight.unflatten(1, (-1, GROUP)).abs().amax(-1)).any()  # something is clipped at all
    clipped = clip_groups(weight, found)
    assert torch.equal(clipped, clip_groups(clipped, found))
    plain = round_to_nearest(weight, group_size=GROUP).decode()
    better = round_to_nearest(clipped, group_size=GROUP).decode()
    assert output_error(weight, better, inputs) < output_error(weight, plain, inputs)


def test_relative_error_is_that_of_float64_and_finite_for_nothing():
    weight, inputs = weight_and_inputs()
    plain = round_to_nearest(weight, group_size=GROUP).decode()
    assert relative_error(weight, plain, inputs) == pytest.approx(output_error(weight, plain, inputs), rel=1e-4)
    nothing = torch.zeros(8, 32)
    assert relative_error(nothing, nothing, torch.zeros(4, 32)) == 0
