"""What a user may set: how a model is loaded, and how an answer is drawn.

Each option is declared here once, with its default, help, unit and check (`duolocal.options`). Whether the settings
suit a model or fit into memory is the engine's to say.
"""

from dataclasses import dataclass
from functools import partial

from duolocal.errors import SettingsError
from duolocal.options import (
    ANY,
    BYTES,
    THREADS,
    TOKENS,
    Kind,
    check,
    choice,
    counted,
    flagged,
    nonempty,
    number,
    option,
    repeated,
    whole,
    words_of,
)
from duolocal.sizes import parse_tokens

AUTO_MODEL = "auto"  # what `duolocal.models.default` says; the command line settles it before anything else sees it
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
KERNELS = ("auto", "compiled", "torch")
ACTIVATIONS = ("auto", "float32", "int16", "int8")
WEIGHTS = ("auto", "nf4", "int8")
SPECULATE = ("auto", "off")
OUTER_WEIGHTS = ("auto", "int8", "int4")
PREFILLS = ("exact", "sparse")


def _read_select(text: str, name: str) -> str:
    if text not in ("off", "auto"):
        parse_tokens(text, name)
    return text


_MODEL = nonempty("give a name from `duolocal models`, or a path")
_OR_AUTO = nonempty("leave it out or give auto")
_model = partial(option, group="model")
_computing = partial(option, group="computing")


@dataclass(frozen=True)
class LoadSettings:
    """What has to be known before a model is loaded; None leaves the choice to the engine."""

    model: str = _model(
        _MODEL,
        "a name from `duolocal models`, a hub id org/name, a .gguf file or a model folder",
        default=AUTO_MODEL,
        metavar="NAME",
        default_help="$DUOLOCAL_MODEL; else qwen2.5-coder-1.5b, or smollm2-135m where memory or disk is short",
    )
    context: int | None = _model(
        TOKENS,
        "tokens of context: 8192, 32K, 1M; all memory is reserved at the start, so nothing runs out half-way",
        metavar="SIZE",
        default_help="what the model was trained for, at most 32K",
    )
    kv: str = _model(
        _OR_AUTO,
        "KV cache of the retrieval heads: auto, 32, 16, int8, fp8, k8v4, int4",
        default="auto",
        metavar="FORMAT",
        default_help="auto, the smallest that passed a measurement on the model, or less where memory needs it",
    )
    heads: str = _model(
        _OR_AUTO,
        "retrieval heads: auto, all, a ratio such as 0.5, published, or a pattern file or folder",
        default="auto",
        metavar="SPLIT",
        default_help="auto, the model's measured or published pattern; else all, or ranked if quick or needed; fewer "
        "where memory needs it",
    )
    sink_size: int | None = _model(counted(0), "first tokens that streaming heads keep", default_help="the pattern's")
    recent_size: int | None = _model(TOKENS, "last tokens that streaming heads keep", default_help="the pattern's")
    chunk_size: int | None = _computing(TOKENS, "tokens per prefill step; changes memory, not results")
    device: str = _model(_OR_AUTO, "auto, cpu or cuda", default="auto", metavar="DEVICE")
    dtype: str = _computing(choice(*DTYPES), f"compute type: {', '.join(DTYPES)}", default="auto", metavar="TYPE")
    rope: str | None = _computing(
        ANY, "RoPE scaling, for example yarn:4", metavar="SCALING", default_help="the model's own"
    )
    threads: int | None = _model(
        THREADS, "CPU threads, each on a core of its own", default_help="one per physical core"
    )
    kernels: str = _model(
        choice(*KERNELS),
        "CPU kernels: auto, compiled, or torch, the slow reference",
        default="auto",
        metavar="KIND",
        default_help="auto, compiled where they run",
    )
    activations: str = _computing(
        choice(*ACTIVATIONS),
        "what compiled CPU kernels multiply with integer codes of weights: float32, int16 or int8, quantized token by "
        "token",
        default="auto",
        metavar="TYPE",
        default_help="auto, int8, or int16 where a model is small",
    )
    speculate: str = _computing(
        choice(*SPECULATE),
        "on a CPU, try what the context says may follow, a few tokens in one step: auto, or off; answers are the same",
        default="auto",
        metavar="HOW",
        default_help="auto, where it is faster",
    )
    weights: str = _model(
        choice(*WEIGHTS),
        'auto, or nf4 or int8: made of a 16-bit model while loading (pip install "duolocal[bitsandbytes]")',
        default="auto",
        metavar="FORMAT",
        default_help="auto, as in the file",
    )
    outer_weights: str = _model(
        choice(*OUTER_WEIGHTS),
        "lm_head and embedding: auto, or int8 or int4, made while loading",
        default="auto",
        metavar="FORMAT",
        default_help="auto, as in the file, or fewer bits where memory needs it",
    )
    kv_device_memory: int | None = _model(
        BYTES,
        "GPU memory, or without a GPU memory, for KV blocks, such as 4GiB; the others lie in host memory, or in a file",
        metavar="SIZE",
        default_help="as many as fit",
    )
    select: str = _model(
        Kind(_read_select, "give off, auto, or a number of tokens as text", lambda value: isinstance(value, str)),
        "answers read only the blocks that matter: auto (2,048 tokens per retrieval head, in contexts from 32K), a "
        "number of tokens, or off, which reads everything",
        default="off",
        metavar="BUDGET",
    )
    prefill: str = _model(
        choice(*PREFILLS),
        "how retrieval heads read a prompt: exact, or sparse: only the blocks that hold 98% of their attention, by an "
        "estimate",
        default="exact",
        metavar="HOW",
    )

    def __post_init__(self) -> None:
        check(self)

    def options(self) -> list[str]:
        """List the command-line options that ask for these settings, without those that are defaults."""
        return words_of(self, always=("model",))


