"""What settings were measured to cost a model: shipped for some, remembered from a first use for others.

Owns `measured.json` and the figures that stand in for a model that nobody measured: they decide what is tried first,
and are never told as its cost.
"""

import functools
import importlib.resources
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from duolocal.files import JsonCache
from duolocal.models.registry import models_folder
from duolocal.plan.dials import FREE_OF_COST, Cost
from duolocal.quant.kv import KV_FORMATS

_STAND_IN = "smollm2-135m"  # measured in every dial


@dataclass(frozen=True)
class Measured:
    """Costs on one model, by setting; kv: the smallest format that passed, None where none was measured."""

    kv: str | None = None
    kv_costs: Mapping[str, Cost] = field(default_factory=dict)
    head_costs: Mapping[float, Cost] = field(default_factory=dict)  # by share of retrieval heads
    outer_costs: Mapping[str, Cost] = field(default_factory=dict)

    def of_kv(self, name: str) -> Cost:
        """Return what a KV format costs."""
        if name in ("32", "16"):
            return FREE_OF_COST
        return self.kv_costs.get(name) or _stand_in(_shipped_as(_STAND_IN).kv_costs.get(name, FREE_OF_COST))

    def of_heads(self, share: float) -> Cost:
        """Return what a share of retrieval heads costs; between measured shares a straight line."""
        if share == 1:
            return FREE_OF_COST
        if share in self.head_costs:
            return self.head_costs[share]
        known = {**(self.head_costs or _shipped_as(_STAND_IN).head_costs), 1.0: FREE_OF_COST}
        below = max((one for one in known if one <= share), default=min(known))
        above = min((one for one in known if one >= share), default=1.0)
        part = 0.0 if above == below else (share - below) / (above - below)

        def between(low: float, high: float) -> float:
            return low + part * (high - low)

        return Cost(
            between(known[below].kl, known[above].kl),
            between(known[below].perplexity_rise, known[above].perplexity_rise),
            measured=False,
        )

    def of_outer(self, name: str) -> Cost:
        """Return what a format of lm_head and embedding costs."""
        if name == "auto":
            return FREE_OF_COST
        return self.outer_costs.get(name) or _stand_in(_shipped_as(_STAND_IN).outer_costs[name])


def measured(fingerprint: str | None) -> Measured:
    """Return what is known of the model with these weights; None: of one that is not here, which is nothing."""
    if fingerprint is None:
        return Measured()
    for entry in _entries():
        if fingerprint in entry["fingerprints"]:
            return _read(entry)
    return _remembered(fingerprint)


def shipped_kv(fingerprint: str) -> str | None:
    """Return the verdict on KV formats that ships for these weights."""
    return next((entry["kv"] for entry in _entries() if fingerprint in entry["fingerprints"]), None)


def remembered_kv(fingerprint: str) -> str | None:
    """Return the verdict that was kept on this machine; None where it is absent or damaged, and measured again."""
    return _remembered(fingerprint).kv


def remember_kv(fingerprint: str, kv: str, results: list[dict[str, Any]]) -> None:
    """Keep a verdict; a cache folder that cannot be written only means measuring again."""
    _cache().put(fingerprint, {"kv": kv, "results": results})


def _remembered(fingerprint: str) -> Measured:
    entry = _cache().get(fingerprint)
    if not isinstance(entry, dict) or entry.get("kv") not in KV_FORMATS:
        return Measured()
    try:
        costs = {
            row["kv"]: Cost(_number(row["mean_kl"]), _number(row["perplexity_rise"]), measured=True)
            for row in entry["results"]
        }
    except (KeyError, TypeError, ValueError):
        costs = {}
    return Measured(entry["kv"], costs)


def _number(value: Any) -> float:
    """Return a figure; of a cache that broke the model (not a number) infinity."""
    return math.inf if math.isnan(value) else float(value)


def _cache() -> JsonCache:
    return JsonCache(models_folder() / "kv-formats.json")


@functools.cache
def _entries() -> list[dict[str, Any]]:
    return json.loads(importlib.resources.files("duolocal.engine").joinpath("measured.json").read_text())["models"]


def _shipped_as(model: str) -> Measured:
    return _read(next(entry for entry in _entries() if entry["model"] == model))


def _read(entry: dict[str, Any]) -> Measured:
    def costs(rows: Mapping[str, list[float]]) -> dict[str, Cost]:
        return {name: Cost(kl, rise, measured=True) for name, (kl, rise) in rows.items()}

    heads = {float(share): cost for share, cost in costs(entry["heads"]).items()}
    return Measured(entry["kv"], costs(entry["kv_formats"]), heads, costs(entry.get("outer_weights", {})))


def _stand_in(cost: Cost) -> Cost:
    return Cost(cost.kl, cost.perplexity_rise, measured=False)
