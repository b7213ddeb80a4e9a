"""What `duolocal plan` shows: a bar of the memory, tables by place, times, and settings that fit."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import psutil
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from duolocal.commands.plan import Plan
from duolocal.engine.kernels import activations_named, arrangement, make_kernels
from duolocal.engine.planning import Planned, plan_settings
from duolocal.plan.cards import card_rates
from duolocal.plan.duration import Rates, duration_of
from duolocal.plan.fitting import Setting
from duolocal.plan.memory import MemoryPlan, bytes_per_token, dense_16bit_bytes, plan_memory
from duolocal.plan.rates import keep_rates, known_rates, measure_rates, rates_key, sample_model
from duolocal.plan.request import Request
from duolocal.plan.session_size import session_bytes
from duolocal.settings import LoadSettings
from duolocal.terminal import figures
from duolocal.terminal.clean import clean_line
from duolocal.terminal.consoles import drawn, new_console, progress_console
from duolocal.terminal.progress import bar
from duolocal.terminal.tables import bare_table, fact_table

_MOST_COLUMNS = 72
_LOOK_S = 0.3  # at what else the machine does, before it is measured
_BUSY_PERCENT = 25  # of all processors: figures would say more about the other work
_STYLES = ("blue", "cyan", "green", "yellow", "magenta", "bright_black")


def plan(options: Plan, settings: LoadSettings) -> int:
    """Print the plan; return the exit code: 0 where it fits, else 1."""
    planned = plan_settings(
        settings, card=options.card, memory=options.memory, host_memory=options.host_memory, disk=options.disk
    )
    rates = rates_for(planned, settings, progress_console(), measure=None if options.no_measure else options.measure)
    if options.json:
        plan_json(planned, rates)
    else:
        print_plan(planned, rates, new_console())
    return 0 if planned.fits else 1


def rates_for(planned: Planned, settings: LoadSettings, progress: Console, *, measure: bool | None) -> Rates | None:
    """Return the speeds to expect: of the card, or of this machine, measured once and remembered.

    measure: True to measure anew, False to do so only where nothing is known, None never (then None may come back).
    """
    if planned.card is not None:
        return card_rates(planned.card)
    request = planned.request
    config, weights, layout = request.config, request.weights, request.layout
    activations = activations_named(settings.activations, request.kernels, config)
    key = rates_key(
        shape=[config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads, config.head_dim],
        layers=config.num_layers,
        formats=[weights.layer_format, weights.outer_format, planned.kv],
        kernels=f"{request.kernels} {activations}",
        threads=request.threads,
        device=request.device,
        dtype=str(request.dtype),
    )
    found = None if measure else known_rates(key)
    if found is not None or measure is None:
        return found
    import torch

    device = torch.device(request.device)
    busy = psutil.cpu_percent(_LOOK_S) > _BUSY_PERCENT
    with bar(progress, "measuring this machine, once for this model", "") as shown:
        kernels = make_kernels(
            request.kernels,
            device=device,
            dtype=request.dtype,
            num_threads=settings.threads,
            activations=activations,
            on_build=shown.compiling,
        )
        sample = sample_model(
            config,
            None if planned.source is None else planned.source.tensors,
            layer_format=weights.layer_format,
            outer_format=weights.outer_format,
            layer_bytes=weights.layer_bytes,
            device=device,
            dtype=request.dtype,
            arrange=arrangement(kernels, request.dtype),
        )
        rates = measure_rates(
            sample, layout, kernels=kernels, device=device, dtype=request.dtype, on_progress=shown.update
        )
    if busy:
        return replace(rates, source="measured on this machine beside other work, so not kept")
    keep_rates(key, rates)
    return rates


def device_rows(plan: MemoryPlan, *, on_gpu: bool) -> list[tuple[str, int, str]]:
    """List what takes memory on the device: name, bytes, and how that is known."""
    device = plan.device
    blocks = "KV blocks of retrieval heads" + (" (a cache of them)" if plan.offloaded else "")
    process = "CUDA context" if on_gpu else "Python and torch"
    rows = [
        ("weights", device.weights, ""),
        ("norms, reordered rows, keys of the file", device.copies, ""),
        (blocks, device.blocks, ""),
        ("digests for selected decode", device.digests, ""),
        ("windows of retrieval heads", device.retrieval_windows, ""),
        ("windows of streaming heads", device.streaming_windows, ""),
        ("working memory of a chunk", device.working, "estimated" if on_gpu else ""),
        ("libraries and graphs", device.workspace, "estimated"),
        ("token ids", device.tokens, ""),
        (process, plan.process, "estimated" if on_gpu else "measured once, docs/performance.md"),
    ]
    return [row for row in rows if row[1]]


def print_plan(planned: Planned, rates: Rates | None, console: Console) -> None:
    """Print the plan, and the nearest settings where it does not fit."""
    console.print(plan_view(planned, rates, console.width))


def plan_view(planned: Planned, rates: Rates | None, columns: int) -> RenderableType:
    """Build the picture, the tables and the verdict."""
    plan, request = planned.plan, planned.request
    on_gpu = request.device == "cuda"
    rows = device_rows(plan, on_gpu=on_gpu)
    parts: list[RenderableType] = [_title(planned), memory_bar(rows, planned.memory, columns), _memory(planned, rows)]
    parts.append(Text())
    parts.append(_more(planned, rates))
    parts.append(Text())
    if planned.fits:
        parts += _verdict(planned)
    else:
        parts += _refusal(planned)
    parts += [Text(f"* {clean_line(note)}", style="dim") for note in planned.notes]
    return Group(*parts)


def memory_bar(rows: list[tuple[str, int, str]], memory: int, columns: int) -> Text:
    """Draw the parts side by side in one bar as long as the memory; what is beyond it follows a bar in red."""
    width = max(20, min(columns - 2, _MOST_COLUMNS))
    total = sum(size for _, size, _ in rows)
    scale = width / max(memory, total, 1)
    line = Text()
    at = done = 0
    end = round(memory * scale)
    for number, (_, size, _) in enumerate(rows):
        done += size
        stop = round(done * scale)
        inside = max(0, min(stop, end) - at)
        line.append(drawn("█" * inside), _style(number))
        over = stop - max(at, end) if stop > end else 0
        if over > 0:
            line.append(drawn("▒" * over), "red")
        at = stop
    line.append("·" * max(0, end - at), "bright_black")
    if total > memory:
        line.append(f"  {figures.size(total - memory)} too much", "red")
    return line


def _style(number: int) -> str:
    return _STYLES[number % len(_STYLES)]


def _title(planned: Planned) -> Text:
    request, plan = planned.request, planned.plan
    heads = request.heads
    all_heads = heads.num_retrieval + heads.num_streaming
    where = planned.card.name if planned.card is not None else f"{request.device}, {request.kernels} kernels"
    return Text(
        f"{clean_line(planned.name)} on {where}: context {request.context:,}, KV {planned.kv}, "
        f"{heads.num_retrieval} of {all_heads} KV heads retrieval; "
        f"{figures.size(plan.with_process)} of {figures.size(planned.memory)}",
        "bold",
    )


def _memory(planned: Planned, rows: list[tuple[str, int, str]]) -> Table:
    table = bare_table()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold", style="dim")
    for number, (name, size, known) in enumerate(rows):
        if name == "weights":
            known = _weights_known(planned.request)
        table.add_row(Text(drawn("█"), _style(number)), name, figures.size(size), known)
    total = sum(size for _, size, _ in rows)
    table.add_row("", Text("together", "bold"), Text(figures.size(total), "bold"), "")
    plan = planned.plan
    for where, size, known in (
        ("embedding in host memory", plan.host_weights, "one row per token is read"),
        ("KV blocks in pinned host memory", plan.host_blocks, f"{figures.size(planned.free.host)} free"),
        ("KV blocks in a file", plan.disk_blocks, f"{figures.size(planned.free.disk)} free"),
    ):
        if size:
            table.add_row("", where, figures.size(size), known)
    return table


def _weights_known(request: Request) -> str:
    said = [] if request.weights.exact else ["by arithmetic"]
    if request.device == "cuda" and request.config.tie_embeddings:
        said.append("embedding and lm_head are one matrix: it is on the device")
    return "; ".join(said)


def _more(planned: Planned, rates: Rates | None) -> Table:
    request, plan = planned.request, planned.plan
    table = fact_table()
    if planned.line is not None:
        table.add_row("chosen", clean_line(planned.line))
    table.add_row("trained for", figures.tokens(planned.trained))
    dense = dense_16bit_bytes(request.config, request.context)
    table.add_row(
        "KV per token",
        f"{bytes_per_token(request):,.0f} bytes; an ordinary 16-bit cache of this context takes {figures.size(dense)}",
    )
    if plan.offloaded:
        table.add_row("on the device", f"{plan.slots:,} of {plan.max_blocks:,} blocks of each retrieval head")
    table.add_row("saved session", f"{figures.size(session_bytes(request, plan))} with the context full")
    if rates is None:
        table.add_row("time", "not known: leave out --no-measure to measure this machine")
        return table
    expected = duration_of(request, plan, rates)
    table.add_row(
        "reading it all",
        f"{figures.duration(expected.prefill_s)} ({figures.speed(request.context, expected.prefill_s)})",
    )
    step_s = expected.decode_s
    each = f"{1000 * step_s:.3g} ms" if step_s < 1 else figures.duration(step_s)
    table.add_row("each new token", f"{each} with the context full")
    table.add_row("speeds", clean_line(rates.source))
    return table


def _verdict(planned: Planned) -> list[RenderableType]:
    plan = planned.plan
    left = figures.size(planned.memory - plan.with_process)
    where = "some blocks beyond the device" if plan.offloaded else "all blocks on the device"
    fits = f"fits, {where}: {left} of {figures.size(planned.memory)} are left"
    lines: list[RenderableType] = [Text(fits, "bold green")]
    if plan.offloaded and planned.automatic:
        whole = plan_memory(replace(planned.request, kv_device_memory=None))
        lines.append(
            Text(
                f"Not all blocks fit on the device (that takes {figures.size(whole.with_process)}): the others lie "
                "beyond it, with the same answers, and each token waits for them."
            )
        )
        if planned.nearest:
            lines += [Text("With all of them on the device:"), _settings(planned.nearest)]
    return lines


def _settings(found: Sequence[Setting]) -> Table:
    table = bare_table()
    table.add_column(no_wrap=True, style="bold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold", style="dim")
    for setting in found:
        table.add_row(setting.words, figures.size(setting.plan.with_process), setting.effect)
    return table


def _refusal(planned: Planned) -> list[RenderableType]:
    plan = planned.plan
    text = f"does not fit: {figures.size(plan.with_process)} are needed, {figures.size(planned.memory)} are there"
    lines: list[RenderableType] = [Text(text, "bold red")]
    if not planned.nearest:
        return [*lines, Text("no setting of this model fits: use a smaller model, or more memory")]
    return [*lines, Text("These fit; what changes least comes first:"), _settings(planned.nearest)]


def plan_json(planned: Planned, rates: Rates | None) -> None:
    """Print the plan as one JSON object."""
    print(json.dumps(as_json(planned, rates), indent=1))


def as_json(planned: Planned, rates: Rates | None) -> dict[str, Any]:
    """Return the plan as JSON holds it: bytes and seconds."""
    request, plan = planned.request, planned.plan
    device = plan.device
    answer: dict[str, Any] = {
        "model": planned.name,
        "context": request.context,
        "kv": planned.kv,
        "retrieval_heads": request.heads.num_retrieval,
        "streaming_heads": request.heads.num_streaming,
        "chunk_size": request.chunk_size,
        "device": request.device if planned.card is None else planned.card.name,
        "kernels": request.kernels,
        "dtype": str(request.dtype).removeprefix("torch."),
        "fits": planned.fits,
        "chosen": planned.line,
        "trained_context": planned.trained,
        "memory_bytes": planned.memory,
        "needed_bytes": plan.with_process,
        "device_bytes": {
            "weights": device.weights,
            "copies": device.copies,
            "kv_blocks": device.blocks,
            "digests": device.digests,
            "retrieval_windows": device.retrieval_windows,
            "streaming_windows": device.streaming_windows,
            "working": device.working,
            "workspace": device.workspace,
            "token_ids": device.tokens,
            "process": plan.process,
        },
        "weights_exact": request.weights.exact,
        "host_bytes": plan.host_blocks,
        "host_weight_bytes": plan.host_weights,
        "disk_bytes": plan.disk_blocks,
        "blocks_on_device": plan.slots,
        "blocks": plan.max_blocks,
        "kv_bytes_per_token": bytes_per_token(request),
        "dense_16bit_bytes": dense_16bit_bytes(request.config, request.context),
        "session_bytes": session_bytes(request, plan),
        "notes": list(planned.notes),
    }
    if rates is not None:
        expected = duration_of(request, plan, rates)
        answer["time"] = {
            "prefill_s": expected.prefill_s,
            "decode_ms_per_token": 1000 * expected.decode_s,
            "measured": rates.measured,
            "source": rates.source,
        }
    if not planned.fits:
        answer["nearest"] = [
            {"options": list(setting.options), "needed_bytes": setting.plan.with_process, "effect": setting.effect}
            for setting in planned.nearest
        ]
    return answer
