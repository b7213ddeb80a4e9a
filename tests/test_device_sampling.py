"""Sampling on a device draws what the host's Sampler draws; on the CPU here, with the operations that a GPU runs."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from duolocal.device_sampling import DeviceSampler
from duolocal.errors import DuoLocalError
from duolocal.sampling import Sampler
from duolocal.settings import Sampling
from tests.triton_device import DEVICE

VOCAB = 300


def random_logits(seed: int) -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def answers(sampling: Sampling, seeds: list[int], device_sampler: DeviceSampler) -> tuple[list[int], list[int]]:
    """Return the ids that the host and the device draw from one sequence of logits."""
    host = Sampler(sampling)
    device_sampler.restart(sampling)
    history: list[int] = []
    drawn = []
    for seed in seeds:
        logits = random_logits(seed)
        device_sampler.prepare()
        device_sampler.sample(logits.to(DEVICE), greedy=sampling.greedy)
        drawn.append(device_sampler.read())
        device_sampler.remember(device_sampler.token)
        history.append(host(logits, history))
    return history, drawn


@given(
    seeds=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    temperature=st.sampled_from([0.0, 0.2, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 5, VOCAB - 1, VOCAB, VOCAB + 7]),
    top_p=st.sampled_from([1e-12, 0.3, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    penalty=st.sampled_from([0.8, 1.0, 1.5]),
    seed=st.integers(0, 2**40),
)
def test_draws_what_the_host_draws(seeds: list[int], seed: int, penalty: float, **settings: Any) -> None:
    sampling = Sampling(seed=seed, repetition_penalty=penalty, **settings)
    # An earlier answer under other settings must leave nothing behind.
    sampler = DeviceSampler(VOCAB, DEVICE)
    answers(Sampling(temperature=0.0, top_k=2, top_p=0.1, min_p=0.5, repetition_penalty=7.0), [1, 2, 3], sampler)
    host, device = answers(sampling, seeds, sampler)
    assert device == host


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_cannot_be_sampled(bad: float, temperature: float) -> None:
    sampler = DeviceSampler(3, DEVICE)
    sampler.restart(Sampling(temperature=temperature))
    sampler.prepare()
    sampler.sample(torch.tensor([1.0, bad, 0.0], device=DEVICE), greedy=temperature == 0)
    with pytest.raises(DuoLocalError, match="cannot be sampled"):
        sampler.read()
    sampler.sample(torch.full((3,), -math.inf, device=DEVICE), greedy=temperature == 0)
    with pytest.raises(DuoLocalError, match="cannot be sampled"):
        sampler.read()


def test_forbidden_ids_are_never_drawn() -> None:
    sampler = DeviceSampler(5, DEVICE)
    sampler.restart(Sampling(temperature=1.0, top_p=1.0, seed=1))
    logits = torch.tensor([0.0, -math.inf, 0.0, -math.inf, 0.0], device=DEVICE)
    drawn = set()
    for _ in range(100):
        sampler.prepare()
        sampler.sample(logits, greedy=False)
        drawn.add(sampler.read())
    assert drawn == {0, 2, 4}


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53, 1.0])
def test_the_ends_of_the_unit_interval(uniform: float) -> None:
    sampler = DeviceSampler(5, DEVICE)
    sampler.restart(Sampling(temperature=1.0, top_p=1.0, seed=1))
    sampler._uniform.fill_(uniform)
    sampler.sample(torch.tensor([-math.inf, 0.0, 0.0, 0.0, -math.inf], device=DEVICE), greedy=False)
    assert sampler.read() == (1 if uniform == 0 else 3)
