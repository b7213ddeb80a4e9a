"""A line that says what is being measured and does not move: a bar's refreshes would be measured too."""

from rich.console import Console

from duolocal.terminal.clean import clean_line


class StillLine:
    """One line on a terminal, replaced by the next; nothing where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown = False

    def show(self, text: str) -> None:
        """Replace the line."""
        if self._console.is_terminal:
            self._console.file.write("\r\x1b[2K" + clean_line(text)[: self._console.width - 1])
            self._console.file.flush()
            self._shown = True

    def clear(self) -> None:
        """Remove the line."""
        if self._shown:
            self._console.file.write("\r\x1b[2K")
            self._console.file.flush()
            self._shown = False

    def __enter__(self) -> "StillLine":
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
