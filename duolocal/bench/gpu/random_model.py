"""A model of random weights in the shapes of a real one, made on the device: for speed and memory, not for text.

Everything that prints a figure taken with it says that the weights are random.
"""

import torch
from torch import Tensor

from duolocal.bench.gpu.measure import Bench
from duolocal.heads import HeadPlan
from duolocal.kernels.matrix import GroupedMatrix
from duolocal.models.config import ModelConfig
from duolocal.models.weights import LayerWeights, ModelWeights
from duolocal.quant.grouped import GroupedWeight
from duolocal.quant.weight import DenseWeight, Linear, Weight

# Uniform 4-bit codes have a standard deviation of 4.6: the weights get 0.02, a usual size, so that hidden states stay
# of size 1 through all layers.
_WEIGHT_STD, _CODE_STD = 0.02, 4.6


def random_int4(out_features: int, in_features: int, group_size: int, generator: torch.Generator) -> GroupedWeight:
    """Return a random 4-bit weight with zero points, as AWQ has them, on the generator's device."""
    device = generator.device
    groups = in_features // group_size
    codes = torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=device).random_(generator=generator)
    scales = torch.empty(out_features, groups, dtype=torch.float32, device=device).uniform_(
        0.5, 1.5, generator=generator
    )
    zeros = torch.randint(7, 9, (out_features, groups), dtype=torch.uint8, device=device, generator=generator)
    scales = scales.mul_(_WEIGHT_STD / _CODE_STD).to(torch.float16)
    matrix = GroupedMatrix(codes=codes, scales=scales, bits=4, zeros=zeros)
    return GroupedWeight(matrix, f"random-int4-g{group_size}")


def random_weights(
    config: ModelConfig, *, group_size: int, device: torch.device, dtype: torch.dtype, seed: int
) -> ModelWeights:
    """Return random 4-bit matrices in groups of `group_size`, and embedding, lm_head and norms in `dtype`."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def linear(out_features: int, in_features: int) -> Linear:
        return Linear(random_int4(out_features, in_features, group_size, generator))

    def norm() -> Tensor:
        return torch.empty(config.hidden_size, device=device).uniform_(0.8, 1.2, generator=generator).to(dtype)

    def table(std: float) -> Weight:
        x = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        return DenseWeight(x.normal_(std=std, generator=generator))

    hidden, ffn = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layers = tuple(
        LayerWeights(
            attention_norm=norm(),
            q_proj=linear(q_size, hidden),
            k_proj=linear(kv_size, hidden),
            v_proj=linear(kv_size, hidden),
            o_proj=linear(hidden, q_size),
            mlp_norm=norm(),
            gate_proj=linear(ffn, hidden),
            up_proj=linear(ffn, hidden),
            down_proj=linear(hidden, ffn),
        )
        for _ in range(config.num_layers)
    )
    return ModelWeights(embedding=table(1.0), layers=layers, norm=norm(), lm_head=table(_WEIGHT_STD))


def bench_weights(bench: Bench) -> ModelWeights:
    """Return the suite's model, and record what it is."""
    sizes = bench.sizes
    weights = random_weights(
        sizes.config, group_size=sizes.group_size, device=bench.device, dtype=bench.dtype, seed=bench.seed
    )
    bench.synchronize()
    return weights


def half_retrieval(num_layers: int, num_kv_heads: int, *, sink_size: int, recent_size: int) -> HeadPlan:
    """Return the plan in which every other KV head is a retrieval head: 50%, as in every layer of it."""
    flags = tuple(head % 2 == 0 for head in range(num_kv_heads))
    return HeadPlan((flags,) * num_layers, sink_size, recent_size, "every other head")


def all_retrieval(num_layers: int, num_kv_heads: int, *, sink_size: int, recent_size: int) -> HeadPlan:
    """Return the plan in which all heads are retrieval heads."""
    return HeadPlan(((True,) * num_kv_heads,) * num_layers, sink_size, recent_size, "all heads retrieval")
