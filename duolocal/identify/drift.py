"""Drift: how far a layer's result moves when a KV head sees its window only. A method of duolocal's own.

At tokens beyond the window, each head's attention is computed twice, over everything and over sinks and recent
tokens, and the difference is taken through the output projection:

    score(h) = mean over tokens of ‖W_o,h (full_h - streaming_h)‖ / ‖x‖,  x: the layer's result, h: a KV head's group

so a head counts by what its loss does to the model, and not by where it looks. On a text with passkeys (`text.py`), at
every TEXT_STRIDE-th token of it and at all answers: echo and copy see only heads that repeat something, and miss those
of the first layers that average over the whole context, without which text far from its beginning is read worse
(docs/quality.md). Forward passes only; memory grows with the text, never with its square.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from duolocal.identify.results import IdentifyProgress
from duolocal.identify.text import PasskeyText
from duolocal.models.layer_state import NOT_KEPT, LayerState
from duolocal.models.observe import ObservedCache, full_attention, layer_by_layer, streaming_attention
from duolocal.models.transformer import Transformer

TEXTS = 1
TEXT_STRIDE = 16  # as good as every token (docs/quality.md)


@dataclass(frozen=True)
class DriftScores:
    """Mean relative drift over all texts, each [num_layers, num_kv_heads] float64."""

    at_text: Tensor
    at_answers: Tensor

    @property
    def score(self) -> Tensor:
        return self.at_text + self.at_answers


@torch.inference_mode()
def drift_scores(
    transformer: Transformer,
    texts: Sequence[PasskeyText],
    *,
    sink_size: int,
    recent_size: int,
    kept: LayerState = NOT_KEPT,
) -> Iterator[IdentifyProgress | DriftScores]:
    """Yield progress, a layer at a time, and at last the DriftScores, of texts longer than the window.

    kept: of the same model, texts and window: goes on from what it holds, and keeps what stands between layers.
    """
    config, device = transformer.config, transformer.device
    done, tensors = kept.read()
    sums = tensors.get("sums", torch.zeros(2, config.num_layers, config.num_kv_heads, dtype=torch.float64))
    for number in range(done // config.num_layers, len(texts)):
        text, layers = texts[number], done % config.num_layers
        ids = torch.tensor(text.token_ids, dtype=torch.int64, device=device)
        around = torch.arange(sink_size + recent_size, text.predicted_at[0], TEXT_STRIDE)
        rows = torch.cat((around, torch.tensor(text.predicted_at))).to(device)
        watched = _Watched(rows, sink_size=sink_size, recent_size=recent_size)
        after = (layers, [tensors["x"].to(device)]) if layers else None
        passes = layer_by_layer(transformer, ids, lambda _: ObservedCache(watched.attend), after=after)  # noqa: B023
        for layer, (x,) in enumerate(passes, start=layers):
            moved = _through_output(transformer, layer, watched.difference)  # [num_kv_heads, rows]
            relative = (moved / x[rows].to(moved.dtype).norm(dim=-1)).double().cpu()
            for kind, of_kind in enumerate(relative.split([len(around), len(text.predicted_at)], 1)):
                sums[kind, layer] += of_kind.mean(-1)
            done += 1
            kept.keep(done, lambda: {"sums": sums, "x": x})  # noqa: B023
            total = len(texts) * config.num_layers
            yield IdentifyProgress(done, total, "layers", f"drift, text {number + 1} of {len(texts)}")
    at_text, at_answers = sums / len(texts)
    yield DriftScores(at_text=at_text, at_answers=at_answers)


def _through_output(transformer: Transformer, layer: int, difference: Tensor) -> Tensor:
    """Return the length of what each KV head's group adds to the layer's result: [num_kv_heads, rows].

    difference: [num_kv_heads, group, rows, head_dim].
    """
    weight = transformer.weights.layers[layer].o_proj.weight.dequantize(difference.dtype)  # [hidden_size, q_size]
    groups = difference.transpose(1, 2).flatten(2)  # [num_kv_heads, rows, group * head_dim]
    columns = weight.unflatten(1, (len(groups), -1)).unbind(1)  # of each KV head [hidden_size, group * head_dim]
    wide = torch.promote_types(difference.dtype, torch.float32)
    return torch.stack([(g @ c.T).to(wide).norm(dim=-1) for g, c in zip(groups, columns, strict=True)])


class _Watched:
    """Full attention; `difference` is what a window would miss of the last, at the positions `rows`.

    [num_kv_heads, group, rows, head_dim].
    """

    difference: Tensor

    def __init__(self, rows: Tensor, *, sink_size: int, recent_size: int) -> None:
        self._rows = rows
        self._window = {"sink_size": sink_size, "recent_size": recent_size}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        full, rows = full_attention(q, k, v, positions), self._rows
        self.difference = full[:, :, rows] - streaming_attention(q[:, :, rows], k, v, **self._window, positions=rows)
        return full
