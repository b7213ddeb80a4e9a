"""load_tokenizer: from an opened model to its Tokenizer."""

from duolocal.models.loader import ModelSource
from duolocal.tokenizer.folder import read_folder
from duolocal.tokenizer.gguf_vocab import read_gguf
from duolocal.tokenizer.tokenizer import Tokenizer


def load_tokenizer(source: ModelSource) -> Tokenizer:
    """Return the tokenizer that the model brings: inside its GGUF (or kept of one), or in its folder.

    Raises TokenizerError where there is none or it would split text differently from the model's own.
    """
    if source.kind == "gguf" or "tokenizer.ggml.model" in source.metadata:
        parts = read_gguf(source.metadata, name=source.path.name)
    else:
        parts = read_folder(source.path, eos_ids=source.config.eos_ids)
    return Tokenizer(parts, vocab_size=source.config.vocab_size)
