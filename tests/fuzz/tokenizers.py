"""Tokenizer files of every kind, and chat templates. They encode, decode and render."""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

from duolocal.errors import DuoLocalError
from duolocal.models.gguf import open_gguf
from duolocal.models.gguf_config import config_from_gguf
from duolocal.tokenizer import Message, Tokenizer
from duolocal.tokenizer.folder import read_folder
from duolocal.tokenizer.gguf_vocab import read_gguf
from duolocal.tokenizer.parts import TokenizerParts
from duolocal.tokenizer.template import ChatTemplate
from tests.fuzz import templates
from tests.fuzz.base import Wrong, check_refusal, copy_seed, pick
from tests.fuzz.damage import damaged_bytes, damaged_json, flipped_bits, json_bytes
from tests.fuzz.models import check_config

TEXTS = (
    "Hello, wörld! It's 12345.\n\n  日本語 🙂 <|im_end|></s>\t\0",
    " ".join(["word"] * 200) + "\n" + "a" * 300 + "\n\n \n",
    "<s>[INST] x [/INST]",
)
MESSAGES = (Message("user", " What is <|eot_id|> 1 + 1? "), Message("assistant", "2"), Message("user", "Thanks.\n"))


def read_tokenizer(parts: TokenizerParts) -> None:
    """Encode and decode with a tokenizer, and render a chat."""
    tokenizer = Tokenizer(parts, vocab_size=1000)
    for text in TEXTS:
        for special in (False, True):
            ids = tokenizer.encode(text, bos=True, special=special)
            if not all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids):
                raise Wrong(f"ids outside the vocabulary of {tokenizer.vocab_size}: {ids[:20]}")
            decoded, stream = tokenizer.decode(ids), tokenizer.stream()
            if "".join([*map(stream.push, ids), stream.flush()]) != decoded:
                raise Wrong("the stream is not the decoded text")
    if not all(type(i) is int and 0 <= i < 1 << 24 for i in tokenizer.eos_ids):
        raise Wrong(f"end tokens that no vocabulary has: {sorted(tokenizer.eos_ids)[:5]}")
    try:
        tokenizer.encode_pieces(tokenizer.chat_pieces(MESSAGES))
    except DuoLocalError as error:
        check_refusal(error)  # plain text works all the same


def read_tokenizer_folder(path: Path) -> None:
    read_tokenizer(read_folder(path))


def read_gguf_vocab(path: Path) -> None:
    read_tokenizer(read_gguf(open_gguf(path).metadata, name=path.name))


def _regex(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# What a tokenizer.json may say in good form, to take time or memory.
_EVIL_PARTS: tuple[tuple[str, Any], ...] = (
    *(
        ("pre_tokenizer", _regex(pattern))
        for pattern in (
            "(a+)+$",
            "(a|aa)+$",
            "(a*)*b",
            "(?:a?){30}a{30}",
            r"(.*)*\1x",
            "(",
            "[",
            "a{1,99999}",
            "",
            "(?=a*)*",
        )
    ),
    ("pre_tokenizer", _regex("((((((((((a{9}){9}){9}){9}){9}){9}){9}){9}){9}){9}")),
    ("normalizer", {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100_000}),
    ("normalizer", {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}),
    ("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "b"}),
    ("normalizer", {"type": "Prepend", "prepend": "x" * 1_000_000}),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "/////w" + "A" * 40}),
    ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Lowercase"}] * 1000}),
    (
        "normalizer",
        {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40,
        },
    ),
    ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, {"type": "UnicodeScripts"}]}),
    ("pre_tokenizer", {"type": "FixedLength", "length": 0}),
    ("pre_tokenizer", {"type": "Metaspace", "replacement": "ab", "prepend_scheme": "always"}),
    ("decoder", {"type": "CTC", "pad_token": "x", "word_delimiter_token": "", "cleanup": True}),
    ("truncation", {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 5}),
    ("padding", {"strategy": {"Fixed": 1 << 40}, "direction": "Left", "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}),
)


def _both(part: str, before: Any, after: Any) -> Any:
    inner = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}.get(part)
    return after if inner is None else {"type": "Sequence", inner: [before, after]}


