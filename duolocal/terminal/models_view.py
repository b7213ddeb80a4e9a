"""The table of `duolocal models`."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from duolocal.models.registry import ModelStatus, list_models
from duolocal.sizes import format_tokens
from duolocal.terminal import figures
from duolocal.terminal.clean import clean_line
from duolocal.terminal.consoles import new_console
from duolocal.terminal.tables import new_table

_WITH_LICENCE = 72  # columns; below, the licence stands beside the source
_WIDE = 150  # columns; below, source and place go under the table instead of being folded into slivers


def models() -> int:
    """Print the named models; return the exit code."""
    console = new_console()
    console.print(models_view(list_models(), console.width), crop=False)
    return 0


def models_view(statuses: Sequence[ModelStatus], columns: int) -> RenderableType:
    """List named models: source, size, trained context, licence, where each is cached."""
    wide = columns >= _WIDE
    licensed = columns >= _WITH_LICENCE
    places = ["~source", "~cached in"] if wide else ["<cached"]
    table = new_table("<name", ">size", ">context", *["~licence"] * licensed, *places)
    details: list[RenderableType] = []
    for status in statuses:
        model = status.model
        place = clean_line(str(status.path)) if status.path else ""
        row = [
            Text(status.name, "bold"),
            Text(figures.size(status.size_bytes)),
            Text(format_tokens(model.trained_context)),
            *[Text(model.license)] * licensed,
        ]
        if wide:
            row += [Text(clean_line(status.source)), Text(place or "not fetched", "" if place else "dim")]
        else:
            row.append(Text("yes" if place else "no"))
            details.append(Text.assemble("\n", (status.name, "bold"), f": {clean_line(model.description)}"))
            licence = "" if licensed else f", {model.license}"
            details.append(Text(f"  from {clean_line(status.source)}{licence}", style="dim"))
            if place:
                details.append(Text(f"  in {place}", "dim", no_wrap=True, overflow="ignore"))  # a path to copy, whole
        table.add_row(*row)
    return Group(table, *details)
