"""What the views of `duolocal eval` share: loading with progress, naming settings, shades."""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from duolocal.evaluate import Lineup, Setting
from duolocal.heads import HeadPlan
from duolocal.models.loader import ModelSource, open_model
from duolocal.models.outer_weights import quantize_outer
from duolocal.models.quantized import quantize_on_load
from duolocal.sample_text import license_text
from duolocal.settings import LoadSettings
from duolocal.terminal.clean import clean_line
from duolocal.terminal.consoles import drawn, new_console, progress_console
from duolocal.terminal.fetching import fetch
from duolocal.terminal.progress import bar

# From certain to unlikely, by the probability of each token of the right answer; they can be told apart without colour.
_SHADES = (
    (0.8, "██", "green"),
    (0.6, "▓▓", "cyan"),
    (0.4, "▒▒", "yellow"),
    (0.2, "░░", "magenta"),
    (-1.0, "··", "red"),
)
PIPED_COLUMNS = 120  # where nobody says how wide the paper is: no figure is cut off
LEGEND = "██ 80% or more for each token of the right answer, ▓▓ 60, ▒▒ 40, ░░ 20, ·· less; beside it the NLL; ✗ missed"


def eval_consoles() -> tuple[Console, Console]:
    """Return the consoles for results and for progress."""
    console = new_console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED_COLUMNS
    return console, progress_console()


def haystack(chosen: tuple[str, str] | None) -> tuple[str, str]:
    """Return the text that is read and its name: what was chosen, or the licences that come with torch."""
    return chosen or (license_text(), "licences")


def open_source(settings: LoadSettings, progress: Console) -> ModelSource:
    """Find or fetch the model, and open it."""
    source = open_model(fetch(settings.model, progress))
    return quantize_outer(quantize_on_load(source, settings.weights), settings.outer_weights)


def load_lineup(
    source: ModelSource,
    settings: LoadSettings,
    choices: Sequence[Setting],
    *,
    context: int,
    side_by_side: bool,
    progress: Console,
) -> Lineup:
    """Load the weights once for all choices; context: tokens of the longest cache."""
    with bar(progress, f"loading {clean_line(settings.model)}", "layers") as shown:
        return Lineup.load(source, choices, settings, context=context, side_by_side=side_by_side, events=shown)


def print_choices(lineup: Lineup, console: Console) -> None:
    """Say which heads and windows the names stand for, and what the engine has to note."""
    names: dict[HeadPlan, list[str]] = {}
    for choice in lineup.choices:
        names.setdefault(choice.plan, []).append(choice.name)
    for plan, sharing in names.items():
        text = f"{', '.join(sharing)}: {plan.num_retrieval} retrieval and {plan.num_streaming} streaming heads"
        window = f", sink {plan.sink_size}, recent {plan.recent_size}" if plan.num_streaming else ""
        console.print(Text(clean_line(f"{text}{window} ({plan.source})"), style="dim"))
    console.print(Text("dense: all heads, 16 bits", style="dim"))
    for note in lineup.notes:
        console.print(Text(clean_line(note), style="dim"))


def choices_report(lineup: Lineup, context: int) -> dict[str, dict[str, Any]]:
    """Return what each name stands for, as JSON holds it; the KV bytes are those of `context` tokens."""
    return {
        choice.name: {
            "heads": choice.setting.heads,
            "kv": choice.kv,
            **choice.plan.report(),
            "pattern": choice.plan.source,
            "kv_bytes": lineup.kv_bytes(choice, context),
            "kv_bytes_per_further_token": lineup.bytes_per_token(choice),
        }
        for choice in lineup.choices
    }


def shaded(nll: float, *, found: bool) -> Text:
    """Return a cell of a heat map: a shade for the right answer's likelihood, its NLL, a mark where it was missed."""
    likelihood = math.exp(-nll) if math.isfinite(nll) else 0.0
    shade, style = next((shade, style) for least, shade, style in _SHADES if likelihood >= least)
    return Text.assemble((shade, style), f" {nll:.2f}", ("  " if found else " ✗", "bold red"))


def bars(value: float, most: float, width: int = 24) -> str:
    """Return a bar whose length is value / most of `width` columns, in eighths."""
    eighths = 0 if most <= 0 else round(8 * width * min(1.0, max(0.0, value) / most))
    return drawn("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip())


def picture_for(path: Path, name: str, *, alone: bool) -> Path:
    """Return where the picture of one setting goes: `path`, or with the name before its ending where there are more."""
    if alone:
        return path
    return path.with_name(f"{path.stem}-{re.sub(r'[^A-Za-z0-9.+]+', '-', name).strip('-')}{path.suffix or '.png'}")
