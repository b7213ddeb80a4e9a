"""The tokenizer inside a GGUF file as the files a model folder has, for checkpoints made from GGUF files.

"gpt2" vocabularies become tokenizer.json, "llama" ones tokenizer.model; either with a tokenizer_config.json that holds
the named tokens and the chat template. Special tokens, pre-tokenizer and normalizer are those that `gguf_vocab` reads,
so that `folder` gives the same ids for the same text. Writes nothing itself.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer as Library

from duolocal.errors import TokenizerError
from duolocal.tokenizer.chat import Message
from duolocal.tokenizer.gguf_vocab import byte_level_description, read_gguf, sentencepiece_proto
from duolocal.tokenizer.parts import TokenizerParts
from duolocal.tokenizer.sentencepieces import PieceType
from duolocal.tokenizer.tokenizer import Tokenizer

_PREFIX = "tokenizer.ggml."
_PLAIN = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


def tokenizer_files(metadata: Mapping[str, Any], *, name: str, max_positions: int) -> dict[str, bytes]:
    """Return file names and contents for the tokenizer that a GGUF's key/values describe.

    name: the file's, for errors; max_positions: of the model, tokens. Raises TokenizerError.
    """
    parts = read_gguf(metadata, name=name)
    tokens: list[str] = list(metadata[_PREFIX + "tokens"])
    types = [int(kind) for kind in metadata.get(_PREFIX + "token_type") or [PieceType.NORMAL] * len(tokens)]
    config: dict[str, Any] = {**parts.template_tokens, "add_bos_token": parts.adds_bos, "add_eos_token": False}
    config |= {"clean_up_tokenization_spaces": False, "model_max_length": max_positions}
    if parts.template is not None:
        config["chat_template"] = _with_bos(parts)
    files = {}
    if metadata[_PREFIX + "model"] == "gpt2":
        pre, merges = metadata.get(_PREFIX + "pre"), list(metadata[_PREFIX + "merges"])
        description = byte_level_description(pre, tokens, types, merges, parts.specials, name=name)
        # The class that takes tokenizer.json as it is; those named after a model bring a pre-tokenizer of their own.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        files["tokenizer.json"] = _library_json(description, parts, tokens, name)
    else:
        config |= {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_prefix_space": parts.strips_space}
        files["tokenizer.model"] = sentencepiece_proto(metadata, tokens, types, parts.specials, name=name)
    return files | {"tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode()}


def check_same(one: Tokenizer, other: Tokenizer, texts: Sequence[str]) -> None:
    """Raise TokenizerError where two tokenizers give different ids for one of `texts`, or for a conversation."""
    for text in texts:
        if one.encode(text, bos=True) != other.encode(text, bos=True):
            raise TokenizerError(
                f"the written tokenizer ({other.origin}) does not give the ids of the model's own ({one.origin}) "
                f"for {text[:40]!r}: its vocabulary cannot be written as such a file"
            )
    if not one.has_chat_template:
        return
    talk = [Message("user", "How much is 12 + 34?"), Message("assistant", "46"), Message("user", "<|im_end|> thanks")]
    if one.encode_pieces(one.chat_pieces(talk)) != other.encode_pieces(other.chat_pieces(talk)):
        raise TokenizerError("the written chat template does not give the ids of the model's own")


def _library_json(description: dict[str, Any], parts: TokenizerParts, tokens: Sequence[str], name: str) -> bytes:
    added = {token["id"]: token for token in description["added_tokens"]}
    for special in parts.specials.values():
        hidden = special.id in parts.hidden_ids
        added[special.id] = {"id": special.id, "content": special.text, "special": hidden, **_PLAIN}
    processor = None
    if parts.adds_bos and parts.bos_id is not None:
        processor = _bos_processor(tokens[parts.bos_id], parts.bos_id)
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        **description,
        "added_tokens": [token for _, token in sorted(added.items())],
        "post_processor": processor,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    }
    try:
        return Library.from_str(json.dumps(whole)).to_str(pretty=True).encode()
    except Exception as error:  # the library raises Exception itself, nothing narrower
        reason = " ".join(str(error).split())
        raise TokenizerError(f"{name}: its vocabulary cannot be written as tokenizer.json ({reason})") from error


def _bos_processor(bos: str, bos_id: int) -> dict[str, Any]:
    """Return the post-processor that puts BOS before plain text."""
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def _with_bos(parts: TokenizerParts) -> str:
    """Return the chat template; with BOS before it where a GGUF's reader would put one and a folder's would not."""
    assert parts.template is not None
    if not parts.template_needs_bos:
        return parts.template
    tokenizer = Tokenizer(parts)
    bos = parts.template_tokens.get("bos_token", "")
    if not tokenizer.has_chat_template or bos in parts.template or "bos_token" in parts.template:
        return parts.template
    return "{{ bos_token }}" + parts.template
