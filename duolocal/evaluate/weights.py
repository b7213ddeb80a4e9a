"""Several models side by side on one text: what fewer bits per weight cost, all with the same dense 16-bit cache.

Owns the loading and the checks that the models can be compared; the comparison is `compare`'s. All models are in memory
at once, each in the bits of its file, with one window's cache each.
"""

from collections.abc import Callable, Sequence

from duolocal.engine.engine import Engine
from duolocal.errors import SettingsError
from duolocal.evaluate.engines import DENSE_KV
from duolocal.models.loader import ModelSource
from duolocal.tokenizer import Tokenizer, load_tokenizer


def common_tokenizer(models: Sequence[tuple[str, ModelSource]], text: str) -> tuple[Tokenizer, list[int]]:
    """Return the first model's tokenizer and the ids of `text`.

    Raises SettingsError where another model has another vocabulary or other ids: their predictions are of other things.
    """
    first, source = models[0]
    tokenizer = load_tokenizer(source)
    ids = tokenizer.encode(text)
    for name, other in models[1:]:
        if other.config.vocab_size != source.config.vocab_size:
            raise SettingsError(
                f"{name} has {other.config.vocab_size:,} tokens in its vocabulary, {first} has "
                f"{source.config.vocab_size:,}: compare models that have one vocabulary"
            )
        if load_tokenizer(other).encode(text) != ids:
            raise SettingsError(f"{name} splits this text into other tokens than {first}: give models of one family")
    return tokenizer, ids


def load_side_by_side(
    models: Sequence[tuple[str, ModelSource]],
    *,
    context: int,
    device: str = "auto",
    threads: int | None = None,
    kernels: str = "auto",
    on_load: Callable[[str, int, int], None] | None = None,
    on_build: Callable[[], None] | None = None,
) -> list[tuple[str, Engine]]:
    """Load every model with a dense 16-bit cache of `context` tokens; device, threads, kernels as in `Engine.load`.

    `on_load` gets (name, layers done, layers in all). Raises DuoLocalError, MemoryLimitError where a model no longer
    fits beside those before it.
    """
    engines = []
    for name, source in models:

        def on_layer(done: int, total: int, name: str = name) -> None:
            if on_load is not None:
                on_load(name, done, total)

        engine = Engine.load(
            source,
            context=context,
            kv=DENSE_KV,
            heads="all",
            device=device,
            threads=threads,
            kernels=kernels,
            on_layer=on_layer,
            on_build=on_build,
        )
        engines.append((name, engine))
    return engines
