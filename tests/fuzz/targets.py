"""The targets by name."""

from tests.fuzz.base import Target
from tests.fuzz.documents import DOCUMENTS
from tests.fuzz.models import damage_config, damage_gguf, damage_native, damage_shards, read_model
from tests.fuzz.sessions import SESSION
from tests.fuzz.tokenizers import (
    damage_gguf_keys,
    damage_sentencepiece,
    damage_template,
    damage_tokenizer_config,
    damage_tokenizer_json,
    read_gguf_keys,
    read_gguf_vocab,
    read_template,
    read_tokenizer_folder,
)

TARGETS = {
    target.name: target
    for target in (
        Target("gguf", "gguf", damage_gguf, read_model),
        Target("safetensors", "safetensors", damage_shards, read_model),
        Target("awq", "awq", damage_shards, read_model),
        Target("native", "native", damage_native, read_model),
        Target("config", "safetensors", damage_config, read_model),
        Target("gguf-vocab", "gguf-vocab", damage_gguf, read_gguf_vocab),
        Target("gguf-keys", "gguf-vocab", damage_gguf_keys, read_gguf_keys),
        Target("tokenizer-json", "tokenizer", damage_tokenizer_json, read_tokenizer_folder),
        Target("tokenizer-config", "tokenizer", damage_tokenizer_config, read_tokenizer_folder),
        Target("sentencepiece", "sentencepiece", damage_sentencepiece, read_tokenizer_folder),
        Target("template", "tokenizer", damage_template, read_template),
        *DOCUMENTS,
        SESSION,
    )
}
