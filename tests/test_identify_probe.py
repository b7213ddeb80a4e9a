"""Probing attention: tiles and chunks change nothing, and echo and copy find the one head that retrieves."""

import random
from functools import partial

import pytest
import torch
from torch import Tensor

from duolocal.errors import SettingsError
from duolocal.identify.attention_probe import over_group, probe
from duolocal.identify.copying import CopyScores, _Watch, copy_scores
from duolocal.identify.echo import EchoScores, echo_scores
from duolocal.identify.results import IdentifyProgress
from duolocal.identify.text import PasskeyText
from duolocal.models.config import ModelConfig
from duolocal.models.observe import ObservedCache, shown_attention
from duolocal.models.transformer import Transformer
from tests.hand_built import RETRIEVAL, induction_model
from tests.oracle import OracleCache, oracle_attention, oracle_weights
from tests.tiny import random_model, tiny_config, transformer_of

SINK, RECENT = 4, 8


class Collected:
    """A watcher that puts all tiles together: [num_heads, n, n] per layer, NaN where nothing was shown."""

    def __init__(self, config: ModelConfig, n: int) -> None:
        self.weights = torch.full((config.num_layers, config.num_heads, n, n), float("nan"), dtype=torch.float64)
        self.rows = torch.zeros(config.num_layers, n, dtype=torch.int64)

    def __call__(self, layer: int, positions: Tensor, weights: Tensor) -> None:
        self.weights[layer][:, positions] = 0.0
        self.weights[layer][:, positions, : weights.shape[2]] = weights.double()
        self.rows[layer, positions] += 1


