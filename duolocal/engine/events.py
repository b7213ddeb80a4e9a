"""What a load tells whoever waits for it. Imports nothing, so that a progress bar can implement it."""


class LoadEvents:
    """Called while a model is loaded; nothing is done unless a subclass does it. Counts are done and in all."""

    def fetching(self, done: int, total: int) -> None:
        """Bytes of the model are being fetched."""

    def compiling(self) -> None:
        """Kernels are about to be compiled, once per machine."""

    def loading(self, done: int, total: int) -> None:
        """Layers are being loaded."""

    def quantizing(self, done: int, total: int) -> None:
        """Rows of lm_head and embedding are being made smaller."""

    def identifying(self, done: int, total: int) -> None:
        """The heads of an unknown model are being ranked: steps."""

    def measuring(self, done: int, total: int) -> None:
        """KV formats are being measured on an unknown model: layers."""

    def announce(self, line: str) -> None:
        """A decision was made that people should know of before they wait: one line."""

    def learning(self, done: int, total: int) -> None:
        """The channels for selected decode are being found: tokens."""


QUIET = LoadEvents()
