"""The vocabulary inside a GGUF file, from its key/values to `TokenizerParts`.

"gpt2" is byte-level BPE, whose pre-tokenizer is named by `tokenizer.ggml.pre`; "llama" is sentencepiece BPE.
The names and the splitting they stand for are llama.cpp's (src/llama-vocab.cpp); where the model's original
tokenizer normalises (Qwen2: NFC), the original is followed. Does not read the file itself.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

from duolocal.errors import TokenizerError
from duolocal.tokenizer.cuts import find_safety
from duolocal.tokenizer.library import (
    LLAMA3_REGEX,
    QWEN2_REGEX,
    TEKKEN_REGEX,
    LibraryBackend,
    cut_rules,
)
from duolocal.tokenizer.parts import (
    END_TOKENS,
    Backend,
    SpecialToken,
    TokenizerParts,
    byte_level_bytes,
    sentencepiece_bytes,
)
from duolocal.tokenizer.sentencepieces import PieceType, SentencePieceBackend, build_model

_PREFIX = "tokenizer.ggml."
_BYTE_LEVEL: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_DIGITS = {"type": "Digits", "individual_digits": True}


def _split(regex: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**_BYTE_LEVEL, "use_regex": False}]}


_GPT2 = {**_BYTE_LEVEL, "use_regex": True}
_SMOLLM = {"type": "Sequence", "pretokenizers": [_DIGITS, _GPT2]}
_LLAMA3, _QWEN2, _TEKKEN = _split(LLAMA3_REGEX), _split(QWEN2_REGEX), _split(TEKKEN_REGEX)
_PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _GPT2,
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "refact": _SMOLLM,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "tekken")  # a word in the vocabulary needs no merges
_WITH_BOS = _WHOLE_WORDS  # unless the file says otherwise


def _key(metadata: Mapping[str, Any], key: str, name: str) -> Any:
    try:
        return metadata[_PREFIX + key]
    except KeyError:
        raise TokenizerError(f"{name}: no {_PREFIX}{key} in the file, so it brings no tokenizer") from None


_KINDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "pre": (str,),
    "bos_token_id": (int,),
    "eos_token_id": (int,),
    "eot_token_id": (int,),
    "eom_token_id": (int,),
    "unknown_token_id": (int,),
    "padding_token_id": (int,),
    "add_bos_token": (bool, int),
    "add_space_prefix": (bool, int),
    "remove_extra_whitespaces": (bool, int),
}
_TOKEN_TYPES = frozenset(range(7))  # llama.cpp: 0 is undefined, the others are PieceType
_LARGEST = 3.4e38
_ITEMS: dict[str, tuple[type, ...]] = {"tokens": (str,), "merges": (str,), "token_type": (int,), "scores": (int, float)}


def _check_kinds(metadata: Mapping[str, Any], name: str) -> None:
    """Raise TokenizerError where a key is of another kind than any GGUF has it."""
    wanted = [(_PREFIX + key, kinds) for key, kinds in _KINDS.items()] + [("tokenizer.chat_template", (str,))]
    for key, kinds in wanted:
        value = metadata.get(key)
        if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise TokenizerError(f"{name}: {key} is a {type(value).__name__}, wanted {kinds[0].__name__}: damaged")
        if isinstance(value, str) and not _encodes(value):
            raise TokenizerError(f"{name}: {key} holds what no UTF-8 can: damaged")
    for key, kinds in _ITEMS.items():
        value = metadata.get(_PREFIX + key)
        if value is not None and not (isinstance(value, list) and set(map(type, value)) <= set(kinds)):
            raise TokenizerError(f"{name}: {_PREFIX}{key} is no list of {kinds[-1].__name__}: damaged")
        if kinds == (str,) and not _encodes("".join(value or ())):
            raise TokenizerError(f"{name}: {_PREFIX}{key} holds what no UTF-8 can: damaged")
    odd = set(metadata.get(_PREFIX + "token_type") or ()) - _TOKEN_TYPES
    if odd:
        raise TokenizerError(f"{name}: a token has the type {min(odd)}, wanted 0 to {max(_TOKEN_TYPES)}: damaged")
    if not all(abs(score) < _LARGEST for score in metadata.get(_PREFIX + "scores") or ()):  # not of a NaN either
        raise TokenizerError(f"{name}: a score of a token is no finite float32: damaged")


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _specials(
    tokens: list[str], types: list[int], template: str | None, ends: frozenset[int]
) -> dict[str, SpecialToken]:
    """Return the tokens that template text may hold: control tokens, ends, and what the template spells."""
    found = {}
    for index, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        control = kind == PieceType.CONTROL or index in ends
        spelled = kind == PieceType.USER_DEFINED and template is not None and text in template
        if text and (control or spelled):
            found[text] = SpecialToken(text, index)
    return found


def read_gguf(metadata: Mapping[str, Any], *, name: str) -> TokenizerParts:
    """Return the tokenizer that a GGUF's key/values describe; `name` is the file's, for errors."""
    _check_kinds(metadata, name)
    model = _key(metadata, "model", name)
    tokens: list[str] = list(_key(metadata, "tokens", name))
    types = [int(kind) for kind in metadata.get(_PREFIX + "token_type") or [PieceType.NORMAL] * len(tokens)]
    if len(types) != len(tokens):
        raise TokenizerError(f"{name}: {len(tokens)} tokens but {len(types)} token types; the file is damaged")
    template = metadata.get("tokenizer.chat_template")
    bos_id = _token_id(metadata, "bos_token_id", len(tokens))
    declared = {_token_id(metadata, f"{key}_token_id", len(tokens)) for key in ("eos", "eot", "eom")} - {None}
    named = {i for i, text in enumerate(tokens) if text in END_TOKENS and types[i] != PieceType.NORMAL}
    ends = frozenset(i for i in declared if i is not None) | named
    specials = _specials(tokens, types, template, ends | ({bos_id} if bos_id is not None else set()))
    digest = hashlib.sha256(repr((model, metadata.get(_PREFIX + "pre"), tokens, types)).encode())
    backend: Backend
    if model == "gpt2":
        pre = metadata.get(_PREFIX + "pre")
        merges = list(_key(metadata, "merges", name))
        backend, table = _byte_level(pre, tokens, types, merges, specials, name=name)
        adds_bos = bool(metadata.get(_PREFIX + "add_bos_token", pre in _WITH_BOS))
        strips_space = False
        digest.update(repr(merges).encode())
    elif model == "llama":
        proto = sentencepiece_proto(metadata, tokens, types, specials, name=name)
        strips_space = bool(metadata.get(_PREFIX + "add_space_prefix", True))
        backend = SentencePieceBackend(proto, name=name, prefix="sections" if strips_space else "none")
        table = [sentencepiece_bytes(token) for token in tokens]
        for special in specials.values():
            table[special.id] = special.text.encode()
        adds_bos = bool(metadata.get(_PREFIX + "add_bos_token", True))
        digest.update(proto)
    else:
        raise TokenizerError(f"{name}: tokenizer.ggml.model is {model!r}; duolocal reads 'gpt2' (BPE) and 'llama'")
    hidden = {i for i, kind in enumerate(types) if kind in (PieceType.CONTROL, PieceType.UNKNOWN)} | ends
    names = {"bos_token": bos_id, "eos_token": _token_id(metadata, "eos_token_id", len(tokens))}
    names["unk_token"] = _token_id(metadata, "unknown_token_id", len(tokens))
    names["pad_token"] = _token_id(metadata, "padding_token_id", len(tokens))
    return TokenizerParts(
        backend=backend,
        token_bytes=table,
        specials=specials,
        hidden_ids=frozenset(hidden),
        bos_id=bos_id,
        eos_ids=ends,
        adds_bos=adds_bos and bos_id is not None,
        template_needs_bos=bool(metadata.get(_PREFIX + "add_bos_token", False)) and bos_id is not None,
        strips_space=strips_space,
        template=template,
        template_tokens={key: tokens[index] for key, index in names.items() if index is not None},
        origin="GGUF",
        fingerprint=digest.hexdigest(),
    )


def _token_id(metadata: Mapping[str, Any], key: str, num_tokens: int) -> int | None:
    """Return a special id; None where the file has none, or one that is not in the vocabulary."""
    value = metadata.get(_PREFIX + key)
    return None if value is None or int(value) not in range(num_tokens) else int(value)


def sentencepiece_proto(
    metadata: Mapping[str, Any],
    tokens: list[str],
    types: list[int],
    specials: Mapping[str, SpecialToken],
    *,
    name: str,
) -> bytes:
    """Return the serialized sentencepiece model that the key/values of a "llama" vocabulary describe."""
    scores = [float(score) for score in _key(metadata, "scores", name)]
    if len(scores) != len(tokens):
        raise TokenizerError(f"{name}: {len(tokens)} tokens but {len(scores)} scores; the file is damaged")
    kinds = [
        PieceType.CONTROL if text in specials and kind != PieceType.UNKNOWN else kind
        for text, kind in zip(tokens, types, strict=True)
    ]
    return build_model(
        tokens,
        scores,
        kinds,
        add_space=bool(metadata.get(_PREFIX + "add_space_prefix", True)),
        collapse_spaces=bool(metadata.get(_PREFIX + "remove_extra_whitespaces", False)),
    )


def byte_level_description(
    pre: str | None,
    tokens: list[str],
    types: list[int],
    merges: list[str],
    specials: Mapping[str, SpecialToken],
    *,
    name: str,
) -> dict[str, Any]:
    """Return a "gpt2" vocabulary in tokenizer.json's form, special tokens not among the added ones."""
    if pre not in _PRE_TOKENIZERS:
        seen = f"tokenizer.ggml.pre is {pre!r}" if pre is not None else "no tokenizer.ggml.pre in the file"
        raise TokenizerError(
            f"{name}: {seen}, so how text is split is unknown; known are {', '.join(sorted(_PRE_TOKENIZERS))}; "
            "use a file made by a newer converter, or the model's folder with tokenizer.json"
        )
    added = [
        {"id": index, "content": text, "special": False, "normalized": False}
        | {"lstrip": False, "rstrip": False, "single_word": False}
        for index, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == PieceType.USER_DEFINED and text not in specials
    ]
    return {
        "normalizer": {"type": "NFC"} if _PRE_TOKENIZERS[pre] is _QWEN2 else None,
        "pre_tokenizer": _PRE_TOKENIZERS[pre],
        "added_tokens": added,
        "model": {
            "type": "BPE",
            "vocab": {text: index for index, text in enumerate(tokens)},
            "merges": merges,
            "ignore_merges": pre in _WHOLE_WORDS,
        },
    }


def _byte_level(
    pre: str | None,
    tokens: list[str],
    types: list[int],
    merges: list[str],
    specials: Mapping[str, SpecialToken],
    *,
    name: str,
) -> tuple[LibraryBackend, list[bytes]]:
    """Return the encoder of a byte-level BPE vocabulary and the bytes of each id."""
    description = byte_level_description(pre, tokens, types, merges, specials, name=name)
    as_text = (PieceType.CONTROL, PieceType.USER_DEFINED)
    table = [
        text.encode() if kind in as_text or text in specials else byte_level_bytes(text)
        for text, kind in zip(tokens, types, strict=True)
    ]
    rules = cut_rules(description)
    safety = rules
    if rules.words:
        special_ids = {special.id for special in specials.values()}
        ordinary = (data for index, data in enumerate(table) if index not in special_ids)
        safety = find_safety(ordinary, lines=rules.lines)
    return LibraryBackend(description, special=specials.keys(), safety=safety, name=name), table
