"""Failures that a user can act on.

Each is raised where it is found with one line: what was wrong, the value seen, the value wanted, what to do.
Only the command line turns one into a printed line and an exit code.
"""


class DuoLocalError(Exception):
    """A failure the user can act on; `str()` is one line."""


class SettingsError(DuoLocalError):
    """An option, or a combination of options, that cannot be used."""


class ConfigError(DuoLocalError):
    """A model configuration that duolocal would compute wrongly, or cannot read."""


class ModelFileError(DuoLocalError):
    """A corrupt, truncated or unsupported model file: names the file, the tensor and the reason."""


class ModelNotFoundError(DuoLocalError):
    """A name or path that leads to no model."""


class DownloadError(DuoLocalError):
    """A model that could not be fetched: says what to place where."""


class TokenizerError(DuoLocalError):
    """A tokenizer or chat template that is missing or cannot be used."""


class ContextOverflowError(DuoLocalError):
    """Text that does not fit into the context, refused before any work."""


class MemoryLimitError(DuoLocalError):
    """Settings that need more memory than there is, refused before any work."""


class DocumentError(DuoLocalError):
    """A document that cannot be read as text."""


class KernelError(DuoLocalError):
    """Compiled kernels that cannot be built or run on this machine."""