@pytest.mark.parametrize("tile", [1, 7, 100, None])
def test_tiles_are_the_whole_matrix(tile: int | None) -> None:
    config = tiny_config(num_heads=6, num_kv_heads=2)
    n = 45
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(n, heads, 16, generator=generator, dtype=torch.float64) for heads in (6, 2, 2))
    seen = Collected(config, n)
    cache = ObservedCache(shown_attention(partial(seen, 1), tile=tile))
    outs = []
    for start, stop in ((0, 20), (20, 21), (21, n)):  # in pieces, as chunks come
        cache.append(1, k[start:stop], v[start:stop])
        outs.append(cache.attend(1, q[start:stop], torch.arange(start, stop)))
    assert (seen.rows[1] == 1).all()  # every query shown once
    torch.testing.assert_close(
        seen.weights[1], oracle_weights(q, k, torch.arange(n), retrieval=[True, True]), rtol=0, atol=1e-13
    )
    wanted = oracle_attention(q, k, v, torch.arange(n), retrieval=[True, True], sink_size=0, recent_size=1)
    torch.testing.assert_close(torch.cat(outs), wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("chunk_size", [7, 64])
def test_a_probe_sees_what_the_model_attends_to(architecture: str, chunk_size: int) -> None:
    config = tiny_config(architecture)  # type: ignore[arg-type]
    model = transformer_of(random_model(config, dtype=torch.float64))
    n = 30
    ids = torch.randint(0, config.vocab_size, (n,), generator=torch.Generator().manual_seed(2))
    seen = Collected(config, n)
    assert list(probe(model, ids.tolist(), seen, chunk_size=chunk_size)) == [1, 2]

    oracle = OracleCache(config)
    model.hidden(ids, torch.arange(n), oracle)
    torch.testing.assert_close(seen.weights, torch.stack(oracle.weights), rtol=0, atol=1e-12)


def test_a_16_bit_model_is_probed_in_float32() -> None:
    config, weights = random_model(dtype=torch.bfloat16)
    dtypes = set()
    model = transformer_of((config, weights))
    list(probe(model, list(range(9)), lambda layer, positions, weights: dtypes.add(weights.dtype)))
    assert dtypes == {torch.float32}


def run_echo(model: Transformer, **changes: int) -> EchoScores:
    settings = {"sink_size": SINK, "recent_size": RECENT, "seed": 0, "num_tokens": 80}
    *progress, scores = echo_scores(model, **(settings | changes))
    assert isinstance(scores, EchoScores)
    assert [event.done for event in progress if isinstance(event, IdentifyProgress)] == list(range(1, 7))
    return scores


def test_echo_finds_the_induction_head() -> None:
    scores = run_echo(transformer_of(induction_model()))
    layer, head = RETRIEVAL[0], 3
    assert scores.induction[layer, head] > 0.95
    assert scores.per_kv_head(2)[0].argmax() == RETRIEVAL[0] * 2 + RETRIEVAL[1]
    scores.induction[layer, head] = 0
    assert scores.induction.max() < 0.1  # one of many, for heads that look everywhere alike
    assert scores.echo.max() < 0.1


def test_echo_scores_are_the_weights_at_the_first_copy() -> None:
    config = tiny_config(num_heads=6, num_kv_heads=2, max_positions=256)
    model = transformer_of(random_model(config, dtype=torch.float64))
    copy = 40
    drawn: list[Tensor] = []
    embed = model.embed

    def recording(ids: Tensor) -> Tensor:
        drawn.append(ids)
        return embed(ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "embed", recording)
        *_, found = echo_scores(model, sink_size=SINK, recent_size=RECENT, seed=3, num_tokens=2 * copy, draws=1, tile=9)
    assert isinstance(found, EchoScores)
    (ids,) = drawn
    assert torch.equal(ids[:copy], ids[copy:]) and len(set(ids[:copy].tolist())) == copy
    assert not {config.bos_id, *config.eos_ids} & set(ids.tolist())
    seen = Collected(config, 2 * copy)
    list(probe(model, ids.tolist(), seen))
    queries = range(copy + SINK, 2 * copy - 1)
    for weights, shift in ((found.echo, 0), (found.induction, 1)):
        wanted = torch.stack([seen.weights[:, :, i, i - copy + shift] for i in queries]).mean(0)
        torch.testing.assert_close(weights, wanted, rtol=0, atol=1e-12)


def test_echo_is_the_same_for_a_seed_and_another_for_another() -> None:
    model = transformer_of(random_model(tiny_config(max_positions=256)))
    first, again, other = run_echo(model), run_echo(model), run_echo(model, seed=1)
    assert torch.equal(first.echo, again.echo) and torch.equal(first.induction, again.induction)
    assert not torch.equal(first.echo, other.echo)


def test_echo_refuses_copies_inside_the_window() -> None:
    model = transformer_of(random_model())
    with pytest.raises(SettingsError, match=r"echo needs 28 tokens or more to look beyond a window of 4 \+ 8, not 27"):
        next(echo_scores(model, sink_size=4, recent_size=8, seed=0, num_tokens=27))


def copied_text(seed: int) -> PasskeyText:
    """Return random tokens, ten of which come again at the end."""
    ids = random.Random(seed).sample(range(3, 320), 60)
    source = (15, 25)
    ids += [7, ids[14], *ids[slice(*source)]]
    return PasskeyText(ids, predicted_at=list(range(61, 71)), sources=[source] * 10)


def test_copy_finds_the_induction_head() -> None:
    *progress, scores = copy_scores(transformer_of(induction_model()), [copied_text(0), copied_text(1)])
    assert isinstance(scores, CopyScores) and len(progress) == 4
    assert scores.num_copied == 20
    layer, head = RETRIEVAL[0], 3
    assert scores.hits[layer, head] == 1.0 and scores.mass[layer, head] > 0.95
    scores.hits[layer, head] = scores.mass[layer, head] = 0
    assert scores.hits.max() == 0 and scores.mass.max() < 0.1


def test_copy_takes_every_place_of_the_token_in_its_passkey_and_no_other() -> None:
    # "a b a": where "a" follows, both of its places count; the "a" outside does not.
    text = PasskeyText([9, 5, 6, 5, 5, 8, 5], predicted_at=[5], sources=[(1, 4)])
    hits, mass = torch.zeros(1, 4, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)
    row = torch.full((4, 6), 0.01, dtype=torch.float64)
    row[0, 1] = row[1, 3] = row[2, 4] = row[3, 2] = 0.95
    _Watch(text, hits, mass)(0, torch.tensor([4, 5]), torch.stack((torch.zeros_like(row), row), 1))
    assert hits.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    assert mass[0].tolist() == pytest.approx([0.96, 0.96, 0.02, 0.02])


def test_a_group_is_worth_its_neediest_head() -> None:
    per_head = torch.tensor([[0.1, 0.9, 0.2, 0.3], [0.0, 0.0, 0.5, 0.4]])
    assert torch.equal(over_group(per_head, 2), torch.tensor([[0.9, 0.3], [0.0, 0.5]]))
