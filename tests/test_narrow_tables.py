"""Tables on narrow and wide terminals: figures and short words are never cut or folded."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from duolocal.documents import Document
from duolocal.models.registry import list_models
from duolocal.terminal.docs_view import loaded_view
from duolocal.terminal.models_view import models_view


def shown(view: RenderableType, columns: int) -> str:
    console = Console(file=StringIO(), width=columns)
    console.print(view)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("columns", [50, 80, 160])
def test_documents(columns: int) -> None:
    path = Path("/home/someone/reports/2026/annual-report-of-the-county.pdf")
    document = Document(path.name, path, "t", "", 123_456_789, kind="pdf")
    text = shown(loaded_view([(path.name, 1_123_456, document)], context=2**20, columns=columns), columns)
    assert "1,123,456" in text and "107.1%" in text and "118 MiB" in text and "…" not in text
    assert max(map(len, text.splitlines())) <= columns


@pytest.mark.parametrize("columns", [50, 80, 160])
def test_models(columns: int) -> None:
    statuses = list_models()
    text = shown(models_view(statuses, columns), columns)
    for status in statuses:
        assert status.name in text and status.model.license.split()[0] in text
    assert "cached" in text
