"""The tables and heat maps of `duolocal eval passkey|niah|multihop`; the last line is one JSON object."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.columns import Columns
from rich.console import Console
from rich.text import Text

from duolocal.commands.eval import Multihop, Niah, Passkey, Variants
from duolocal.evaluate import Choice, Lineup, Outcome, Prompt, Score, ask, passkey_prompts, score
from duolocal.evaluate.grid import cells, places
from duolocal.evaluate.tasks import TASKS, niah_prompts
from duolocal.settings import LoadSettings
from duolocal.sizes import format_tokens
from duolocal.terminal.clean import clean_line
from duolocal.terminal.consoles import print_prose
from duolocal.terminal.eval_parts import (
    LEGEND,
    choices_report,
    eval_consoles,
    haystack,
    load_lineup,
    open_source,
    picture_for,
    print_choices,
    shaded,
)
from duolocal.terminal.pictures import heat_map
from duolocal.terminal.progress import bar
from duolocal.terminal.tables import add_columns, new_table
from duolocal.tokenizer import Tokenizer, load_tokenizer

ANSWER_SHOWN = 12  # characters: enough for a passkey, and two columns fit into 80
_MAKERS: dict[str, Callable[..., Sequence[Prompt]]] = {"passkey": passkey_prompts, "niah": niah_prompts}

Runs = dict[str, list[Outcome]]


def passkey(options: Passkey, variants: Variants, settings: LoadSettings) -> int:
    """Print which hidden numbers the model finds, by setting and beside dense; return the exit code."""
    return _grid("passkey", options, variants, settings, dense=not options.no_dense)


def niah(options: Niah, variants: Variants, settings: LoadSettings) -> int:
    """Print which hidden facts the model finds, by setting and beside dense; return the exit code."""
    return _grid("niah", options, variants, settings, dense=True)


def _grid(task: str, options: Passkey | Niah, variants: Variants, settings: LoadSettings, *, dense: bool) -> int:
    console, progress = eval_consoles()
    text, lengths, png = haystack(options.text), options.tokens, options.png
    source = open_source(settings, progress)
    tokenizer = load_tokenizer(source)
    at = places(options.depths)
    prompts: list[Prompt] = []
    for length in lengths:
        prompts += _MAKERS[task](tokenizer, text[0], num_tokens=length, depths=at, seed=options.seed)
    context = max(prompt.context for prompt in prompts)
    lineup = load_lineup(source, settings, variants.settings(), context=context, side_by_side=False, progress=progress)
    print_choices(lineup, console)
    runs = _run(lineup, tokenizer, prompts, lineup.choices + ([lineup.dense] if dense else []), progress)
    if len(lengths) == 1 and len(runs) <= 2:
        _print_answers(runs, console)
    else:
        print_maps(runs, lengths, at, console)
    if png is not None:
        draw_maps(runs, lengths, at, png, console, title=f"{task}, {clean_line(settings.model)}")
    _print_scores(runs, console)
    report = {
        "evaluation": task,
        "model": settings.model,
        "text": text[1],
        "lengths": lengths,
        "depths": options.depths,
    }
    _print_report({**report, "seed": options.seed, "settings": choices_report(lineup, context)}, runs)
    return 0


def multihop(options: Multihop, variants: Variants, settings: LoadSettings) -> int:
    """Print how well tasks that need several places of a text are done, by setting and beside dense."""
    console, progress = eval_consoles()
    text, lengths, tasks, png = haystack(options.text), options.tokens, options.tasks, options.png
    source = open_source(settings, progress)
    tokenizer = load_tokenizer(source)
    prompts: list[Prompt] = []
    for task in tasks:
        for length in lengths:
            prompts += TASKS[task](tokenizer, text[0], num_tokens=length, samples=options.samples, seed=options.seed)
    context = max(prompt.context for prompt in prompts)
    lineup = load_lineup(source, settings, variants.settings(), context=context, side_by_side=False, progress=progress)
    print_choices(lineup, console)
    runs = _run(lineup, tokenizer, prompts, lineup.everyone, progress)
    _print_tasks(runs, tasks, lengths, console)
    if png is not None:
        _draw_tasks(runs, tasks, lengths, png, console, title=f"multihop, {clean_line(settings.model)}")
    _print_scores(runs, console)
    report = {"evaluation": "multihop", "model": settings.model, "text": text[1], "tasks": tasks, "lengths": lengths}
    more = {"samples": options.samples, "seed": options.seed, "settings": choices_report(lineup, context)}
    _print_report({**report, **more}, runs)
    return 0


def _run(
    lineup: Lineup, tokenizer: Tokenizer, prompts: Sequence[Prompt], choices: Sequence[Choice], progress: Console
) -> Runs:
    runs: Runs = {}
    total = sum(prompt.num_tokens for prompt in prompts)
    for choice in choices:
        outcomes = runs.setdefault(choice.name, [])
        with bar(progress, f"reading ({clean_line(choice.name)})", "tokens") as shown:
            for event in ask(lineup.engine(choice), tokenizer, prompts):
                if isinstance(event, Outcome):
                    outcomes.append(event)
                else:
                    shown.update(event, total)
    return runs


def _print_report(report: dict[str, object], runs: Runs) -> None:
    found = {name: sum(outcome.found for outcome in outcomes) for name, outcomes in runs.items()}
    nll = {name: score(outcomes).nll for name, outcomes in runs.items()}
    rows = {name: [asdict(outcome) for outcome in outcomes] for name, outcomes in runs.items()}
    count = len(next(iter(runs.values())))
    print(json.dumps({**report, "prompts": count, "found": found, "mean_nll": nll, "results": rows}))


def _print_answers(runs: Runs, console: Console) -> None:
    table = new_table(">depth", ">tokens")
    table.add_column("hidden", no_wrap=True, max_width=24)
    for name in runs:
        table.add_column(clean_line(name), no_wrap=True)
        table.add_column("NLL", justify="right", no_wrap=True, min_width=6)
    for row in zip(*runs.values(), strict=True):
        cells: list[str | Text] = [f"{row[0].depth:.0%}", f"{row[0].num_tokens:,}", " ".join(row[0].wanted)]
        for outcome in row:
            answer = " ".join(clean_line(outcome.answer).split())
            cells.append(Text(f"{'found ' if outcome.found else 'MISSED'} {answer[:ANSWER_SHOWN]}"))
            cells.append(f"{outcome.nll:.3f}")
        table.add_row(*cells)
    console.print(table)


def print_maps(runs: Runs, lengths: Sequence[int], depths: Sequence[float], console: Console) -> None:
    maps = []
    for name, outcomes in runs.items():
        table = new_table(">depth", *(f"<{format_tokens(length)}" for length in lengths), title=clean_line(name))
        found = cells(outcomes)
        for depth in depths:
            row = [found[length, depth] for length in lengths]
            table.add_row(f"{depth:.0%}", *(shaded(cell.nll, found=cell.found == cell.count) for cell in row))
        maps.append(table)
    console.print(Columns(maps, padding=(1, 4)))
    console.print(LEGEND, style="dim")


def _print_tasks(runs: Runs, tasks: Sequence[str], lengths: Sequence[int], console: Console) -> None:
    table = new_table("<task", "<setting")
    for length in lengths:
        add_columns(table, f"<{format_tokens(length)}", ">found")
    for task in tasks:
        for name in runs:
            row: list[str | Text] = [task, Text(clean_line(name))]
            for length in lengths:
                cell = _of(runs[name], task, length)
                row += [shaded(cell.nll, found=True), f"{cell.found}/{cell.count}"]
            table.add_row(*row)
    console.print(table)
    console.print(LEGEND.partition("; ✗")[0], style="dim")


def _of(outcomes: Sequence[Outcome], task: str, length: int) -> Score:
    return score([outcome for outcome in outcomes if (outcome.task, outcome.length) == (task, length)])


def _print_scores(runs: Runs, console: Console) -> None:
    for name, outcomes in runs.items():
        total = score(outcomes)
        share = "" if total.share == total.found / total.count else f" ({total.share:.0%} of what was asked)"
        console.print(
            Text(
                f"{clean_line(name)}: {total.found} of {total.count} found{share}, "
                f"mean NLL {total.nll:.3f}, worst {total.worst_nll:.3f}"
            )
        )


def draw_maps(
    runs: Runs, lengths: Sequence[int], depths: Sequence[float], png: Path, console: Console, *, title: str
) -> None:
    for name, outcomes in runs.items():
        found = cells(outcomes)
        path = heat_map(
            [[math.exp(-found[length, depth].nll) for length in lengths] for depth in depths],
            path=picture_for(png, name, alone=len(runs) == 1),
            x_labels=[format_tokens(length) for length in lengths],
            y_labels=[f"{depth:.0%}" for depth in depths],
            title=f"{title}: {name}",
            x_title="tokens",
            y_title="depth",
            vmin=0,
            vmax=1,
            outlined=[
                [found[length, depth].found < found[length, depth].count for length in lengths] for depth in depths
            ],
            number_format=".2f",
        )
        print_prose(
            console, f"{clean_line(str(path))}: probability per token of the right answer; framed: missed", "dim"
        )


def _draw_tasks(
    runs: Runs, tasks: Sequence[str], lengths: Sequence[int], png: Path, console: Console, *, title: str
) -> None:
    rows = [(task, name) for task in tasks for name in runs]
    path = heat_map(
        [[math.exp(-_of(runs[name], task, length).nll) for length in lengths] for task, name in rows],
        path=png,
        x_labels=[format_tokens(length) for length in lengths],
        y_labels=[f"{task}, {name}" for task, name in rows],
        title=title,
        x_title="tokens",
        vmin=0,
        vmax=1,
        number_format=".2f",
    )
    print_prose(console, f"{clean_line(str(path))}: probability per token of the right answer", "dim")
