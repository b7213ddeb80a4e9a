"""The table of `duolocal bench decode` with --select or --kv-device-memory: ways to decode, side by side."""

import json
from dataclasses import replace

from duolocal.bench.variants import Variant, VariantSpeed, measure_variants
from duolocal.cache import ON_DEVICE, Placement, SelectionPolicy
from duolocal.commands.bench import Decode
from duolocal.engine.engine import Engine
from duolocal.engine.select_choice import choose_channels, selection_budget
from duolocal.paths import cache_folder
from duolocal.settings import LoadSettings
from duolocal.sizes import format_tokens
from duolocal.terminal import bench_speed_view, figures
from duolocal.terminal.bench_speed_view import fetch_and_open, load_engine, report_of, settings_line
from duolocal.terminal.consoles import new_console, progress_console
from duolocal.terminal.progress import bar
from duolocal.terminal.still import StillLine
from duolocal.terminal.tables import new_table


def bench_decode(options: Decode, settings: LoadSettings) -> int:
    """Print the speed of decode, of one way or, with other ways of reading, of all in turns; return the exit code."""
    if settings.select == "off" and settings.kv_device_memory is None:
        return bench_speed_view.bench_decode(options, settings)
    return _bench_variants(options, settings)


def _bench_variants(options: Decode, settings: LoadSettings) -> int:
    """Print the speed of reading all blocks, of selected ones, and of both beyond memory; return the exit code."""
    console, progress, contexts, num_tokens = new_console(), progress_console(), options.contexts, options.tokens
    source = fetch_and_open(settings, progress)
    room = num_tokens + 2
    base = load_engine(source, replace(settings, select="off"), progress, context=contexts[-1] + room)
    kernels = base.transformer.kernels.name
    budget = selection_budget(settings.select, contexts[-1], config=base.config, kernels=kernels)
    policy = None
    if budget is not None:
        with bar(progress, "finding what tells blocks apart", "tokens") as shown:
            channels = choose_channels(source, base.transformer, base.plan, on_progress=shown.update)
        policy = SelectionPolicy(budget, channels)
    results: list[VariantSpeed] = []
    with StillLine(progress) as line:
        for context in contexts:
            variants = _variants(base, settings, policy, context=base.context)
            results += measure_variants(
                variants, context, num_tokens=num_tokens, repeats=options.repeats, on_step=line.show
            )
    table = new_table(">context", "~blocks", ">ms/token", ">min", ">max", ">speed", ">same", ">memory", ">beyond")
    for result in results:
        table.add_row(
            format_tokens(result.context),
            result.name,
            *(f"{1e3 * value:.2f}" for value in (result.token_s.median, result.token_s.least, result.token_s.most)),
            f"{result.against:.2f}",
            {None: "", True: "yes", False: "NO"}[result.equal],
            figures.size(result.memory.total),
            figures.size(result.memory.outer_blocks) if result.memory.outer_blocks else "",
        )
    console.print(table)
    console.print(
        f"{settings_line(base)}; the cache holds random numbers; {num_tokens} greedy tokens, in turns, median, min and "
        f"max of {options.repeats} runs; speed: times the first line; same: to the last bit as in memory; memory: of "
        "the cache",
        style="dim",
    )
    rows = [result.report() for result in results]
    print(json.dumps(report_of("decode variants", settings, base, tokens=num_tokens, select=budget, results=rows)))
    return 0


def _variants(base: Engine, settings: LoadSettings, policy: SelectionPolicy | None, *, context: int) -> list[Variant]:
    def made(placement: Placement, select: SelectionPolicy | None) -> Engine:
        return Engine.build(
            base.transformer,
            base.plan,
            kv=base.kv,
            chunk_size=base.chunk_size,
            placement=placement,
            select=select,
        )

    variants = [Variant("all", lambda: made(ON_DEVICE, None))]
    if policy is not None:
        variants.append(Variant(f"{format_tokens(policy.budget)} tokens", lambda: made(ON_DEVICE, policy)))
    if settings.kv_device_memory is not None:
        on_cpu = base.transformer.device.type == "cpu"
        where = Placement(settings.kv_device_memory, "disk" if on_cpu else "memory", cache_folder() / "kv")
        beyond = f"{figures.size(settings.kv_device_memory)} of"
        for variant, select in zip(list(variants), (None, policy), strict=False):
            name = f"{beyond} {variant.name}"
            variants.append(Variant(name, lambda select=select: made(where, select), like=variant.name))  # type: ignore[misc]
            if on_cpu:  # a file that was just written is in the page cache, as long as there is room
                cold = f"{name}, not in the page cache"
                variants.append(
                    Variant(cold, lambda select=select: made(where, select), like=variant.name, cold=True)  # type: ignore[misc]
                )
    return variants
