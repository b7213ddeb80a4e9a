"""Heat maps and curves as PNG files.

Owns how our pictures look; what is in them is measured elsewhere. Matplotlib is imported when a picture is drawn, not
before (it takes a second), through its object interface: no global figure, no choice of a window system. The same
values give the same bytes: no date is written.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from duolocal.errors import SettingsError
from duolocal.paths import user_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 150
_COLOURS = "viridis"  # even steps of lightness: it can be read in grey, and by the colour-blind
_MISSING = "#dddddd"  # a cell without a value
_CELL, _MAX_SIDE = 0.32, 14.0  # inches
_MAX_LABELS = 24  # per axis; of more, every second or third is written
_MAX_WRITTEN = 240  # cells; in more, numbers are not written


def heat_map(
    values: Sequence[Sequence[float | None]],
    *,
    path: str | Path,
    x_labels: Sequence[object],
    y_labels: Sequence[object],
    title: str = "",
    x_title: str = "",
    y_title: str = "",
    vmin: float | None = None,
    vmax: float | None = None,
    outlined: Sequence[Sequence[bool]] | None = None,
    number_format: str | None = None,
    bar_title: str = "",
) -> Path:
    """Draw `values` [rows][columns] as a PNG, the first row at the top; return its path.

    None and NaN leave a grey cell. `x_labels` name the columns, `y_labels` the rows; vmin, vmax: the ends of the
    scale (None: those of the values). `outlined`: cells to mark with a frame. `number_format`: such as ".2f" or
    ".0%", writes the value into each cell where there is room. `bar_title` says what the colours mean. Raises
    ValueError for a table that is not full and SettingsError where the file cannot be written.
    """
    rows, columns = len(values), len(values[0]) if values else 0
    if not rows or not columns or {len(row) for row in values} != {columns}:
        raise ValueError("a heat map needs a full table")
    if (len(y_labels), len(x_labels)) != (rows, columns):
        raise ValueError(f"{len(y_labels)} and {len(x_labels)} labels for {rows} rows and {columns} columns")
    cells = [[math.nan if value is None else float(value) for value in row] for row in values]
    known = [value for row in cells for value in row if math.isfinite(value)]
    low = vmin if vmin is not None else min(known, default=0.0)
    high = vmax if vmax is not None else max(known, default=1.0)
    figure = _figure(_side(2.2, columns, least=4.5), _side(1.2, rows, least=2.0), path)
    axes = figure.add_subplot()
    import matplotlib

    colours = matplotlib.colormaps[_COLOURS].with_extremes(bad=_MISSING)
    image = axes.imshow(
        cells, cmap=colours, vmin=low, vmax=high if high > low else low + 1, aspect="auto", interpolation="nearest"
    )
    for axis, labels in ((axes.xaxis, x_labels), (axes.yaxis, y_labels)):
        shown = range(0, len(labels), -(-len(labels) // _MAX_LABELS))
        axis.set_ticks(list(shown), [str(labels[at]) for at in shown])
    axes.tick_params(length=0, labelsize=8)
    if any(len(str(label)) > 3 for label in x_labels):
        axes.tick_params(axis="x", rotation=45)
    if outlined is not None:
        _outline(axes, outlined)
    if number_format is not None and rows * columns <= _MAX_WRITTEN:
        _write_numbers(axes, cells, number_format, low, high)
    _name(axes, title, x_title, y_title)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.03)
    bar.ax.tick_params(labelsize=8)
    bar.set_label(bar_title, fontsize=8)
    return _save(figure, path)


def curve(
    points: Mapping[str, Sequence[tuple[float, float]]],
    *,
    path: str | Path,
    title: str = "",
    x_title: str = "",
    y_title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    levels: Mapping[str, float] | None = None,
    marked: Mapping[str, tuple[float, float]] | None = None,
) -> Path:
    """Draw one line per name through its (x, y) points as a PNG; return its path.

    Points are joined in the order of x. `levels`: dashed horizontal lines by name; `marked`: single points to name in
    the picture. Raises ValueError where there is no point and SettingsError where the file cannot be written.
    """
    if not any(points.values()):
        raise ValueError("a curve needs points")
    figure = _figure(7.0, 4.2, path)
    axes = figure.add_subplot()
    for style, (name, line) in zip(_styles(len(points)), points.items(), strict=True):
        xs, ys = zip(*sorted(line), strict=True) if line else ((), ())
        axes.plot(xs, ys, marker="o", markersize=4, linewidth=1.4, label=name, linestyle=style)
    for name, level in (levels or {}).items():
        axes.axhline(level, color="grey", linestyle="--", linewidth=1)
        axes.annotate(name, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    for name, (x, y) in (marked or {}).items():
        axes.plot([x], [y], marker="o", markersize=9, markerfacecolor="none", markeredgecolor="black", linestyle="")
        axes.annotate(name, (x, y), xytext=(6, 6), textcoords="offset points", fontsize=8)
    if log_x:
        axes.set_xscale("log", base=2)
    if log_y:
        axes.set_yscale("log")
    axes.grid(visible=True, color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    if len(points) > 1:
        axes.legend(fontsize=8)
    axes.tick_params(which="both", labelsize=8)
    _name(axes, title, x_title, y_title)
    return _save(figure, path)


def _side(frame: float, cells: int, *, least: float) -> float:
    return max(least, min(_MAX_SIDE, frame + cells * _CELL))


def _figure(width: float, height: float, path: str | Path) -> "Figure":
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise SettingsError(f"{path}: pictures are drawn with matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", path: str | Path) -> Path:
    path = user_path(path)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    try:
        path.write_bytes(picture.getvalue())
    except OSError as error:
        raise SettingsError(f"cannot write the picture {path}: {error.strerror or error}") from None
    return path


def _name(axes: "Axes", title: str, x_title: str, y_title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left", wrap=True)
    axes.set_xlabel(x_title, fontsize=9)
    axes.set_ylabel(y_title, fontsize=9)


def _styles(count: int) -> list[str]:
    # Colours repeat after ten lines; in grey print they differ by dashes only.
    return [("-", "--", "-.", ":")[at % 4] for at in range(count)]


def _outline(axes: "Axes", outlined: Sequence[Sequence[bool]]) -> None:
    from matplotlib.patches import Rectangle

    for row, flags in enumerate(outlined):
        for column, flag in enumerate(flags):
            if flag:
                axes.add_patch(
                    Rectangle((column - 0.42, row - 0.42), 0.84, 0.84, fill=False, edgecolor="#e4572e", linewidth=1.3)
                )


def _write_numbers(axes: "Axes", cells: list[list[float]], number_format: str, low: float, high: float) -> None:
    middle = (low + high) / 2
    for row, line in enumerate(cells):
        for column, value in enumerate(line):
            if math.isfinite(value):
                colour = "white" if value < middle else "black"  # the scale ends light
                text = format(value, number_format)
                axes.text(column, row, text, ha="center", va="center", fontsize=6, color=colour)
