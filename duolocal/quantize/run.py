"""The whole job as one generator: checks, layer after layer, then the folder.

Memory: one layer in float32 and its rounding, at most MAX_ROWS rows of input for each linear group, and the hidden
states of the calibration windows (num_samples x num_tokens x hidden_size float32, on the CPU). Everything else is read
from the source when its turn comes.

A layer's calibration inputs are the outputs of the layers before it as they were quantized, not as they were: that is
what it will read, and its scales and clipping can make up for what was lost. (AutoAWQ feeds the originals.) It also
lets an interrupted run go on from the finished layers alone: they give the same states again, bit for bit.
"""

import math
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duolocal.engine.place import device_named
from duolocal.errors import SettingsError
from duolocal.models.assemble import layer_roles, outer_roles
from duolocal.models.config import ModelConfig
from duolocal.models.loader import ModelSource, open_model
from duolocal.quantize.checkpoint import beside_weights, check_room, outer_bytes, write_checkpoint
from duolocal.quantize.forward import advance, capture
from duolocal.quantize.layer import Parts, QuantizedLayer, load_layer, quantize_layer
from duolocal.quantize.model_config import checkpoint_config, generation_config
from duolocal.quantize.results import (
    GROUP_SIZES,
    METHODS,
    LayerLosses,
    QuantizeProgress,
    QuantizeResult,
    QuantizeSettings,
)
from duolocal.quantize.windows import calibration_windows, digest
from duolocal.quantize.work_area import WorkArea
from duolocal.tokenizer import load_tokenizer

VERSION = 1  # of what is computed; work of another version is not gone on with


def quantize(
    source: str | Path | ModelSource,
    out: Path,
    settings: QuantizeSettings | None = None,
    *,
    text: str | None = None,
    device: str = "auto",
    threads: int | None = None,
) -> Generator[QuantizeProgress | QuantizeResult, None, None]:
    """Write a model (`open_model`) to the folder `out` in 4 bits; yield progress and at last one QuantizeResult.

    out: new or empty, or left by an interrupted run of the same settings, which is gone on with; text: for
    calibration, None for Python's own help texts; device: "auto", "cpu" or "cuda"; threads: of the CPU, None as torch
    has it. Raises DuoLocalError, for settings before any work.
    """
    began_s = time.monotonic()
    source = open_model(source)
    settings = QuantizeSettings() if settings is None else settings
    group_size = _check(source, settings)
    where, config = device_named(device), source.config
    if threads is not None:
        torch.set_num_threads(threads)
    checkpoint, generation = checkpoint_config(source, group_size=group_size), generation_config(source)
    beside = beside_weights(source)
    windows: list[list[int]] = []
    if settings.method == "awq":
        windows = calibration_windows(
            load_tokenizer(source),
            text,
            num_samples=settings.num_samples,
            num_tokens=settings.num_tokens,
            seed=settings.seed,
        )
    linear_weights, linear_bytes = linear_size(config, group_size)
    if not (out / "unfinished").exists():
        check_room(out, 2 * linear_bytes + outer_bytes(source))
    description = _description(source, settings, group_size, windows)
    work = WorkArea(out, description)
    try:
        yield QuantizeProgress(0, config.num_layers, "beginning")
        resumed = work.count()
        losses: list[LayerLosses] = []
        for event in _layers(work, source, windows, settings, group_size=group_size, device=where):
            if event.losses is not None:
                losses.append(event.losses)
            yield event
        for done, total in write_checkpoint(work, source, config=checkpoint, generation=generation, beside=beside):
            yield QuantizeProgress(config.num_layers, config.num_layers, f"writing layer {done} of {total}")
    finally:
        work.close()
    num_weights = sum(math.prod(role.shape) for role in outer_roles(config)) + sum(
        math.prod(role.shape) for layer in range(config.num_layers) for role in layer_roles(config, layer)
    )
    yield QuantizeResult(
        out=out,
        method=settings.method,
        group_size=group_size,
        layers=tuple(losses),
        num_linear_weights=linear_weights,
        linear_bytes=linear_bytes,
        num_weights=num_weights,
        bytes_before=source.size_bytes,
        bytes_after=sum(path.stat().st_size for path in out.glob("*.safetensors")),
        num_tokens=sum(map(len, windows)),
        resumed=resumed,
        elapsed_s=time.monotonic() - began_s,
    )


def fitting_group_sizes(config: ModelConfig) -> list[int]:
    """Return which of GROUP_SIZES divide the input features of every linear, the largest first."""
    sizes = {role.shape[1] for role in layer_roles(config, 0) if len(role.shape) == 2}
    return [group for group in GROUP_SIZES if all(size % group == 0 for size in sizes)]


def linear_size(config: ModelConfig, group_size: int) -> tuple[int, int]:
    """Return how many weights are quantized, and the bytes they take, scales and zero points included."""
    shapes = [role.shape for role in layer_roles(config, 0) if len(role.shape) == 2]
    weights = config.num_layers * sum(math.prod(shape) for shape in shapes)
    return weights, weights // 2 + weights // group_size * 5 // 2


