"""Chats over tiny random models that a saved context can belong to: no file, but a source with a fingerprint."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from duolocal.engine.engine import Engine
from duolocal.engine.session import ChatSession, Event, Finished
from duolocal.heads import HeadPlan
from duolocal.kernels.interface import Kernels
from duolocal.models.assemble import Role
from duolocal.models.loader import ModelSource
from duolocal.models.transformer import Transformer
from duolocal.models.weights import ModelWeights
from duolocal.quant.weight import DenseWeight, Weight
from duolocal.settings import Sampling
from duolocal.tokenizer import Tokenizer
from duolocal.tokenizer.folder import read_folder
from tests.tiny import random_model, tiny_config, transformer_of
from tests.tokenizer_files import TEMPLATES, write

GREEDY = Sampling(temperature=0, max_tokens=6)
PLAN = HeadPlan(((True, False), (False, True)), sink_size=4, recent_size=64, source="test")
DOCUMENT = "The mill stood by the river, and nobody remembered who had built it. " * 12


class OuterTensors:
    """The matrices of a model that belong to no layer."""

    def __init__(self, weights: ModelWeights) -> None:
        self._weights = weights

    def weight(self, role: Role, device: torch.device) -> Weight:
        found = self._weights.embedding if role.name == "embedding.weight" else self._weights.lm_head
        assert isinstance(found, DenseWeight)
        return DenseWeight(found.tensor.float())  # as in the file, whatever is computed in

    def vector(self, role: Role, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        raise NotImplementedError


def tiny_tokenizer(folder: Path, template: str = "chatml") -> Tokenizer:
    """Return the small tokenizer of a template, whose files lie in `folder` or are written below it once."""
    place = folder if (folder / "tokenizer.json").is_file() else folder / template
    if not place.exists():
        place.mkdir(parents=True)
        write(place, TEMPLATES[template]())
    return Tokenizer(read_folder(place))


def quiet_model(
    tokenizer: Tokenizer,
    *,
    context: int,
    seed: int = 2,
    dtype: torch.dtype = torch.float32,
    kernels: Kernels | None = None,
    **changes: Any,
) -> Transformer:
    """Return a random model that never says a special token; one seed, one model. `changes`: of the config."""
    config, weights = random_model(
        tiny_config(vocab_size=tokenizer.vocab_size, max_positions=4096, **changes), seed=seed, dtype=dtype
    )
    assert isinstance(weights.lm_head, DenseWeight)
    weights.lm_head.tensor[sorted(tokenizer._hidden)] = 0
    return transformer_of((config, weights), context=context, kernels=kernels)


def tiny_session(
    folder: Path,
    template: str = "chatml",
    *,
    context: int = 2048,
    kv: str = "int8",
    plan: HeadPlan = PLAN,
    chunk_size: int = 64,
    seed: int = 2,
    system: str | None = None,
    fingerprint: str | None = None,
    **model: Any,
) -> ChatSession:
    """Return an empty chat; `model`: as of `quiet_model`."""
    tokenizer = tiny_tokenizer(folder, template)
    transformer = quiet_model(tokenizer, context=context, seed=seed, **model)
    source = ModelSource(
        path=Path("tiny"),
        kind="gguf",
        config=transformer.config,
        metadata={},
        size_bytes=0,
        weight_format="F32",
        fingerprint=fingerprint or f"{seed:064x}",
        tensors=OuterTensors(transformer.weights),
    )
    engine = Engine.build(transformer, plan, kv=kv, chunk_size=chunk_size, source=source)
    return ChatSession(engine, tokenizer, system=system)


def finish(events: Iterable[Event]) -> Finished:
    """Consume events; return the last one."""
    *_, last = events
    assert isinstance(last, Finished)
    return last


def in_context(session: ChatSession) -> list[int]:
    """Return the ids in the cache, and those that will be fed with the next question."""
    return [*session.engine.token_ids, *session.tree.current.unfed]
