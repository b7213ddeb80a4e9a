"""Compiled RMSNorm, rotary embedding and SiLU gate against the plain reference in float64."""

from collections.abc import Callable

import pytest
import torch

from duolocal.kernels import pointwise
from tests.compiled import THREADS, UNIT, compiled, compiled_kernels, normal, poisoned, surrounded

pytestmark = compiled_kernels

SIZES = (1, 7, 8, 15, 16, 33, 64, 100, 576)  # multiples of a vector and others
NUM_ROWS = (1, 2, 15, 16, 17, 33, 100)  # threads take 16 rows at a time


@pytest.mark.parametrize("num_threads", THREADS)
@pytest.mark.parametrize("scale", [0.0, 1e-15, 1e-4, 1.0, 1e3, 1e15])
def test_rms_norm_equals_float64(scale: float, num_threads: int) -> None:
    for size in SIZES:
        weight = surrounded(normal(size, seed=1), offset=4)
        for rows in NUM_ROWS:
            x = surrounded(normal(rows, size, seed=size) * scale, offset=4)
            with poisoned():
                got = compiled(num_threads).rms_norm(x, weight, eps=1e-5)
            wanted = pointwise.rms_norm(x.double(), weight.double(), eps=1e-5)
            # The sum of squares has terms of one sign: a quarter of a unit for each at most, halved by the root; and
            # six roundings after it.
            torch.testing.assert_close(got.double(), wanted, rtol=(size / 8 + 6) * UNIT, atol=0)


def test_rms_norm_of_every_head() -> None:
    """Any number of dimensions before the last: q and k of Qwen3 are [num_tokens, heads, head_dim]."""
    x, weight = normal(19, 3, 80), normal(80, seed=1)
    with poisoned():
        got = compiled(2).rms_norm(x, weight, eps=1e-6)
    wanted = pointwise.rms_norm(x.double(), weight.double(), eps=1e-6)
    torch.testing.assert_close(got.double(), wanted, rtol=16 * UNIT, atol=0)


def test_eps_is_added_to_the_mean_square() -> None:
    x, one = torch.tensor([[3e-3, 4e-3]]), torch.ones(2)
    for eps in (0.0, 1e-12, 1e-6, 1e-3, 10.0):
        wanted = x.double() / (x.double().square().mean() + eps).sqrt()
        torch.testing.assert_close(compiled(1).rms_norm(x, one, eps=eps).double(), wanted, rtol=6 * UNIT, atol=0)


