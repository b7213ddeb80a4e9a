"""The tokenizer in a model folder: tokenizer.json, or else tokenizer.model (sentencepiece).

Reads tokenizer_config.json, generation_config.json, added_tokens.json and the chat template files beside them.
Only what changes ids or text is taken; the encoding itself is the backends'.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from duolocal.errors import TokenizerError
from duolocal.tokenizer.components import check_components
from duolocal.tokenizer.cuts import CutSafety, find_safety
from duolocal.tokenizer.library import LibraryBackend, cut_rules
from duolocal.tokenizer.parts import (
    END_TOKENS,
    SpecialToken,
    TokenizerParts,
    byte_level_bytes,
    sentencepiece_bytes,
)
from duolocal.tokenizer.sentencepieces import PieceType, SentencePieceBackend, as_control, read_pieces

_MAX_JSON_BYTES = 1 << 27  # the largest in use have 34 MB
_MAX_TEMPLATE_FILE = 1 << 24
_MOST_IDS = 1 << 24
_MAX_HOLES = 1 << 16  # ids of a vocabulary that no token has
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


def _read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; {} for a file that is not there."""
    if not path.exists():
        return {}
    _check_size(path, _MAX_JSON_BYTES)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, RecursionError, ValueError) as error:
        raise TokenizerError(f"{path.name}: cannot be read as JSON ({' '.join(str(error).split())})") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path.name}: holds a {type(value).__name__}, wanted a JSON object")
    return value


def _check_size(path: Path, limit: int) -> None:
    size = path.stat().st_size
    if size > limit:
        raise TokenizerError(f"{path.name}: has {size:,} bytes, wanted at most {limit:,}; the file is damaged")


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the default chat template; a file of its own goes before tokenizer_config.json, as in transformers."""
    own = folder / "chat_template.jinja"
    if own.exists():
        _check_size(own, _MAX_TEMPLATE_FILE)
        try:
            return own.read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{own.name}: cannot be read ({' '.join(str(error).split())})") from error
    template = _read_json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(template, list):  # several by name
        if not all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in template):
            raise TokenizerError("the chat templates of this model are no list of names and templates: damaged")
        template = {entry["name"]: entry.get("template") for entry in template}.get("default")
    if template is not None and not isinstance(template, str):
        raise TokenizerError(f"the chat template of this model is a {type(template).__name__}, wanted a text: damaged")
    return template


def _text(token: Any) -> str | None:
    """Return the string of a token that a config writes as a string or as an object with "content"."""
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise ValueError(f"a token is a {type(text).__name__}, wanted a text")
    return text


def read_folder(folder: Path, *, eos_ids: Iterable[int] = ()) -> TokenizerParts:
    """Return the tokenizer in `folder`; `eos_ids` are those of the model's config."""
    config = _read_json(folder / "tokenizer_config.json")
    declared = {*eos_ids, *_declared_ends(folder)}
    template = _read_template(folder, config)
    for file, read in (("tokenizer.json", _from_json), ("tokenizer.model", _from_sentencepiece)):
        if not (folder / file).exists():
            continue
        try:
            parts = read(folder / file, config, template)
        except (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise TokenizerError(f"{file}: damaged, or of a form that duolocal does not read ({reason})") from error
        return replace(parts, eos_ids=parts.eos_ids | declared)
    raise TokenizerError(f"{folder.name}: no tokenizer.json and no tokenizer.model in the folder; put one there")


def _declared_ends(folder: Path) -> list[int]:
    """Return the ids that generation_config.json says to end at."""
    found = _read_json(folder / "generation_config.json").get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(index) is int and 0 <= index < _MOST_IDS for index in ids):
        raise TokenizerError("generation_config.json: eos_token_id is no token id and no list of them: damaged")
    return ids


