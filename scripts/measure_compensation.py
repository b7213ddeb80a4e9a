"""Measure whether RazorAttention's compensation token helps (arXiv 2407.15891, section 3.2): docs/quality.md.

A streaming head gets one more key and value: the mean of all that fell out of its window, weighing as many tokens as
fell out ("counted") or one ("single"). Every head of the product's own pattern, sinks and window exact; compared with
the dense model over the same windows of real text.

    python scripts/measure_compensation.py [--model smollm2-135m] [--ratios 0.5,0.25] [--tokens 8192 --context 2048]
"""

import argparse
import json
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from duolocal.evaluate.compare import cut_windows
from duolocal.heads import HeadPlan, plan_heads
from duolocal.models.loader import open_model
from duolocal.models.observe import Attention, ObservedCache, full_attention, layer_by_layer
from duolocal.models.registry import resolve
from duolocal.models.transformer import Transformer
from duolocal.sample_text import license_text, sample_text
from duolocal.tokenizer import load_tokenizer

KINDS = ("none", "counted", "single")
QUERY_TILE = 512


def compensated(flags: Sequence[bool], plan: HeadPlan, kind: str) -> Attention:
    """Return a layer's attention over a whole window fed at once, in float32: the visible is chosen by masks."""

    def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        out = full_attention(q, k, v, positions)
        for head, retrieval in enumerate(flags):
            if not retrieval:
                out[head] = _streaming(q[head], k[head], v[head], plan, kind)
        return out

    return attention


def _streaming(q: Tensor, k: Tensor, v: Tensor, plan: HeadPlan, kind: str) -> Tensor:
    """Attend from q [group, n, head_dim] to the window of k and v [n, head_dim] and to what stands for the rest."""
    n, sink, recent = len(k), plan.sink_size, plan.recent_size
    count = (torch.arange(n) - recent + 1 - sink).clamp_min(0)  # tokens fallen out, for every query
    dropped_k, dropped_v = (_mean_of_dropped(x, count, sink) for x in (k, v))
    scale = 1 / math.sqrt(k.shape[1])
    j, tiles = torch.arange(n), []
    for start in range(0, n, QUERY_TILE):
        rows = slice(start, start + QUERY_TILE)
        i = torch.arange(n)[rows, None]
        seen = (j <= i) & ((j < sink) | (i - j < recent))
        scores = (q[:, rows] @ k.T * scale).masked_fill(~seen, -math.inf)  # [group, t, n]
        if kind == "none":
            tiles.append(scores.softmax(-1) @ v)
            continue
        extra = (q[:, rows] * dropped_k[rows]).sum(-1) * scale
        if kind == "counted":
            extra = extra + count[rows].clamp_min(1).log()
        extra = extra.masked_fill(count[rows] == 0, -math.inf)
        weights = torch.cat((scores, extra[..., None]), -1).softmax(-1)
        tiles.append(weights[..., :-1] @ v + weights[..., -1:] * dropped_v[rows])
    return torch.cat(tiles, 1)


def _mean_of_dropped(x: Tensor, count: Tensor, sink: int) -> Tensor:
    """Return for every query the mean of x[sink : sink + count]."""
    sums = torch.cat((torch.zeros(1, x.shape[1], dtype=torch.float64), x[sink:].double().cumsum(0)))
    return (sums[count] / count.clamp_min(1)[:, None]).to(x.dtype)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description="Measure RazorAttention's compensation token.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--ratios", default="0.5,0.25")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--context", type=int, default=2048)
    options = parser.parse_args()
    source = open_model(resolve(options.model))
    config, cpu = source.config, torch.device("cpu")
    weights = source.load(device=cpu, dtype=torch.float32)
    model = Transformer(config, weights, context=options.context, device=cpu, dtype=torch.float32)
    tokenizer = load_tokenizer(source)
    plans = {
        ratio: plan_heads(ratio, num_layers=config.num_layers, num_kv_heads=config.num_kv_heads,
                          fingerprint=source.fingerprint)[0]
        for ratio in ("all", *options.ratios.split(","))
    }  # fmt: skip
    for name, text in (("licences", license_text()), ("help", sample_text())):
        windows = cut_windows(tokenizer.encode(text), num_tokens=options.tokens, context=options.context)
        kl: dict[tuple[str, str], list[float]] = {}
        rise: dict[tuple[str, str], list[float]] = {}
        for window in windows:
            ids = torch.tensor(window)

            def log_probs(plan: HeadPlan, kind: str, ids: Tensor = ids) -> Tensor:
                *_, (x,) = layer_by_layer(
                    model, ids, lambda layer: ObservedCache(compensated(plan.retrieval[layer], plan, kind))
                )
                return model.logits(model.final_norm(x)[:-1]).log_softmax(-1)

            dense = log_probs(plans["all"], "none")
            chances = dense.exp()
            for ratio in options.ratios.split(","):
                for kind in KINDS:
                    mine = log_probs(plans[ratio], kind)
                    kl.setdefault((ratio, kind), []).append(float((chances * (dense - mine)).sum(-1).mean()))
                    rise.setdefault((ratio, kind), []).append(float((dense - mine).gather(1, ids[1:, None]).mean()))
        for ratio, kind in kl:
            figures = {
                "text": name,
                "ratio": ratio,
                "compensation": kind,
                "kl": sum(kl[ratio, kind]) / len(windows),
                "perplexity_rise": math.expm1(sum(rise[ratio, kind]) / len(windows)),
                "predictions": len(windows) * (options.context - 1),
            }
            print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
