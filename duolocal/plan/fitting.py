"""Whether a plan fits, how blocks lie beyond the device, and which other settings fit where it does not.

Each suggestion is judged by the same arithmetic as the request itself. They are ordered by how little they change for
the user: first what changes no answer, then what rounds, then what sees less.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from duolocal.errors import SettingsError
from duolocal.heads import HeadPlan, HeadsSpec
from duolocal.plan.memory import GIB, MemoryPlan, plan_memory
from duolocal.plan.request import Request
from duolocal.plan.weights import Weights
from duolocal.quant.kv import KV_FORMATS, kv_layout
from duolocal.sizes import format_tokens

MIN_CHUNK = 64  # tokens; below, prefill becomes slow
MIN_CONTEXT = 1024  # tokens: less is no suggestion
RATIOS = (0.75, 0.5, 0.33, 0.25, 0.125)
LEAST_GAIN = 1.05  # a second change is worth a context longer by so much
_MIB = 2**20
_CACHE_STEPS = (GIB, 256 * _MIB, 64 * _MIB, 16 * _MIB, _MIB)  # --kv-device-memory is a round number


AUTO_HEADS = HeadsSpec("auto")


@dataclass(frozen=True)
class Free:
    """Bytes that may be taken in each place; host is that beside a GPU."""

    device: int
    host: int = 0
    disk: int = 0


@dataclass(frozen=True)
class Freedom:
    """What may be varied to make a request fit.

    kv: the name of the format of `Request.layout`. cut: the head plan at another ratio of retrieval heads, None where
    there is no ranking to cut; heads: what --heads calls that ranking. outer_weights: the
    weights with lm_head and embedding in another format, None where that is not possible; weights: the same for those
    of the layers of a 16-bit model. offload: whether blocks may live beyond the device.
    """

    kv: str
    cut: Callable[[float], HeadPlan] | None = None
    heads: HeadsSpec = AUTO_HEADS
    outer_weights: Callable[[str], Weights] | None = None
    weights: Callable[[str], Weights] | None = None
    offload: bool = True
    least_context: int = MIN_CONTEXT


@dataclass(frozen=True)
class Setting:
    """Options to add to a command line, and what they come to."""

    options: tuple[str, ...]
    effect: str  # for people
    request: Request
    plan: MemoryPlan

    @property
    def words(self) -> str:
        return " ".join(self.options)


_Change = Callable[[Setting, Free, Freedom], Iterator[Setting]]


def fits(plan: MemoryPlan, free: Free) -> bool:
    """Return whether all that is planned has room."""
    return plan.total <= free.device and plan.host_blocks <= free.host and plan.disk_blocks <= free.disk


def nearest(request: Request, free: Free, freedom: Freedom, *, count: int = 3) -> list[Setting]:
    """Return up to `count` settings that fit, each changing as little as possible, what changes least first.

    Single changes come before pairs, and these before three; where nothing is enough, all are made at once.
    """
    changes: list[_Change] = [_chunks, _placements, _outer, _formats, _rounded, _ratios, _contexts]
    start = Setting((), "", request, plan_memory(request))
    found: list[Setting] = []
    alone: list[_Change] = []  # changes that are not enough by themselves
    others: list[_Change] = []
    for change in changes:
        enough = _first(change(start, free, freedom), free)
        found += enough
        (others if enough else alone).append(change)
    chains = itertools.chain(
        itertools.combinations(alone, 2), itertools.product(alone, others), itertools.combinations(changes, 3)
    )
    for chain in chains:
        if len(found) >= count:
            break
        for setting in _all_of(chain, start, free, freedom):
            found += [] if any(_is_less(setting, kept) for kept in found) else [setting]
    return (found or _everything(start, free, freedom, changes))[:count]


def _all_of(chain: Sequence[_Change], setting: Setting, free: Free, freedom: Freedom) -> list[Setting]:
    """Return the mildest setting with every change of the chain, the first ones as mild as the last allow; or none."""
    settings = chain[0](setting, free, freedom)
    if len(chain) == 1:
        return _first(settings, free)
    found = (_all_of(chain[1:], one, free, freedom) for one in settings)
    return next((one for one in found if one), [])


def _is_less(setting: Setting, other: Setting) -> bool:
    """Return whether `setting` changes all that `other` does, and more, for nothing worth it."""
    names, others = set(setting.options[::2]), set(other.options[::2])
    if not others <= names:
        return False
    return "--context" not in others or setting.request.context < other.request.context * LEAST_GAIN


def _first(settings: Iterator[Setting], free: Free) -> list[Setting]:
    return next(([setting] for setting in settings if fits(setting.plan, free)), [])


def _everything(
    start: Setting,
    free: Free,
    freedom: Freedom,
    changes: list[_Change],
) -> list[Setting]:
    """Return one setting with every change made, the context last; none where even that is too much."""
    setting = start
    for change in changes[:-1]:
        tried = list(change(setting, free, freedom))
        setting = min(tried, key=lambda item: item.plan.total, default=setting)
    return _first(changes[-1](setting, free, freedom), free)


def _with(setting: Setting, options: tuple[str, ...], effect: str, request: Request) -> Setting:
    effects = f"{setting.effect}; {effect}" if setting.effect else effect
    return Setting((*setting.options, *options), effects, request, plan_memory(request))


def _chunks(setting: Setting, free: Free, freedom: Freedom) -> Iterator[Setting]:
    size = setting.request.chunk_size // 2
    while size >= MIN_CHUNK:
        yield _with(
            setting,
            ("--chunk-size", str(size)),
            "same answers, slower reading",
            replace(setting.request, chunk_size=size),
        )
        size //= 2


def _placements(setting: Setting, free: Free, freedom: Freedom) -> Iterator[Setting]:
    if not freedom.offload or setting.request.kv_device_memory is not None:
        return
    for request in offloaded(setting.request, free):
        assert request.kv_device_memory is not None
        where = "host memory" if request.outer == "memory" else "a file on disk"
        yield _with(
            setting,
            ("--kv-device-memory", _bytes(request.kv_device_memory)),
            f"same answers, slower: the other blocks in {where}",
            request,
        )


def offloaded(request: Request, free: Free) -> Iterator[Request]:
    """Yield the request with as large a cache of blocks on the device as has room, at most one."""
    # A GPU reads pinned host memory, never a file.
    homed = replace(request, outer="memory" if request.device == "cuda" else "disk", kv_device_memory=0)
    bare = plan_memory(homed)  # tables only
    room = free.device - bare.total + bare.device.blocks
    for step in _CACHE_STEPS:
        size = room // step * step
        tried = replace(homed, kv_device_memory=size)
        plan = plan_memory(tried)
        if size > 0 and plan.offloaded and plan.slots > 0 and fits(plan, free):
            yield tried
            return


def _outer(setting: Setting, free: Free, freedom: Freedom) -> Iterator[Setting]:
    if freedom.outer_weights is None:
        return
    for name in ("int8", "int4"):
        try:
            weights = freedom.outer_weights(name)
        except SettingsError:  # rows that are no whole groups: not to be had for this model
            return
        if weights.outer_bytes < setting.request.weights.outer_bytes:
            yield _with(
                setting,
                ("--outer-weights", name),
                "lm_head and embedding are rounded",
                replace(setting.request, weights=weights),
            )


def _rounded(setting: Setting, free: Free, freedom: Freedom) -> Iterator[Setting]:
    if freedom.weights is None:
        return
    for name in ("int8", "nf4"):
        weights = freedom.weights(name)
        yield _with(
            setting,
            ("--weights", name),
            "the layers' weights are rounded",
            replace(setting.request, weights=weights),
        )


def _formats(setting: Setting, free: Free, freedom: Freedom) -> Iterator[Setting]:
    request = setting.request
    for name in KV_FORMATS[KV_FORMATS.index(freedom.kv) + 1 :]:
        layout = kv_layout(name, head_dim=request.config.head_dim, dtype=request.dtype)
        if layout.record_bytes < request.layout.record_bytes:
            yield _with(setting, ("--kv", name), "the cache is rounded more", replace(request, layout=layout))


def _ratios(setting: Setting, free: Free, freedom: Freedom) -> Iterator[Setting]:
    if freedom.cut is None:
        return
    for ratio in RATIOS:
        heads = freedom.cut(ratio)
        if heads.num_retrieval < setting.request.heads.num_retrieval:
            yield _with(
                setting,
                ("--heads", str(freedom.heads.at(ratio))),
                "fewer heads see the whole context",
                replace(setting.request, heads=heads),
            )


def _contexts(setting: Setting, free: Free, freedom: Freedom) -> Iterator[Setting]:
    """Yield the longest context that fits, in whole K."""
    low, high = 0, setting.request.context // 1024
    while high - low > 1:  # low fits (0: nothing known to fit), high does not
        middle = (low + high) // 2
        if fits(plan_memory(replace(setting.request, context=middle * 1024)), free):
            low = middle
        else:
            high = middle
    tokens = low * 1024
    if tokens >= freedom.least_context:
        yield _with(
            setting,
            ("--context", format_tokens(tokens)),
            "a shorter context",
            replace(setting.request, context=tokens),
        )


def _bytes(count: int) -> str:
    for letter, factor in (("GiB", GIB), ("MiB", _MIB)):
        if count % factor == 0:
            return f"{count // factor}{letter}"
    return str(count)
