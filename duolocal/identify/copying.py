"""The retrieval score: how often a head looks straight at the token being copied (Wu et al., arXiv 2404.15574).

Texts with passkeys, the answers teacher-forced. A head scores at a token of an answer when, of all it could look at,
its largest weight lies inside the passkey and on that very token. The score is the share of such tokens. Forward
passes only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from duolocal.identify.attention_probe import over_group, probe
from duolocal.identify.results import IdentifyProgress
from duolocal.identify.text import PasskeyShape, PasskeyText, PasskeyTexts
from duolocal.models.transformer import Transformer

SHAPE = PasskeyShape(num_passkeys=4, num_words=8)
# Lengths of the texts in shares of the longest; two texts of each, whose passkeys lie at depths of their own.
SHARES = (0.5, 0.75, 1.0)
TEXTS_PER_LENGTH = 2


@dataclass(frozen=True)
class CopyScores:
    """Over all copied tokens of all texts, each [num_layers, num_heads] float64."""

    hits: Tensor  # share of tokens whose source has the head's largest weight
    mass: Tensor  # mean weight on the source
    num_copied: int  # tokens

    def per_kv_head(self, num_kv_heads: int) -> tuple[Tensor, Tensor]:
        """Return the score and a secondary one, each [num_layers, num_kv_heads].

        The share of hits, of the query head in the group that has most; and likewise the weight, because most heads
        never hit and would tie.
        """
        return over_group(self.hits, num_kv_heads), over_group(self.mass, num_kv_heads)


def copy_texts(texts: PasskeyTexts, *, num_tokens: int, seed: int) -> list[PasskeyText]:
    """Return the texts for copy_scores; num_tokens is the length of the longest. Raises SettingsError where too few."""
    shortest = min(texts.least_tokens, num_tokens)
    return [
        texts.draw(max(round(share * num_tokens), shortest), f"copy {seed} {share} {index}")
        for share in SHARES
        for index in range(TEXTS_PER_LENGTH)
    ]


def copy_scores(
    transformer: Transformer, texts: Sequence[PasskeyText], *, tile: int | None = None
) -> Iterator[IdentifyProgress | CopyScores]:
    """Yield progress, a layer at a time, and at last the CopyScores of all texts together."""
    config = transformer.config
    hits = torch.zeros(config.num_layers, config.num_heads, dtype=torch.float64)
    mass = torch.zeros_like(hits)
    for number, text in enumerate(texts):
        watch = _Watch(text, hits, mass)
        for layers in probe(transformer, text.token_ids, watch, tile=tile):
            done, all_layers = number * config.num_layers + layers, len(texts) * config.num_layers
            yield IdentifyProgress(done, all_layers, "layers", f"passkeys, text {number + 1} of {len(texts)}")
    num_copied = sum(len(text.predicted_at) for text in texts)
    yield CopyScores(hits=hits / num_copied, mass=mass / num_copied, num_copied=num_copied)


class _Watch:
    """Counts into `hits` and adds up in `mass`, both [num_layers, num_heads]."""

    def __init__(self, text: PasskeyText, hits: Tensor, mass: Tensor) -> None:
        ids = text.token_ids
        self._hits, self._mass = hits, mass
        # A passkey may say a word twice: all places of the token in its passkey count as its source.
        self._sources = {
            at: torch.tensor([place for place in range(start, stop) if ids[place] == ids[at + 1]])
            for at, (start, stop) in zip(text.predicted_at, text.sources, strict=True)
        }

    def __call__(self, layer: int, positions: Tensor, weights: Tensor) -> None:
        first = int(positions[0])
        for at in positions.tolist():
            if at not in self._sources:
                continue
            row = weights[:, at - first]  # [num_heads, kv_len]
            source = self._sources[at].to(row.device)
            self._hits[layer] += torch.isin(row.argmax(-1), source).double().cpu()
            self._mass[layer] += row[:, source].double().sum(-1).cpu()
