"""Small tokenizers made on the spot, and the chat templates of the families, for the tokenizer tests."""

import io
import json
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = "\n".join(pydoc_data.topics.topics.values())
MULTI_BYTE = "naïve façade — “quotes” Ελληνικά עברית 日本語テキスト 🙂👩‍👩‍👧‍👦🇩🇪 e\u0301 n\u0303 한국어 \u0000\t½²³ ①②"
LICENCE = "Copyright (c) 2026\n\n\tPermission is hereby granted, 1234567 times;\r\n   no   warranty!!!\n\n\n  (a)\n"

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
    " + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = CHATML.replace(
    "{% for message in messages %}",
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}",
)
QWEN25 = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen, a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""  # noqa: E501
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
    "'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
THINKS = (
    "{%- for message in messages %}{%- set content = message.content %}{%- if message.role == 'assistant' and "
    "'</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAMA3_TOKENS = [
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|end_of_text|>",
]
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SP_TOKENS = ["<unk>", "<s>", "</s>"]

# As the models' own tokenizer.json files spell them.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Files = dict[str, dict[str, Any]]


def _train(pre: pre_tokenizers.PreTokenizer, alphabet: list[str], special: list[str]) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS[:60_000]], trainer)
    return json.loads(tokenizer.to_str())


def byte_level(regex: str, special: list[str], *, nfc: bool = False, whole_words: bool = False) -> dict[str, Any]:
    """Return a byte-level tokenizer.json as Llama 3 and Qwen 2 have them."""
    from tokenizers import Regex

    pre = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    description = _train(pre, pre_tokenizers.ByteLevel.alphabet(), special)
    description["decoder"] = json.loads(decoders.ByteLevel().__getstate__())
    description["normalizer"] = {"type": "NFC"} if nfc else None
    description["model"]["ignore_merges"] = whole_words
    return description


def sentencepiece_like(*, scheme: str) -> dict[str, Any]:
    """Return a tokenizer.json of Llama 2's kind: `scheme` "prepend" (normalizer) or Metaspace's "first"."""
    description = _train(pre_tokenizers.Metaspace(), ["▁"], SP_TOKENS)
    vocab = description["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    description["model"].update(byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    description["decoder"] = {
        "type": "Sequence",
        "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, strip],
    }
    if scheme == "prepend":
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        description["normalizer"] = {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces],
        }
        description["pre_tokenizer"] = None
    else:
        description["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": scheme,
            "split": False,
        }
    return description


def llama3() -> Files:
    """Return the files of a Llama-3-like tokenizer."""
    description = byte_level(LLAMA3_SPLIT, LLAMA3_TOKENS, whole_words=True)
    bos = {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}
    description["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [0], "tokens": ["<|begin_of_text|>"]}
        },
    }
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "chat_template": LLAMA3}
    return {"tokenizer.json": description, "tokenizer_config.json": config}


def chatml(template: str = QWEN25) -> Files:
    """Return the files of a Qwen-2.5-like tokenizer, with one added token that is not special."""
    description = byte_level(QWEN2_SPLIT, CHATML_TOKENS, nfc=True)
    size = len(description["model"]["vocab"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    description["added_tokens"].append({"id": size, "content": "<tool_call>", **flags})
    config = {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "chat_template": template,
    }
    return {"tokenizer.json": description, "tokenizer_config.json": config}


def llama2(template: str = LLAMA2, *, scheme: str = "prepend") -> Files:
    """Return the files of a Llama-2- or Mistral-like tokenizer in the tokenizer.json form."""
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "chat_template": template,
    }
    return {"tokenizer.json": sentencepiece_like(scheme=scheme), "tokenizer_config.json": config}


def write(folder: Path, files: Files) -> Path:
    """Write each file as JSON and return the folder."""
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def train_sentencepiece(*, symbols: tuple[str, ...] = (), **options: Any) -> bytes:
    """Return a small serialized sentencepiece BPE model of Llama 2's kind."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter((CORPUS[:60_000] + "\n" + MULTI_BYTE.replace("\0", "")).splitlines()),
        model_writer=out,
        **{
            "vocab_size": 900,
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "split_digits": True,
            "allow_whitespace_only_pieces": True,
            "character_coverage": 0.98,
            "user_defined_symbols": list(symbols),
            "minloglevel": 2,
            "num_threads": 1,
            **options,
        },
    )
    return out.getvalue()


TEMPLATES: dict[str, Callable[[], Files]] = {"chatml": chatml, "llama3": llama3, "llama2": llama2}
