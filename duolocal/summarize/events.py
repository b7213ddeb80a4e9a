"""What a job yields, besides records. All counts are of inputs, all sizes in tokens."""

from dataclasses import dataclass
from typing import Literal

from duolocal.documents import Skipped


@dataclass(frozen=True)
class Looked:
    """So many inputs have been looked at, of so many: their bytes are compared with an earlier run's."""

    done: int
    total: int


@dataclass(frozen=True)
class Began:
    """The work begins: what there is to do, and what an earlier run left."""

    total: int
    done: int  # before: not done again
    failed: int = 0  # before: tried again
    changed: int = 0  # since: done anew
    others: int = 0  # records of documents that are not among the inputs: kept
    skipped: tuple[Skipped, ...] = ()  # files that cannot be documents, where folders and archives were named


@dataclass(frozen=True)
class Opened:
    """The work on one input begins."""

    index: int
    name: str
    number: int  # among those that this run does, from 1
    count: int  # that this run does


@dataclass(frozen=True)
class Planned:
    """How one input will be read."""

    index: int
    name: str
    tokens: int
    parts: int


@dataclass(frozen=True)
class Progress:
    """Progress of one reading of one input."""

    index: int
    name: str
    doing: Literal["reading", "writing"]
    part: int  # from 1; with level > 0 the number of the merge
    parts: int
    level: int  # 0: the document itself; else merging, from 1
    done: int
    total: int


@dataclass(frozen=True)
class Ended:
    """The end of a job, with what it came to; `left` were not begun, or cancelled."""

    total: int
    summarized: int  # in all, with those of earlier runs
    failed: int
    left: int
    cut_off: int  # of the summarised: by max_tokens
    elapsed_s: float

    @property
    def cancelled(self) -> bool:
        return self.left > 0
