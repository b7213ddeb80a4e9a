"""The GPU's path takes a context up as the CPU's do: the same records, the same rings."""

import pytest
import torch

pytest.importorskip("triton")

from tests.test_triton_engine import engines, few_programs, ids  # noqa: F401  a fixture that must be seen here


@pytest.mark.parametrize("kv", ["k8v4", pytest.param("fp8", marks=pytest.mark.full)])
def test_a_context_goes_over_to_another_engine(kv: str) -> None:
    first, second = engines(kv=kv)[0], engines(kv=kv)[0]
    first.step(ids(150))
    blocks = first.cache.pool.num_blocks
    assert blocks == 2
    columns = [first.cache.pool.read(0, 1), first.cache.pool.read(1, 2)]
    ring = first.cache.read_ring()
    assert ring.device.type == "cpu" == columns[0].device.type
    second.resume(ring, keep=0, token_ids=ids(150), columns=columns)
    assert torch.equal(first.logits(ids(2, seed=1)), second.logits(ids(2, seed=1)))
    assert first.token_ids == second.token_ids
