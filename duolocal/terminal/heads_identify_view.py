"""`duolocal heads identify`: progress while heads are ranked, the pattern file, and a report on it."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from duolocal.commands.heads import Identify
from duolocal.engine.head_choice import as_pattern
from duolocal.engine.loading import loader_for_ranking
from duolocal.engine.place import device_named
from duolocal.errors import SettingsError
from duolocal.heads import (
    UNMEASURED_RATIO,
    HeadPattern,
    load_pattern,
    remember_pattern,
    remembered_file,
    remembered_pattern,
    save_pattern,
    shipped_pattern,
)
from duolocal.heads.published import SCORES_FILE
from duolocal.identify import IdentifyProgress, agreement, identify
from duolocal.models.loader import ModelSource, open_model
from duolocal.paths import user_path
from duolocal.settings import LoadSettings
from duolocal.terminal import figures
from duolocal.terminal.clean import clean_line
from duolocal.terminal.consoles import new_console, progress_console, resumable
from duolocal.terminal.fetching import fetch
from duolocal.terminal.heads_view import draw_map, print_map, short_name
from duolocal.terminal.progress import Bar, bar
from duolocal.terminal.tables import new_table

TOP = 0.5  # the halves that are compared


def identify_heads(options: Identify, settings: LoadSettings) -> int:
    """Rank the heads of a model, write the pattern, print a report whose last line is one JSON object."""
    console, progress, method, out = new_console(), progress_console(), options.method, options.out
    published = None if options.format is None else options.format == "published"
    others = [(Path(path).name or path, load_pattern(path)) for path in options.compare]
    folder = _check_place(out, published)
    source = open_model(fetch(settings.model, progress))
    _check_shapes(others, source)
    shipped = shipped_pattern(source.fingerprint)
    if out is None and shipped is not None:
        raise SettingsError(f"a pattern ships for {settings.model}, which --heads auto takes: give --out FILE")
    before = remembered_pattern(source.fingerprint)
    state_file = _state_file(out, source, method)
    pattern, place = None, None
    with (
        resumable(console, state_file, f"from {state_file}"),
        bar(progress, f"{method}: loading {clean_line(settings.model)}", "layers") as shown,
    ):
        for event in identify(
            source,
            loader_for_ranking(source, settings, shown),
            method=method,
            device=device_named(settings.device),
            sink_size=settings.sink_size,
            recent_size=settings.recent_size,
            seed=options.seed,
            num_tokens=options.tokens,
            steps=options.steps,
            text_share=options.text_share,
            pressure=options.pressure,
            state_file=state_file,
        ):
            if isinstance(event, IdentifyProgress):
                _show(event, shown, method)
                continue
            # Written before anything else is asked of the generator: then it deletes its state.
            pattern = as_pattern(
                event,
                source="this run",
                model=settings.model,
                default_ratio=UNMEASURED_RATIO if options.default_ratio is None else options.default_ratio,
            )
            if out is None:
                place = remember_pattern(pattern, source.fingerprint)
            else:
                place = save_pattern(pattern, out, published=folder)
            elapsed_s = event.elapsed_s
    assert pattern is not None and place is not None
    pattern = replace(pattern, source=str(place))
    plan = pattern.cut(pattern.default_ratio)
    title = f"{short_name(settings.model)}, {method}"
    print_map(pattern, plan, console, title=title)
    if shipped is not None:
        others.append(("shipped", shipped))
    if before is not None:
        others.append((f"kept before ({before.method})", before))
    compared = _compare(pattern, others)
    _print_agreement(compared, console)
    picture = _picture_path(options.png, out, place, folder)
    if picture is not None:
        draw_map(pattern, plan, picture, title=title)
        console.print(f"picture: {clean_line(str(picture))}", style="dim", soft_wrap=True)
    took = figures.duration(elapsed_s)
    if out is None:
        console.print(f"kept for this model in {took}: --heads auto takes it from now on", soft_wrap=True)
    else:
        console.print(f"written in {took}: use it with --heads {clean_line(str(place))}", soft_wrap=True)
    report = {
        "identification": method,
        "model": settings.model,
        "seed": options.seed,
        "seconds": round(elapsed_s, 1),
        "pattern": str(place),
        "picture": None if picture is None else str(picture),
        "retrieval_heads": plan.num_retrieval,
        "heads": plan.num_layers * plan.num_kv_heads,
        "details": dict(pattern.details),
        "agreement": compared,
    }
    print(json.dumps(report))
    return 0


def _check_place(out: str | None, published: bool | None) -> bool:
    """Say whether `out` is a folder; refuse, before hours of work, a place that cannot or should not be written."""
    if out is None:
        return False
    path = user_path(out)
    folder = published if published is not None else out.endswith(("/", "\\")) or path.is_dir()
    parent = path.parent
    if not folder and path.is_dir():
        raise SettingsError(f"--out {out} is a folder: give a file, or leave out --format json")
    if not folder and not parent.is_dir():
        raise SettingsError(f"--out {out}: there is no folder {parent}: make it first")
    existing = path / SCORES_FILE if folder else path
    if existing.exists():
        try:
            load_pattern(path)
        except SettingsError:
            raise SettingsError(f"--out {out} exists and is no head pattern: name another file, or remove it") from None
    elif folder and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise SettingsError(f"--out {out} exists and is no head pattern: name another folder, or remove it")
    return folder


def _check_shapes(others: Sequence[tuple[str, HeadPattern]], source: ModelSource) -> None:
    shape = (source.config.num_layers, source.config.num_kv_heads)
    for name, other in others:
        if (other.num_layers, other.num_kv_heads) != shape:
            raise SettingsError(
                f"--compare {name} is for {other.num_layers} layers × {other.num_kv_heads} KV heads, "
                f"but the model has {shape[0]} × {shape[1]}"
            )


def _state_file(out: str | None, source: ModelSource, method: str) -> Path | None:
    """Return where a method that can go on keeps how far it is: beside the pattern."""
    suffixes = {"distill": ".state.json", "drift": ".state.safetensors"}
    if method not in suffixes:
        return None
    if out is None:
        path = remembered_file(source.fingerprint)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.with_suffix(suffixes[method])
    path = user_path(out)
    return path.with_name(path.name + suffixes[method])


def _show(event: IdentifyProgress, shown: Bar, method: str) -> None:
    words = f"{method}: {event.doing}"
    if event.loss is not None and not math.isnan(event.loss):
        words += f", loss {event.loss:.3g}"
    if event.open_share is not None:
        words += f", {event.open_share:.0%} of gates open"
    shown.describe(words)
    shown.update(event.done, event.total, unit=event.unit)


def _compare(pattern: HeadPattern, others: Sequence[tuple[str, HeadPattern]]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for name, other in others:
        if (other.num_layers, other.num_kv_heads) != (pattern.num_layers, pattern.num_kv_heads):
            continue  # remembered by an older reader; files given by name were checked
        found = agreement(pattern.scores, other.scores, TOP, secondary_a=pattern.secondary, secondary_b=other.secondary)
        rows.append(
            {
                "with": name,
                "overlap": round(found.overlap, 4),
                "chance": round(found.chance, 4),
                "spearman": None if math.isnan(found.spearman) else round(found.spearman, 4),
            }
        )
    return rows


def _print_agreement(rows: Sequence[dict[str, object]], console: Console) -> None:
    if not rows:
        return
    table = new_table("~agreement with", ">top halves share", ">by chance", ">rank correlation")
    for row in rows:
        spearman = "-" if row["spearman"] is None else f"{row['spearman']:.2f}"
        table.add_row(Text(clean_line(str(row["with"]))), f"{row['overlap']:.0%}", f"{row['chance']:.0%}", spearman)
    console.print(table)


def _picture_path(png: str | None, out: str | None, place: Path, folder: bool) -> Path | None:
    if png == "none" or (png is None and out is None):
        return None
    if png is not None:
        return user_path(png)
    return place / "heads.png" if folder else place.with_suffix(".png")
