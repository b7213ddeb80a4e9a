"""Heat maps and curves: that there is a picture, that it shows the values, and that it is the same every time."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from duolocal.errors import SettingsError
from duolocal.terminal.pictures import curve, heat_map

VALUES: Any = [[0.0, 0.5, 1.0], [1.0, None, float("nan")]]
LABELS: Any = {"x_labels": ["1K", "2K", "7.5K"], "y_labels": ["0%", "100%"]}


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)  # [height, width, 4], 0..1


def share_of(path: Path, colour: tuple[float, float, float]) -> float:
    return float((np.abs(pixels(path)[..., :3] - colour).max(-1) < 0.02).mean())


def test_a_heat_map_shows_its_values(tmp_path: Path) -> None:
    path = heat_map(VALUES, path=tmp_path / "map", vmin=0, vmax=1, **LABELS)
    assert path.read_bytes().startswith(b"\x89PNG")
    low, high = (0.267, 0.005, 0.329), (0.993, 0.906, 0.144)  # the ends of viridis
    assert share_of(path, low) > 0.05
    assert share_of(path, high) > 1.5 * share_of(path, low)  # two cells against one
    assert share_of(path, (0.867, 0.867, 0.867)) > 0.05  # what is missing is grey


def test_frames_and_numbers_are_drawn(tmp_path: Path) -> None:
    plain = heat_map(VALUES, path=tmp_path / "plain.png", **LABELS)
    frames = [[True, False, False], [False, False, True]]
    framed = heat_map(VALUES, path=tmp_path / "framed.png", outlined=frames, **LABELS)
    numbered = heat_map(VALUES, path=tmp_path / "numbered.png", number_format=".0%", **LABELS)
    orange = (0.894, 0.341, 0.180)
    assert share_of(plain, orange) == 0 < share_of(framed, orange)
    assert not np.array_equal(pixels(plain), pixels(numbered))


def test_the_same_values_give_the_same_bytes(tmp_path: Path) -> None:
    pictures = [heat_map(VALUES, path=tmp_path / f"{at}.png", **LABELS).read_bytes() for at in range(2)]
    lines = {"a": [(1, 0.1), (0.5, 0.4)], "b": []}
    curves = [curve(lines, path=tmp_path / f"{at}.png").read_bytes() for at in range(2)]
    assert pictures[0] == pictures[1]
    assert curves[0] == curves[1]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 200), (200, 1), (80, 80)])
def test_any_shape_is_a_picture_of_bearable_size(tmp_path: Path, rows: int, columns: int) -> None:
    path = heat_map(
        [[0.5] * columns] * rows, path=tmp_path / "m.png", x_labels=range(columns), y_labels=range(rows), title="t" * 90
    )
    height, width, _ = pixels(path).shape
    assert 200 < width < 2400
    assert 200 < height < 2400


def test_a_curve_with_everything(tmp_path: Path) -> None:
    lines = {f"line {at}": [(1.0, 0.01 + at), (4.0, 0.2 + at)] for at in range(3)}
    bare = curve(lines, path=tmp_path / "bare.png")
    full = curve(
        lines,
        path=tmp_path / "full.png",
        title="KV budget",
        x_title="ratio",
        y_title="KL, nats",
        log_x=True,
        log_y=True,
        levels={"limit": 0.02},
        marked={"yours": (1.0, 0.01)},
    )
    assert not np.array_equal(pixels(bare), pixels(full))


def test_what_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values: Any
    labels: Any
    for values, labels in (
        ([], {"x_labels": [], "y_labels": []}),
        ([[1, 2], [3]], {"x_labels": [1, 2], "y_labels": [1, 2]}),
        ([[1, 2]], {"x_labels": [1], "y_labels": [1]}),
    ):
        with pytest.raises(ValueError, match=r"table|labels"):
            heat_map(values, path=tmp_path / "x.png", **labels)
    with pytest.raises(ValueError, match="a curve needs points"):
        curve({"a": []}, path=tmp_path / "x.png")
    with pytest.raises(SettingsError, match=r"cannot write the picture .*missing"):
        heat_map(VALUES, path=tmp_path / "missing" / "x.png", **LABELS)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SettingsError, match="pip install matplotlib"):
        heat_map(VALUES, path=tmp_path / "x.png", **LABELS)
    assert list(tmp_path.iterdir()) == []
