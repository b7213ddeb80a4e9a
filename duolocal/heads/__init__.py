"""Which KV heads are retrieval heads: patterns (a score per head), files of them, and plans cut from them.

`plan` is what the rest of duolocal runs with; `pattern` ranks and cuts, and reads our own file; `published` reads and
writes DuoAttention's layout; `known` says for which models a pattern is published; `choose` is --heads.
"""

from duolocal.heads.choose import (
    UNMEASURED_RATIO,
    HeadChoice,
    HeadsSpec,
    choose_heads,
    load_pattern,
    pattern_meant,
    plan_heads,
    remember_pattern,
    remembered_file,
    remembered_pattern,
    save_pattern,
    shipped_pattern,
)
from duolocal.heads.known import KNOWN_PATTERNS, KnownPattern, ModelShape, known_pattern
from duolocal.heads.pattern import PATTERN_FORMAT, HeadPattern, rank_heads
from duolocal.heads.plan import DEFAULT_RECENT_SIZE, DEFAULT_SINK_SIZE, WIDE_RECENT_SIZE, HeadPlan, uniform_plan

__all__ = [
    "DEFAULT_RECENT_SIZE",
    "DEFAULT_SINK_SIZE",
    "KNOWN_PATTERNS",
    "PATTERN_FORMAT",
    "UNMEASURED_RATIO",
    "WIDE_RECENT_SIZE",
    "HeadChoice",
    "HeadPattern",
    "HeadPlan",
    "HeadsSpec",
    "KnownPattern",
    "ModelShape",
    "choose_heads",
    "known_pattern",
    "load_pattern",
    "pattern_meant",
    "plan_heads",
    "rank_heads",
    "remember_pattern",
    "remembered_file",
    "remembered_pattern",
    "save_pattern",
    "shipped_pattern",
    "uniform_plan",
]