def _added_tokens(
    description: Mapping[str, Any], config: Mapping[str, Any], folder: Path, *, vocab: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Return the tokens beside the vocabulary, by id; the tokenizer's own description goes before the configs.

    A token of the vocabulary that the config names (bos_token, ...) counts as one, as in transformers.
    """
    named = {_text(config.get(key)) for key in _NAMED}
    by_id: dict[int, dict[str, Any]] = {
        vocab[text]: {"content": text, "special": True} for text in named if text is not None and text in vocab
    }
    for text, index in _read_json(folder / "added_tokens.json").items():
        by_id[int(index)] = {"content": text, "special": False}
    for index, token in (config.get("added_tokens_decoder") or {}).items():
        by_id[int(index)] = token
    for token in description.get("added_tokens") or []:
        by_id[token["id"]] = token
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    added = [{**flags, **token, "id": index} for index, token in sorted(by_id.items())]
    for token in added:
        if not isinstance(token["content"], str) or not all(isinstance(token[flag], bool) for flag in flags):
            raise ValueError(f"the added token {token['id']} has no text, or a flag that is neither true nor false")
    _check_ids([*vocab.values(), *by_id])
    return added


def _check_ids(ids: Sequence[Any]) -> None:
    """Raise ValueError unless these are ids of a vocabulary, with few holes: a table is made for the largest."""
    if not all(type(index) is int and index >= 0 for index in ids):
        raise ValueError("a token id is no number from 0 on")
    if ids and max(ids) > 2 * len(ids) + _MAX_HOLES:
        raise ValueError(f"a token has the id {max(ids):,} in a vocabulary of {len(ids):,}")


def _specials(
    added: Iterable[Mapping[str, Any]], config: Mapping[str, Any], template: str | None
) -> dict[str, SpecialToken]:
    """Return the tokens that template text may hold: flagged, named by the config, ends, or spelled in it."""
    named = {_text(config.get(key)) for key in _NAMED}
    return {
        token["content"]: SpecialToken(token["content"], token["id"], token["lstrip"], token["rstrip"])
        for token in added
        if token["special"]
        or token["content"] in named
        or token["content"] in END_TOKENS
        or (template is not None and token["content"] in template)
    }


def _bytes_rule(decoder: dict[str, Any] | None, name: str) -> tuple[bool, bool]:
    """Return whether tokens are byte-level, and whether decoding drops the first space."""
    steps = decoder["decoders"] if decoder and decoder["type"] == "Sequence" else [decoder or {"type": "none"}]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return True, False
    if kinds == ["Metaspace"]:
        first = steps[0].get("prepend_scheme") or ("always" if steps[0].get("add_prefix_space", True) else "never")
        return False, first != "never"
    if set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"} and "Replace" in kinds:
        return False, "Strip" in kinds
    raise TokenizerError(f"{name}: decoder {'+'.join(kinds)} is not one that duolocal reads (ByteLevel, Metaspace)")


def _from_json(path: Path, config: Mapping[str, Any], template: str | None) -> TokenizerParts:
    description = _read_json(path)
    name = path.name
    model = description.get("model") or {}
    if model.get("type", "BPE") != "BPE" or "merges" not in model or "vocab" not in model:
        raise TokenizerError(f"{name}: model type is {model.get('type')!r}; duolocal reads 'BPE'")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise TokenizerError(f"{name}: subword marks (continuing_subword_prefix, end_of_word_suffix) are not read")
    check_components(description, name)
    added = _added_tokens(description, config, path.parent, vocab=model["vocab"])
    specials = _specials(added, config, template)
    byte_level, strips_space = _bytes_rule(description.get("decoder"), name)
    to_bytes = byte_level_bytes if byte_level else sentencepiece_bytes
    table = [b""] * (1 + max([*model["vocab"].values(), *(token["id"] for token in added)], default=0))
    for piece, index in model["vocab"].items():
        table[index] = to_bytes(piece)
    for token in added:
        table[token["id"]] = token["content"].encode()
    description["added_tokens"] = added
    rules = cut_rules(description)
    ordinary = [token for token in added if token["content"] not in specials]
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in ordinary):
        rules = CutSafety()  # such a token looks at its neighbours
    safety = rules
    if rules.words:
        ids = {special.id for special in specials.values()}
        safety = find_safety((data for i, data in enumerate(table) if i not in ids), lines=rules.lines)
    backend = LibraryBackend(description, special=specials.keys(), safety=safety, name=name)
    names = {key: named for key in _NAMED if (named := _text(config.get(key))) is not None}
    ids_by_text = {**model["vocab"], **{token["content"]: token["id"] for token in added}}
    hidden = {token["id"] for token in added if token["special"]}
    hidden |= {ids_by_text[text] for text in names.values() if text in ids_by_text}
    first = _first_by_post_processor(description.get("post_processor"), ids_by_text)
    bos_id = ids_by_text.get(names.get("bos_token", ""), first)
    adds_bos = config.get("add_bos_token")
    return TokenizerParts(
        backend=backend,
        token_bytes=table,
        specials=specials,
        hidden_ids=frozenset(hidden),
        bos_id=bos_id,
        eos_ids=_ends(names, ids_by_text, specials),
        adds_bos=bos_id is not None and (first == bos_id if adds_bos is None else bool(adds_bos)),
        template_needs_bos=False,
        strips_space=strips_space,
        template=template,
        template_tokens=names,
        origin=name,
        fingerprint=_fingerprint(path.read_bytes(), added),
    )


def _first_by_post_processor(processor: dict[str, Any] | None, ids: Mapping[str, int]) -> int | None:
    """Return the special token that a tokenizer.json's post-processor puts before text, if any."""
    if processor is None:
        return None
    if processor["type"] == "Sequence":
        found = (_first_by_post_processor(part, ids) for part in processor["processors"])
        return next((index for index in found if index is not None), None)
    if processor["type"] != "TemplateProcessing" or not processor["single"]:
        return None
    return ids.get(processor["single"][0].get("SpecialToken", {}).get("id", ""))


def _ends(names: Mapping[str, str], ids: Mapping[str, int], specials: Mapping[str, SpecialToken]) -> frozenset[int]:
    ends = {special.id for text, special in specials.items() if text in END_TOKENS}
    if names.get("eos_token") in ids:
        ends.add(ids[names["eos_token"]])
    return frozenset(ends)


def _fingerprint(data: bytes, added: Iterable[Mapping[str, Any]]) -> str:
    listed = json.dumps([[token["id"], token["content"], token["special"]] for token in added])
    return hashlib.sha256(hashlib.sha256(data).digest() + listed.encode()).hexdigest()


def _from_sentencepiece(path: Path, config: Mapping[str, Any], template: str | None) -> TokenizerParts:
    proto = path.read_bytes()
    name = path.name
    legacy = config.get("legacy", True) is not False
    adds_space = config.get("add_prefix_space", True) is not False
    pieces = read_pieces(proto, name=name)
    size = len(pieces)
    added = _added_tokens({}, config, path.parent, vocab={text: i for i, (text, _) in enumerate(pieces)})
    known = {token["id"] for token in added}
    for index, (text, kind) in enumerate(pieces):
        if kind in (PieceType.CONTROL, PieceType.USER_DEFINED) and index not in known:
            flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
            added.append({"id": index, "content": text, "special": kind == PieceType.CONTROL, **flags})
    specials = _specials(added, config, template)
    table = [sentencepiece_bytes(text) for text, _ in pieces]
    table += [b""] * (1 + max((token["id"] for token in added), default=0) - size)
    for token in added:
        table[token["id"]] = token["content"].encode()
    outside = [t["content"] for t in added if t["id"] >= size and t["content"] not in specials]
    special_ids = {special.id for special in specials.values()}
    backend = SentencePieceBackend(
        as_control(proto, {i for i in special_ids if i < size and pieces[i][1] != PieceType.UNKNOWN}),
        name=name,
        prefix="none" if not adds_space else ("sections" if legacy else "start"),
        added={token["content"]: token["id"] for token in added if token["content"] in outside},
    )
    ids = {text: i for i, (text, _) in enumerate(pieces)} | {token["content"]: token["id"] for token in added}
    names = {key: named for key in _NAMED if (named := _text(config.get(key))) is not None}
    bos_id = ids.get(names.get("bos_token", "<s>"))
    names.setdefault("bos_token", "<s>")
    names.setdefault("eos_token", "</s>")
    hidden = {token["id"] for token in added if token["special"]}
    hidden |= {i for i, (_, kind) in enumerate(pieces) if kind in (PieceType.CONTROL, PieceType.UNKNOWN)}
    hidden |= {ids[text] for text in names.values() if text in ids}
    return TokenizerParts(
        backend=backend,
        token_bytes=table,
        specials=specials,
        hidden_ids=frozenset(hidden),
        bos_id=bos_id,
        eos_ids=_ends(names, ids, specials),
        adds_bos=bos_id is not None and config.get("add_bos_token", True) is not False,
        template_needs_bos=False,
        strips_space=backend.prefix != "none",
        template=template,
        template_tokens=names,
        origin=name,
        fingerprint=_fingerprint(proto, added),
    )
