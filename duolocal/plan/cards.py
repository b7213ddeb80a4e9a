"""GPUs by name: memory, bandwidth and arithmetic as their makers publish them, and what is assumed of them.

The figures are those of NVIDIA's data sheets: memory bandwidth, and dense (not sparse) 16-bit products that are summed
in 32 bits. None was measured here. What share of them a program reaches is assumed below, for want of measurements.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from duolocal.errors import SettingsError
from duolocal.plan.duration import Rates

# Assumed shares of the published figures.
BANDWIDTH_SHARE = 0.7  # decode: reading weights and blocks
PRODUCT_SHARE = 0.5  # prefill: products with 4-bit weights, decoded on the way
ATTENTION_SHARE = 0.4  # prefill: attention over decoded blocks
LINK_SHARE = 0.8  # of PCIe's bytes
STEP_S = 0.0003  # of a decode step, beside reading: launching, sampling


@dataclass(frozen=True)
class Card:
    """A GPU as published."""

    name: str
    memory_gb: int  # 10^9 bytes are sold as 2^30
    bandwidth: float  # bytes/s
    flops: float  # dense 16-bit products summed in 32 bits, FLOP/s
    link: float  # bytes/s of PCIe, one way

    @property
    def memory_bytes(self) -> int:
        return self.memory_gb * 2**30


_PCIE4, _PCIE5 = 31.5e9, 63e9
_CARDS = (
    Card("rtx3090", 24, 936e9, 71e12, _PCIE4),
    Card("rtx4080", 16, 717e9, 97.5e12, _PCIE4),
    Card("rtx4090", 24, 1008e9, 165e12, _PCIE4),
    Card("rtx5090", 32, 1792e9, 209.5e12, _PCIE5),
    Card("a10", 24, 600e9, 125e12, _PCIE4),
    Card("l4", 24, 300e9, 121e12, _PCIE4),
    Card("a6000", 48, 768e9, 155e12, _PCIE4),
    Card("l40s", 48, 864e9, 362e12, _PCIE4),
    Card("a100-40gb", 40, 1555e9, 312e12, _PCIE4),
    Card("a100", 80, 2039e9, 312e12, _PCIE4),
    Card("h100", 80, 3350e9, 989e12, _PCIE5),
    Card("h200", 141, 4800e9, 989e12, _PCIE5),
)
CARDS: Mapping[str, Card] = MappingProxyType({card.name: card for card in _CARDS})


def card_named(name: str) -> Card:
    """Return a card of the table; raises SettingsError naming the nearest, or all."""
    card = CARDS.get(name.lower().replace(" ", "").replace("_", "-"))
    if card is None:
        close = difflib.get_close_matches(name.lower(), CARDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"give one of {', '.join(CARDS)}"
        raise SettingsError(f"--card {name!r} is not in the table: {hint}")
    return card


def card_rates(card: Card) -> Rates:
    """Return what is expected of a card by its published figures and the shares assumed above."""
    return Rates(
        products=card.flops * PRODUCT_SHARE,
        attention=card.flops * ATTENTION_SHARE,
        weights=card.bandwidth * BANDWIDTH_SHARE,
        blocks=card.bandwidth * BANDWIDTH_SHARE,
        output=card.bandwidth * BANDWIDTH_SHARE,
        step_s=STEP_S,
        link=card.link * LINK_SHARE,
        source=(
            f"computed for {card.name} from published figures ({card.bandwidth / 1e9:,.0f} GB/s, "
            f"{card.flops / 1e12:,.0f} TFLOP/s dense 16-bit), of which {BANDWIDTH_SHARE:.0%} of the bandwidth, "
            f"{PRODUCT_SHARE:.0%} of the products and {ATTENTION_SHARE:.0%} in attention are assumed"
        ),
        measured=False,
    )