def _check(source: ModelSource, settings: QuantizeSettings) -> int:
    """Return the group size; raise SettingsError for what cannot be done."""
    config = source.config
    if settings.method not in METHODS:
        raise SettingsError(f"method {settings.method!r} is unknown: use {' or '.join(METHODS)}")
    if source.kind not in ("gguf", "safetensors"):
        raise SettingsError(
            f"{source.path} is a model of the kind {source.kind} ({source.weight_format}): give the 16-bit model, "
            "a folder of safetensors or a .gguf file"
        )
    for name, value in (("--samples", settings.num_samples), ("--tokens", settings.num_tokens)):
        if value < 1:
            raise SettingsError(f"{name} is {value}: give 1 or more")
    reach = min(config.max_positions, config.sliding_window or config.max_positions)
    if settings.method == "awq" and settings.num_tokens > reach:
        raise SettingsError(f"--tokens is {settings.num_tokens:,} per sample; this model reaches {reach:,}: use fewer")
    for role in layer_roles(config, 0):
        if len(role.shape) == 2 and role.shape[0] % 8:
            raise SettingsError(
                f"{role.name.partition('.')[0]} has {role.shape[0]} output features; AWQ packs them in eights, so this "
                "model cannot be written in its layout"
            )
    fitting = fitting_group_sizes(config)
    if not fitting:
        sizes = " or ".join(map(str, GROUP_SIZES))
        raise SettingsError(f"no group size ({sizes}) divides the linears of this model: it cannot be written as AWQ")
    group_size = fitting[0] if settings.group_size is None else settings.group_size
    if group_size not in fitting:
        widths = sorted({role.shape[1] for role in layer_roles(config, 0) if len(role.shape) == 2})
        raise SettingsError(
            f"--group-size {group_size} cannot be used: this model's linears read {', '.join(map(str, widths))} "
            f"features; use {' or '.join(map(str, fitting))}"
        )
    return group_size


def _description(
    source: ModelSource, settings: QuantizeSettings, group_size: int, windows: list[list[int]]
) -> dict[str, Any]:
    """Return what the finished layers depend on, in words that a refusal can use."""
    found: dict[str, Any] = {"version": VERSION, "model": source.fingerprint, "method": settings.method}
    found["group size"] = group_size
    if settings.method == "awq":
        found |= {"samples": settings.num_samples, "tokens": settings.num_tokens, "seed": settings.seed}
        found["text"] = digest(windows)
    return found


def _layers(
    work: WorkArea,
    source: ModelSource,
    windows: list[list[int]],
    settings: QuantizeSettings,
    *,
    group_size: int,
    device: torch.device,
) -> Iterator[QuantizeProgress]:
    """Quantize what is not finished, keeping every layer in the work area; the last event of a layer has its losses."""
    config, total = source.config, source.config.num_layers
    finished = work.count()
    hidden: list[Tensor] = []  # per window, [num_tokens, hidden_size] float32 on the CPU
    if finished < total:
        hidden = [_embedded(source, window) for window in windows]
    began_s = time.monotonic()
    for layer in range(total):
        fresh = max(0, layer - finished)
        elapsed_s = time.monotonic() - began_s if fresh else 0.0

        def progress(doing: str) -> QuantizeProgress:
            return QuantizeProgress(layer, total, f"layer {layer + 1} of {total}: {doing}", fresh, elapsed_s)  # noqa: B023

        if layer < finished:
            result = work.load(layer)
        else:
            if layer == finished:
                began_s = time.monotonic()  # the way through the finished layers is no measure of what is to come
            parts = _read(source, layer, device)
            inputs = None
            if settings.method == "awq":
                for event in capture(config, parts, hidden, seed=settings.seed + len(windows) * layer):
                    if isinstance(event, int):
                        yield progress(f"reading, {event} of {len(windows)} samples")
                    else:
                        inputs = event
            for step in quantize_layer(parts, inputs, config, layer=layer, group_size=group_size):
                if isinstance(step, QuantizedLayer):
                    result = step
                else:
                    yield progress(step)
            work.save(layer, result)
            del parts, inputs
        if hidden and layer + 1 < total:
            weights = load_layer(result.tensors, config, layer, device)
            for done in advance(config, weights, hidden, device=device):
                yield progress(f"passing on, {done} of {len(windows)} samples")
        yield QuantizeProgress(
            layer + 1,
            total,
            f"layer {layer + 1} of {total} done",
            max(0, layer + 1 - finished),
            time.monotonic() - began_s,
            result.losses,
        )


def _embedded(source: ModelSource, window: list[int]) -> Tensor:
    role = next(role for role in outer_roles(source.config) if role.name == "embedding.weight")
    embedding = source.tensors.weight(role, torch.device("cpu"))
    return embedding.rows(torch.tensor(window, dtype=torch.int64), torch.float32)


def _read(source: ModelSource, layer: int, device: torch.device) -> Parts:
    """Return a layer's tensors in float32 on `device`."""
    parts: Parts = {}
    for role in layer_roles(source.config, layer):
        if len(role.shape) == 2:
            # Contiguous: what a format decodes to may be a transposed view, slow to group.
            weight = source.tensors.weight(role, torch.device("cpu")).dequantize(torch.float32)
            parts[role.name] = weight.to(device).contiguous()
        else:
            parts[role.name] = source.tensors.vector(role, device, torch.float32)
    return parts
