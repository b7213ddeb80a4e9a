"""What `duolocal heads show` and `list` print: the layer × head map, in characters and as a picture."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from duolocal.commands.heads import Show
from duolocal.errors import ModelNotFoundError, SettingsError
from duolocal.heads import (
    KNOWN_PATTERNS,
    HeadPattern,
    HeadPlan,
    HeadsSpec,
    choose_heads,
    load_pattern,
    pattern_meant,
)
from duolocal.heads.known import LICENCE, SOURCE, pattern_called, published_pattern
from duolocal.models.loader import ModelSource, open_model
from duolocal.models.names import MODELS
from duolocal.models.registry import cached_path, resolve
from duolocal.paths import user_path
from duolocal.settings import LoadSettings
from duolocal.terminal.clean import clean_line
from duolocal.terminal.consoles import drawn, new_console, plain_text
from duolocal.terminal.pictures import heat_map
from duolocal.terminal.tables import new_table

# Two ways to tell a retrieval head from a streaming head without colour: its height, and its shape. Best first.
_RETRIEVAL, _STREAMING = "█▆▅▃", "▁·"
_LAYERS_PER_BLOCK = 16  # more of them stand side by side
_METHOD_SHOWN = 200  # characters


def show_heads(options: Show, settings: LoadSettings) -> int:
    """Print the map of a pattern (a path or published:NAME), or of the model's own. Fetches no model.

    The heads of `settings` are a ratio for a pattern. Raises DuoLocalError.
    """
    console, pattern, model, heads = new_console(), options.pattern, settings.model, settings.heads
    title = short_name(model if pattern is None else pattern)
    found, plan = _from_model(model, heads) if pattern is None else _from_pattern(pattern, heads)
    print_map(found, plan, console, title=title)
    if options.png is not None:
        path = draw_map(found, plan, options.png, title=title)
        console.print(f"picture: {clean_line(str(path))}", style="dim", soft_wrap=True)
    return 0


def short_name(name: str) -> str:
    """Return what a model or pattern is called in a title: of a path its last part."""
    path = user_path(name)
    return path.name if path.name and path.exists() else name


def list_published() -> int:
    """Print the models for which a pattern is published; return the exit code."""
    console = new_console()
    table = new_table("~model", ">layers × KV heads", ">ratio")
    for known in KNOWN_PATTERNS:
        shape = f"{known.shape.num_layers} × {known.shape.num_kv_heads}"
        table.add_row(known.hub, shape, f"{known.default_ratio:g}")
    console.print(table)
    console.print(
        f"From {SOURCE} ({LICENCE} licence), 7 KB each, fetched when asked for: --heads published for these models, "
        "--heads published:NAME for a model of another name.",
        style="dim",
    )
    return 0


def print_map(pattern: HeadPattern | None, plan: HeadPlan, console: Console, *, title: str) -> None:
    """Print what a plan is made of: how many heads, from where, the map, and the counts per layer.

    pattern: what the plan was cut from; None: no ranking, such as with all heads.
    """
    total = plan.num_layers * plan.num_kv_heads
    console.print(
        Text.assemble(
            (clean_line(title), "bold"),
            f": {plan.num_retrieval} of {total} KV heads are retrieval heads ({plan.num_retrieval / total:.0%}), "
            f"{plan.num_layers} layers × {plan.num_kv_heads}, sink {plan.sink_size}, recent {plan.recent_size}",
        )
    )
    console.print(Text(_origin(pattern, plan), style="dim"))
    marks = _marks(pattern, plan)
    console.print(_blocks(plan, marks, console.width, console.encoding))
    legend = (
        f"{_RETRIEVAL} retrieval heads, the best ranked first; {_STREAMING} streaming heads; then how many of the "
        "layer are retrieval heads"
    )
    if plain_text(console.encoding):
        legend = "# retrieval heads; . streaming heads; then how many of the layer are retrieval heads"
    console.print(Text(legend, style="dim"))
    counts = Counter(sum(row) for row in plan.retrieval)
    spread = ", ".join(f"{layers} with {count}" for count, layers in sorted(counts.items()))
    console.print(Text(f"layers by their retrieval heads: {spread}", style="dim"))


def draw_map(pattern: HeadPattern | None, plan: HeadPlan, path: str | Path, *, title: str) -> Path:
    """Draw the map as a PNG, one column per layer, retrieval heads framed; return its path. Raises SettingsError.

    Colour is the rank among all heads, not the score: scores of different methods have different scales.
    """
    shares = _rank_shares(pattern, plan)
    return heat_map(
        list(zip(*shares, strict=True)),  # [num_kv_heads][num_layers]: a model has more layers than KV heads
        path=path,
        x_labels=range(plan.num_layers),
        y_labels=range(plan.num_kv_heads),
        title=f"{title}: {plan.num_retrieval} of {plan.num_layers * plan.num_kv_heads} KV heads are retrieval heads "
        "(framed)",
        x_title="layer",
        y_title="KV head",
        vmin=0,
        vmax=1,
        outlined=list(zip(*plan.retrieval, strict=True)),
        bar_title="rank (1: first)",
    )


def _from_pattern(pattern: str, heads: str) -> tuple[HeadPattern | None, HeadPlan]:
    name = pattern.partition(":")
    found = published_pattern(pattern_called(name[2])) if name[0] == "published" and name[2] else load_pattern(pattern)
    ratio = HeadsSpec.parse(heads).ratio
    return found, found.cut(found.default_ratio if ratio is None else ratio)


def _from_model(model: str, heads: str) -> tuple[HeadPattern | None, HeadPlan]:
    from duolocal.engine.head_choice import published_for

    source = open_cached(model)
    published = published_for(source, model)
    pattern, _ = pattern_meant(heads, fingerprint=source.fingerprint, published=published)
    if pattern is None and heads == "auto":
        hint = f", or --heads published for that of {published.name}" if published else ""
        raise SettingsError(
            f"no head pattern is known for {model} yet: `duolocal heads identify --model {model}` finds one{hint}"
        )
    choice = choose_heads(
        heads,
        num_layers=source.config.num_layers,
        num_kv_heads=source.config.num_kv_heads,
        fingerprint=source.fingerprint,
        published=published,
    )
    return pattern, choice.plan


def open_cached(model: str) -> ModelSource:
    """Open a model that is on this machine; looking at heads is no reason to fetch gigabytes."""
    path = cached_path(model)
    if path is None:
        if model in MODELS:
            raise ModelNotFoundError(f"{model} is not on this machine: `duolocal models fetch {model}`")
        path = resolve(model, offline=True)
    return open_model(path)


def _origin(pattern: HeadPattern | None, plan: HeadPlan) -> str:
    if pattern is None:
        return clean_line(plan.source)
    parts = [f"from {pattern.source}"]
    if pattern.method:
        method = pattern.method if len(pattern.method) <= _METHOD_SHOWN else pattern.method[: _METHOD_SHOWN - 1] + "…"
        parts.append(f"method: {method}")
    if pattern.seed is not None:
        parts.append(f"seed {pattern.seed}")
    flat = [score for row in pattern.scores for score in row]
    scores = f"scores {min(flat):.3g} to {max(flat):.3g}"
    if 0 < plan.num_retrieval < len(flat):
        layer, head = pattern.ranking()[plan.num_retrieval - 1]
        last = pattern.scores[layer][head]
        tied = flat.count(last)
        scores += f", the last retrieval head has {last:.3g}" + (f" as {tied - 1} others" if tied > 1 else "")
    return clean_line("; ".join([*parts, scores]))


def _rank_shares(pattern: HeadPattern | None, plan: HeadPlan) -> list[list[float]]:
    """Return per head where it stands in the ranking, 1 the first, 0 the last; [num_layers][num_kv_heads]."""
    if pattern is None:
        return [[float(flag) for flag in row] for row in plan.retrieval]
    ranked = pattern.ranking()
    shares = [[0.0] * plan.num_kv_heads for _ in range(plan.num_layers)]
    for place, (layer, head) in enumerate(ranked):
        shares[layer][head] = 1 - place / max(1, len(ranked) - 1)
    return shares


def _marks(pattern: HeadPattern | None, plan: HeadPlan) -> list[list[str]]:
    """Return a character per head: its class, and roughly where it stands among those of its class."""
    shares = _rank_shares(pattern, plan)
    marks = [["" for _ in row] for row in shares]
    for flag, characters in ((True, _RETRIEVAL), (False, _STREAMING)):
        places = sorted(
            ((layer, head) for layer, row in enumerate(plan.retrieval) for head, is_ in enumerate(row) if is_ is flag),
            key=lambda at: (-shares[at[0]][at[1]], at),
        )
        for place, (layer, head) in enumerate(places):
            level = 0 if pattern is None else place * len(characters) // len(places)
            marks[layer][head] = characters[level]
    return marks


def _blocks(plan: HeadPlan, marks: Sequence[Sequence[str]], width: int, encoding: str) -> Text:
    """Lay out the layers in rows, several blocks side by side where they fit."""
    wide = 2 if plan.num_kv_heads <= 16 else 1  # columns per head
    digits = len(str(plan.num_kv_heads))
    label = max(5, len(str(plan.num_layers - 1)))
    block = label + 2 + wide * plan.num_kv_heads + 1 + digits
    gap = 3
    beside = max(1, min(-(-plan.num_layers // _LAYERS_PER_BLOCK), (width + gap) // (block + gap)))
    rows = -(-plan.num_layers // beside)
    text = Text(no_wrap=True, overflow="crop")
    heading = f"{'layer':>{label}}  ".ljust(block)
    text.append((heading + " " * gap) * (beside - 1) + heading.rstrip() + "\n", "dim")
    for row in range(rows):
        layers = range(row, plan.num_layers, rows)
        for at, layer in enumerate(layers):
            text.append((" " * gap if at else "") + f"{layer:>{label}}  ", "dim")
            for head, mark in enumerate(marks[layer]):
                style = "cyan" if plan.retrieval[layer][head] else "bright_black"
                text.append(drawn(mark, encoding).ljust(wide), style)
            text.append(f" {sum(plan.retrieval[layer]):>{digits}}")
        text.append("\n" if row + 1 < rows else "")
    return text