def damage_gguf_keys(seeds: Path, out: Path, rng: random.Random) -> Path:
    """Write the key/values of a GGUF as JSON, damaged: of kinds and sizes that the bytes of a file rarely come to."""
    path = copy_seed(rng.choice((pick(seeds, rng), pick(seeds.parent / "gguf", rng))), out)
    metadata = damaged_json(open_gguf(path).metadata, rng)
    path.unlink()
    path = path.with_suffix(".json")
    path.write_text(json.dumps(metadata))
    return path


def read_gguf_keys(path: Path) -> None:
    names: tuple[str, ...] = ()
    if path.suffix == ".json":
        metadata = json.loads(path.read_text())
    else:
        file = open_gguf(path)
        metadata, names = file.metadata, tuple(file.tensors)
    if not isinstance(metadata, dict):
        raise DuoLocalError("no key/values")
    if "tokenizer.ggml.merges" in metadata or "tokenizer.ggml.scores" in metadata:
        read_tokenizer(read_gguf(metadata, name="keys"))
    else:
        check_config(config_from_gguf(metadata, "keys", vocab_size=64, tensor_names=names))


def damage_tokenizer_json(seeds: Path, out: Path, rng: random.Random) -> Path:
    folder = copy_seed(pick(seeds, rng), out)
    path = folder / "tokenizer.json"
    if rng.random() < 0.1:
        path.write_bytes(damaged_bytes(path.read_bytes(), rng))
        return folder
    value = json.loads(path.read_bytes())
    if rng.random() < 0.15:
        part, changed = rng.choice(_EVIL_PARTS)
        value[part] = changed if value[part] is None or rng.random() < 0.7 else _both(part, value[part], changed)
    elif rng.random() < 0.6:  # the small parts: normalizer, pre-tokenizer, decoder, post-processor, added tokens
        part = rng.choice([key for key in value if key != "model" and value[key]])
        value[part] = damaged_json(value[part], rng)
    else:
        value = damaged_json(value, rng)
    path.write_bytes(json_bytes(value, rng))
    return folder


_MORE_TOKENIZER = ("added_tokens_decoder", "chat_template", "add_bos_token", "legacy", "add_prefix_space", "bos_token")


def damage_tokenizer_config(seeds: Path, out: Path, rng: random.Random) -> Path:
    every = sorted((seeds.parent / "tokenizer").iterdir()) + sorted((seeds.parent / "sentencepiece").iterdir())
    folder = copy_seed(rng.choice(every), out)
    name = rng.choice(
        ("tokenizer_config.json",) * 4 + ("added_tokens.json", "generation_config.json", "chat_template.json")
    )
    path = folder / name
    value = json.loads(path.read_bytes()) if path.exists() else {"<new>": 901, "eos_token_id": 2, "chat_template": "x"}
    path.write_bytes(json_bytes(damaged_json(value, rng, more=_MORE_TOKENIZER), rng))
    if rng.random() < 0.05:
        (folder / "chat_template.jinja").write_bytes(rng.randbytes(50))
    return folder


def damage_sentencepiece(seeds: Path, out: Path, rng: random.Random) -> Path:
    folder = copy_seed(pick(seeds, rng), out)
    path = folder / "tokenizer.model"
    content = path.read_bytes()
    # The trainer's and the normalizer's settings stand at the end.
    at = len(content) - 600
    kind = rng.random()
    if kind < 0.4:
        content = flipped_bits(content, rng)
    elif kind < 0.6:
        content = content[:at] + flipped_bits(content[at:], rng)
    elif kind < 0.8:
        content = content[:at] + damaged_bytes(content[at:], rng)
    else:
        content = damaged_bytes(content, rng, head=rng.choice((300, len(content))))
    path.write_bytes(content)
    return folder


def damage_template(seeds: Path, out: Path, rng: random.Random) -> Path:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    path = out / "chat_template.jinja"
    path.write_text(templates.hostile_template(rng), encoding="utf-8", errors="surrogatepass")
    return path


def read_template(path: Path) -> None:
    """Render a chat; the output must be bounded."""
    source = path.read_bytes().decode("utf-8", "surrogatepass")
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    rendered = template.render(
        [{"role": message.role, "content": message.content} for message in MESSAGES], add_generation_prompt=True
    )
    if len(rendered) > 2_000_000:
        raise Wrong(f"a rendering of {len(rendered)} characters")
    if re.search(r"uid=\d+\(|root:x:0:0", rendered):
        raise Wrong("the template reached the system")
