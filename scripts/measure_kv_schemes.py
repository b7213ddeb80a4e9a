"""Compare ways to store keys and values in 4 and 8 bits, on a real model and real text: docs/kv-formats.md.

Every scheme is applied to whole 64-token blocks as they are closed (quantize, dequantize, keep as float32), all heads
retrieval, sinks and the recent window exact, and compared with the 16-bit cache over the same tokens.

    python scripts/measure_kv_schemes.py [--model smollm2-135m] [--tokens 8192]
"""

import argparse
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from duolocal.cache import cache as cache_module
from duolocal.cache.cache import DuoCache
from duolocal.engine.kv_choice import _log_probs
from duolocal.heads import uniform_plan
from duolocal.kernels.blocks import BlockLayout, Plane, decode_blocks, encode_blocks, hadamard
from duolocal.models.loader import open_model
from duolocal.models.registry import resolve
from duolocal.models.transformer import Transformer
from duolocal.predictions import Predictions, Reference
from duolocal.quant.kv import kv_layout
from duolocal.sample_text import sample_text
from duolocal.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Scheme:
    name: str
    bits: float  # per number, scales included, at head_dim 64
    key: Callable[[Tensor], Tensor]
    value: Callable[[Tensor], Tensor]


def through(plane: Plane) -> Callable[[Tensor], Tensor]:
    """Quantize and dequantize [num_blocks, block_size, head_dim] as the product does."""

    def apply(x: Tensor) -> Tensor:
        layout = BlockLayout(plane, plane, x.shape[1], x.shape[2])
        y = decode_blocks(encode_blocks(x, x, layout), layout, "key", dtype=x.dtype)
        return hadamard(y) if plane.rotate else y

    return apply


def per_channel(bits: int) -> Callable[[Tensor], Tensor]:
    """One scale per channel over the block (KIVI, arXiv 2402.02750)."""

    def apply(x: Tensor) -> Tensor:
        low, high = x.amin(1, keepdim=True).half().float(), x.amax(1, keepdim=True)
        scale = ((high - low) / (2**bits - 1)).half().float()
        return low + ((x - low) / scale.clamp_min(1e-8)).round().clamp(0, 2**bits - 1) * scale

    return apply


def schemes() -> list[Scheme]:
    tok8, tok8r = through(Plane("int", 8)), through(Plane("int", 8, rotate=True))
    tok4, tok4r = through(Plane("int", 4)), through(Plane("int", 4, rotate=True))
    tok4r_g2 = through(Plane("int", 4, groups=2, rotate=True))
    fp8 = through(Plane("fp8", 8))
    half = through(Plane("float", 16, torch.float16))
    return [
        Scheme("16 bits", 16, half, half),
        Scheme("fp8 e4m3, scale per token", 8.25, fp8, fp8),
        Scheme("int8 per token", 8.5, tok8, tok8),
        Scheme("int8 per token, rotated", 8.5, tok8r, tok8r),
        Scheme("K int8, V int4 rotated", 6.5, tok8, tok4r),
        Scheme("K int8, V int4", 6.5, tok8, tok4),
        Scheme("int4 per token", 4.5, tok4, tok4),
        Scheme("int4 per token, K rotated", 4.5, tok4r, tok4),
        Scheme("int4 per token, K and V rotated", 4.5, tok4r, tok4r),
        Scheme("int4 per 32 numbers, K and V rotated", 5, tok4r_g2, tok4r_g2),
        Scheme("int4, K per channel of a block", 4.5, per_channel(4), tok4),
        Scheme("int4, K per channel of a block, V rotated", 4.5, per_channel(4), tok4r),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--chunk-size", type=int, default=512)
    arguments = parser.parse_args()
    source = open_model(resolve(arguments.model))
    device, dtype = torch.device("cpu"), torch.float32
    ids = torch.tensor(load_tokenizer(source).encode(sample_text())[: arguments.tokens])
    config = source.config
    transformer = Transformer(config, source.load(), context=len(ids), device=device, dtype=dtype)
    plan = uniform_plan(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        retrieval=True,
    )
    layout = kv_layout("32", head_dim=config.head_dim, dtype=dtype)
    candidates = schemes()
    make = functools.partial(
        DuoCache, plan, layout, num_heads=config.num_heads, context=len(ids), device=device, dtype=dtype
    )
    caches = {scheme.name: make() for scheme in candidates}
    tallies = {scheme.name: Predictions() for scheme in candidates}
    for start in range(0, len(ids) - 1, arguments.chunk_size):
        chunk = slice(start, min(start + arguments.chunk_size, len(ids) - 1))
        reference: Reference | None = None
        for scheme in candidates:
            cache_module.encode_blocks = lambda k, v, layout, scheme=scheme: encode_blocks(  # type: ignore[assignment]
                scheme.key(k), scheme.value(v), layout
            )
            log_probs = _log_probs(transformer, caches[scheme.name], ids, chunk)
            reference = Reference(log_probs) if reference is None else reference
            tallies[scheme.name].add(log_probs, reference, ids[chunk.start + 1 : chunk.stop + 1])
        print(f"{chunk.stop} of {len(ids)} tokens", flush=True)
    base = tallies[candidates[0].name].perplexity
    rows = []
    for scheme in candidates:
        tally = tallies[scheme.name]
        rows.append(
            {
                "scheme": scheme.name,
                "bits": scheme.bits,
                "mean_kl": tally.mean_kl,
                "perplexity": tally.perplexity,
                "perplexity_rise": tally.perplexity / base - 1,
                "top1_agreement": tally.top1,
            }
        )
        print(
            f"| {scheme.name} | {scheme.bits:g} | {tally.mean_kl:.5f} | {tally.perplexity:.3f} "
            f"| {tally.perplexity / base - 1:+.2%} | {tally.top1:.2%} |"
        )
    print(json.dumps({"model": arguments.model, "tokens": len(ids), "rows": rows}))


if __name__ == "__main__":
    main()
