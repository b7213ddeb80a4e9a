"""Several models side by side on one text: what fewer bits per weight cost, all with the same dense 16-bit cache.

Owns the checks that the models can be compared; the comparison is `compare`'s.
"""

from collections.abc import Sequence

from duolocal.errors import SettingsError
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
