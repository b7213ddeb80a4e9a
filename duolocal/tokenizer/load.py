"""load_tokenizer: from an opened model to its Tokenizer."""

from pathlib import Path

from duolocal.models.loader import ModelSource, open_model
from duolocal.tokenizer.folder import read_folder
from duolocal.tokenizer.gguf_vocab import read_gguf
from duolocal.tokenizer.tokenizer import Tokenizer


def load_tokenizer(model: str | Path | ModelSource) -> Tokenizer:
    """Return the tokenizer that a model (`open_model`) brings: inside its GGUF (or kept of one), or in its folder.

    Raises TokenizerError where there is none or it would split text differently from the model's own.
    """
    source = open_model(model)
    if source.kind == "gguf" or "tokenizer.ggml.model" in source.metadata:
        parts = read_gguf(source.metadata, name=source.path.name)
    else:
        parts = read_folder(source.path, eos_ids=source.config.eos_ids)
    return Tokenizer(parts, vocab_size=source.config.vocab_size)