@pytest.mark.parametrize("num_threads", THREADS)
@pytest.mark.parametrize("head_dim", [2, 6, 16, 30, 64, 80, 96, 128, 256])
def test_rotary_embedding_equals_float64(head_dim: int, num_threads: int) -> None:
    for tokens in NUM_ROWS:
        for heads in (1, 3):
            x = surrounded(normal(tokens, heads, head_dim, seed=tokens), offset=4)
            angles = normal(tokens, head_dim // 2, seed=1, scale=10.0)
            cos, sin = surrounded(angles.cos(), offset=4), surrounded(angles.sin(), offset=4)
            with poisoned():
                got = compiled(num_threads).rotary_embedding(x, cos, sin)
            wanted = pointwise.rotary_embedding(x.double(), cos.double(), sin.double())
            both_cos, both_sin = (part.double().abs().repeat(1, 2)[:, None] for part in (cos, sin))
            size = x.double().abs() * both_cos + x.double().roll(head_dim // 2, -1).abs() * both_sin
            # Two products and a sum, each rounded once.
            assert bool(((got.double() - wanted).abs() <= 2 * UNIT * size).all())


@pytest.mark.parametrize("num_threads", THREADS)
@pytest.mark.parametrize("shape", [(1,), (7,), (17,), (3, 341), (1, 1024), (1, 1025), (2, 2048), (33, 97)])
def test_silu_mul_equals_float64(shape: tuple[int, ...], num_threads: int) -> None:
    for scale in (1e-6, 1.0, 20.0):
        gate = surrounded(normal(*shape, seed=1) * scale, offset=4)
        up = surrounded(normal(*shape, seed=2), offset=4)
        with poisoned():
            got = compiled(num_threads).silu_mul(gate, up)
        wanted = pointwise.silu_mul(gate.double(), up.double())
        # The exponential is good to 3e-7; a sum, a quotient and a product follow.
        torch.testing.assert_close(got.double(), wanted, rtol=3e-7 + 4 * UNIT, atol=1e-33)


def test_silu_mul_far_from_zero() -> None:
    """e^-g leaves float32 below g = -88; the result is next to nothing there, and never infinite or NaN."""
    steps = torch.linspace(-130, 130, 2003)
    gate = torch.cat(
        (steps, torch.tensor([-1e30, -1e4, -100.0, -88.0, -87.0, -0.0, 0.0, 87.0, 88.0, 100.0, 1e4, 1e30]))
    )
    for up in (1.0, -3.0):
        with poisoned():
            got = compiled(1).silu_mul(gate, torch.full_like(gate, up)).double()
        # What e^88 at most instead of e^-g leaves: |g| e^-88.
        left = gate.double().abs() * 1e-38 * abs(up)
        wanted = pointwise.silu_mul(gate.double(), torch.full_like(gate.double(), up))
        assert bool(((got - wanted).abs() <= (3e-7 + 4 * UNIT) * wanted.abs() + left).all())


@pytest.mark.parametrize("size", [3, 16, 40])
@pytest.mark.parametrize("place", [0, -1])
def test_nan_shows(size: int, place: int) -> None:
    """What went wrong before is not hidden: a kernel that compares or clamps might."""
    x, one = normal(1, size), torch.ones(size)
    x[0, place] = float("nan")
    assert compiled(1).rms_norm(x, one, eps=1e-5).isnan().all()
    for pair in ((x, torch.ones_like(x)), (torch.ones_like(x), x)):
        assert compiled(1).silu_mul(*pair).isnan().sum() == 1


def _heads(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda k: k.rms_norm(_heads(3, 4), _heads(5), eps=1e-5), r"\(3, 4\).*\(5,\)"),
        (lambda k: k.rms_norm(_heads(3, 4), _heads(1, 4), eps=1e-5), r"\(3, 4\).*\(1, 4\)"),
        (lambda k: k.rms_norm(_heads(3, 4).double(), _heads(4), eps=1e-5), "float64"),
        (lambda k: k.rms_norm(_heads(3, 4), _heads(4).half(), eps=1e-5), "float16"),
        (lambda k: k.rotary_embedding(_heads(3, 2, 4), _heads(3, 4), _heads(3, 4)), "rotary_embedding"),
        (lambda k: k.rotary_embedding(_heads(3, 2, 4), _heads(2, 2), _heads(2, 2)), "rotary_embedding"),
        (lambda k: k.rotary_embedding(_heads(3, 2, 4), _heads(3, 2), _heads(1, 2)), "rotary_embedding"),
        (lambda k: k.rotary_embedding(_heads(3, 2, 5), _heads(3, 2), _heads(3, 2)), "rotary_embedding"),
        (lambda k: k.rotary_embedding(_heads(3, 4), _heads(3, 2), _heads(3, 2)), "rotary_embedding"),
        (lambda k: k.rotary_embedding(_heads(3, 2, 4), _heads(3, 2).double(), _heads(3, 2)), "float64"),
        (lambda k: k.silu_mul(_heads(3, 4), _heads(3, 5)), r"\(3, 4\).*\(3, 5\)"),
        (lambda k: k.silu_mul(_heads(3, 4), _heads(4)), r"\(3, 4\).*\(4,\)"),
        (lambda k: k.silu_mul(_heads(3, 4), _heads(3, 4).bfloat16()), "bfloat16"),
    ],
)
def test_what_does_not_fit_is_refused(run: Callable[..., object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(compiled(1))


def test_strided_inputs_are_read_as_they_look() -> None:
    x, up = normal(40, 12).T, normal(24, 40)[::2]
    with poisoned():
        got = compiled(2).silu_mul(x, up), compiled(2).rms_norm(x, up[0], eps=1e-5)
    wanted = pointwise.silu_mul(x, up), pointwise.rms_norm(x, up[0], eps=1e-5)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