@dataclass(frozen=True)
class FirstUse:
    """Whether a model that nobody has measured is measured before it is used; neither: where that is quick."""

    quick: bool = flagged("start an unknown model at once, with all heads and int8 KV where they fit", group="model")
    tune: bool = flagged("measure an unknown model first, however long it takes", group="model")

    def __post_init__(self) -> None:
        if self.quick and self.tune:
            raise SettingsError("--quick and --tune were both given: leave one of them out")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


_STOP = Kind(lambda text, name: text, "give a text that is not empty", _is_text)
_sampling = partial(option, group="sampling")


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn.

    stop: strings that end the answer where one appears; they are not part of it. The history that the repetition
    penalty looks at is the answer so far, not the prompt: positive logits of its ids are divided, negative multiplied.
    """

    temperature: float = _sampling(
        number("0 (greedy) or more, such as 0.7", lambda value: value >= 0),
        "0 always takes the likeliest token, whatever the others say",
        default=0.7,
        metavar="T",
    )
    top_k: int = _sampling(
        whole("a whole number, 0 (off) or more", 0), "choose among the N likeliest tokens; 0: all", default=0
    )
    top_p: float = _sampling(
        number("a number above 0, up to 1 (off)", lambda value: 0 < value <= 1),
        "choose among the likeliest tokens that hold P of the probability",
        default=0.95,
        metavar="P",
    )
    min_p: float = _sampling(
        number("a number from 0 (off) to 1", lambda value: 0 <= value <= 1),
        "leave out tokens less likely than P times the likeliest",
        default=0.0,
        metavar="P",
    )
    repetition_penalty: float = _sampling(
        number("a number above 0 such as 1.1; 1 switches it off", lambda value: value > 0),
        "above 1 makes repetition less likely",
        default=1.0,
    )
    seed: int | None = _sampling(
        whole("a whole number from 0 to 2**63 - 1, or none", 0, 2**63 - 1),
        "make the choice of tokens repeatable",
        takes_none=True,
    )
    max_tokens: int | None = _sampling(
        counted(write=str), "end an answer after N tokens; none: no limit", takes_none=True
    )
    stop: tuple[str, ...] = _sampling(
        repeated(_STOP), "end an answer before TEXT; may be given several times", default=(), metavar="TEXT"
    )

    def __post_init__(self) -> None:
        check(self, spell=str)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest id is always taken."""
        return self.temperature == 0


# What the chat starts with. Small models repeat themselves: unpenalised and unbounded, an answer of the default model
# has been seen to fill the whole context with one line.
CHAT_SAMPLING = Sampling(temperature=0.3, top_p=0.9, repetition_penalty=1.1, max_tokens=1024)

# The likeliest tokens, a little against repetition (more of it breaks numbers), the same summary every time.
SUMMARY_SAMPLING = Sampling(temperature=0.0, top_p=0.9, repetition_penalty=1.05, seed=0)
