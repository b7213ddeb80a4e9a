"""`duolocal bench gpu`: runs the suite and prints its report as narrow tables, the targets last.

The tables are plain text of some thousand characters: they must fit into the end of a log.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from duolocal.bench.gpu.floors import targets
from duolocal.bench.gpu.suite import chosen_sections, cuda_device_name, failed, run_suite, suite_files
from duolocal.commands.bench import Gpu
from duolocal.sizes import format_tokens
from duolocal.terminal.clean import clean_line

_MOST_FAILURES = 12
_LINE = 160  # characters of a failure

Record = Mapping[str, Any]
Cells = Sequence[str]


def bench_gpu(options: Gpu) -> int:
    """Run the suite, print its tables and return the exit code: 1 where a check failed or a section died."""
    began = time.monotonic()
    sections = chosen_sections(options.sections)
    limit_s = 60 * options.minutes
    device = cuda_device_name()
    files = suite_files(options.out, device, time.strftime("%Y-%m-%d"))
    report = run_suite(
        sections,
        files,
        device=device,
        deadline=began + limit_s,
        on_step=lambda text: print(f"gpu suite: {text}", file=sys.stderr, flush=True),
    )
    for line in render(report):
        print(line)
    print(f"all of it: {files.report}")
    return 1 if failed(report) else 0


def render(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a report, whatever of it is there."""
    records = [record for section in report["sections"].values() for record in section["records"]]
    good = [record for record in records if "error" not in record and "skipped" not in record]

    def of(*names: str) -> list[Record]:
        return [record for record in good if record["what"] in names]

    yield from _head(report, of("machine"))
    yield from _tests([record for record in records if record["what"] == "tests"])
    for table in (
        _products,
        _gemm,
        _decode_attention,
        _prefill_attention,
        _small,
        _decode,
        _selected,
        _profiles,
        _prefill,
        _sweep,
    ):
        yield from table(of)
    for name, section in report["sections"].items():
        if section["status"] not in ("done", "running"):
            yield clean_line(f"{name}: {section['status']}, {section.get('why', '')}")
    skipped = [record for record in records if "skipped" in record]
    if skipped:
        yield f"{len(skipped)} measurements left out (no time or no room; the JSON names them)"
    wrong = failed(dict(report))
    for line in wrong[:_MOST_FAILURES]:
        yield clean_line(f"FAILED {line}")[:_LINE]
    if len(wrong) > _MOST_FAILURES:
        yield f"and {len(wrong) - _MOST_FAILURES} more failures"
    yield "targets (of a run on an H100; times scaled by the bandwidths of the datasheets)"
    for target in targets(report):
        mark = {True: "met", False: "MISSED", None: ""}[target.met]
        yield f"  target {target.text:<68} {target.measured:>14} {mark}".rstrip()


def _head(report: Mapping[str, Any], machines: Sequence[Record]) -> Iterator[str]:
    machine = machines[0] if machines else {}
    versions = machine.get("versions", {})
    driver = (machine.get("nvidia_smi") or {}).get("driver_version", "?")
    yield clean_line(
        f"{report['device']}, {report['date']}, torch {versions.get('torch', '?')}, "
        f"triton {machine.get('triton', '?')}, driver {driver}; weights: {report['weights']}"
    )
    ceilings = report.get("ceilings")
    if ceilings:
        yield (
            f"measured here: copy {ceilings['copy_bytes_per_s'] / 1e9:,.0f} GB/s (read + written), 16-bit product "
            f"{ceilings['matmul_flop_per_s'] / 1e12:,.0f} TFLOP/s; percentages are of these"
        )


def _tests(records: Sequence[Record]) -> Iterator[str]:
    if records:
        passed, bad, skipped = (
            sum(record.get(name, 0) for record in records for name in names)
            for names in (("passed",), ("failed", "errors"), ("skipped_tests",))
        )
        yield f"tests on the device: {len(records)} files, {passed} passed, {bad} failed, {skipped} skipped"


def _products(of: Any) -> Iterator[str]:
    rows = [
        [r["name"], f"{r['out']}×{r['in']}", _us(r), f"{r['gb_per_s']:,.0f}", _share(r["of_copy"]), *_library(r)]
        for r in of("gemv")
    ]
    yield from _table(["products, 1 row", "shape", "µs", "GB/s", "of copy", "16-bit µs", "ratio"], rows)


def _library(r: Record) -> Cells:
    library = r.get("library")
    return [f"{library['us']:.1f}", f"{library['us'] / r['us']:.2f}"] if library else ["", ""]


def _gemm(of: Any) -> Iterator[str]:
    rows = [
        [
            f"{r['rows']:,}",
            *(f"{value:.1f}" if value else "" for value in (r["us"], r.get("fused_us"), r.get("dequantized_us"))),
            f"{r['library']['us']:.1f}",
            f"{r['tflop_per_s']:.1f}",
            _share(r["of_matmul"]),
        ]
        for r in of("gemm")
    ]
    heading = [f"products {r['out']}×{r['in']}, rows" for r in of("gemm")][:1] or [""]
    yield from _table([*heading, "µs", "fused", "decoded first", "16-bit", "TFLOP/s", "of matmul"], rows)


def _decode_attention(of: Any) -> Iterator[str]:
    rows = []
    records = of("decode_attention", "sdpa decode")
    for retrieval, context in dict.fromkeys((r["retrieval"], r["context"]) for r in records):
        cells = [f"{retrieval} heads, {format_tokens(context)}"]
        here = [r for r in records if (r["retrieval"], r["context"]) == (retrieval, context)]
        for kv in ("int4", "k8v4", "fp8", "16", None):
            found = next((r for r in here if r.get("kv") == kv), None)
            cells.append("" if found is None else f"{_us(found)} {_share(found['of_copy'])}")
        cells.append(next((r["backend"] for r in here if "backend" in r), ""))
        rows.append(cells)
    headings = ["decode attention, µs", "int4", "k8v4", "fp8", "16", "SDPA", "backend"]
    yield from _table(headings, rows)


def _prefill_attention(of: Any) -> Iterator[str]:
    names = {
        "band": "band",
        "blocks": "blocks",
        "chunk": "whole",
        "sdpa causal": "SDPA self",
        "sdpa before": "SDPA old",
    }
    rows = [
        [
            f"{format_tokens(r['chunk'])} after {format_tokens(r['start'])}",
            f"{names[r['what']]} {r.get('route', '')}{r.get('backend', '')}".strip(),
            f"{r['us'] / 1e3:.3f}",
            f"{r['tflop_per_s']:.1f}",
            _share(r["of_matmul"]),
        ]
        for r in of(*names)
    ]
    yield from _table(["prefill attention, a layer", "", "ms", "TFLOP/s", "of matmul"], rows)


def _small(of: Any) -> Iterator[str]:
    names = ("rms_norm", "silu_mul", "append_token", "rotate", "close_blocks", "write_ring")
    cells = [
        f"{r['what']}{'×' + str(r['rows']) if 'rows' in r else ''} {_us(r)}"
        + (f" ({_share(r['of_copy'])})" if "of_copy" in r else "")
        for r in of(*names)
    ]
    if cells:
        yield "small kernels, µs: " + ", ".join(cells)


def _decode(of: Any) -> Iterator[str]:
    rows = [
        [
            f"{'largest ' if r.get('largest') else ''}{format_tokens(r['context'])}",
            r["heads"] + (f", cap {r['cap_bytes'] / 2**30:.1f} GiB" if "cap_bytes" in r else ""),
            format_tokens(r["reserved_tokens"]),
            f"{r['ms']:.3f}",
            f"{r['floor_ms']:.3f}",
            _share(r["of_floor"]),
            f"{r['cache_bytes'] / 2**30:.2f}",
            f"{r.get('peak_reserved_bytes', 0) / 2**30:.2f}",
        ]
        for r in of("decode", "capped decode")
    ]
    headings = ["decode, ms/token", "retrieval", "reserved", "ms", "floor", "of floor", "cache GiB", "peak GiB"]
    yield from _table(headings, rows)


def _selected(of: Any) -> Iterator[str]:
    rows = [
        [
            f"{format_tokens(r['context'])}, {r['way']}",
            f"{r['ms']:.3f}",
            *(f"{r[name]:.3f}" if name in r else "" for name in ("ms_choosing", "ms_reusing")),
            f"{r['floor_ms']:.3f}",
            _share(r["of_floor"]),
            f"{r['copies_per_choice']:.1f}" if "copies_per_choice" in r else "",
            f"{r['cache_bytes'] / 2**30:.2f}",
            f"{r.get('peak_reserved_bytes', 0) / 2**30:.2f}",
        ]
        for r in of("selected decode")
    ]
    headings = ["blocks read, ms/token", "mean", "choosing", "reusing", "floor", "of floor", "copies", "cache GiB"]
    yield from _table([*headings, "peak GiB"], rows)
    cells = [f"{r['name']} at {format_tokens(r['context'])} {_us(r)}" for r in of("selection kernels")]
    if cells:
        yield "of one layer, µs: " + ", ".join(cells)


def _profiles(of: Any) -> Iterator[str]:
    for r in of("profile"):
        rows = [[row["name"][:46], f"{row['calls']:.0f}", f"{row['us']:.1f}"] for row in r["rows"][:8]]
        title = f"a step at {format_tokens(r['context'])}: kernels {r['kernels_us']:,.0f} µs"
        yield from _table([title, "calls", "µs"], rows)


def _prefill(of: Any) -> Iterator[str]:
    rows = [
        [
            format_tokens(r["context"]),
            format_tokens(r["chunk"]),
            r["heads"] + (" capped" if "cap_bytes" in r else ""),
            f"{r['tokens_per_s']:,.0f}",
            f"{r['seconds']:.2f}" + (" *" if r["sampled"] else "  "),
            _share(r["of_matmul"]),
            f"{r.get('peak_reserved_bytes', 0) / 2**30:.2f}",
        ]
        for r in of("prefill", "capped prefill")
    ]
    headings = ["prefill (* sampled chunks)", "chunk", "retrieval", "tokens/s", "s  ", "of matmul", "peak GiB"]
    yield from _table(headings, rows)


def _sweep(of: Any) -> Iterator[str]:
    for r in of("sweep best"):
        values = ", ".join(f"{name} {value}" for name, value in r["values"].items()) or "the present values"
        yield f"sweep of {r['kernel']}: best {r['us']:.1f} µs with {values} (now {r['before_us']:.1f})"


def _table(headings: Cells, rows: Iterable[Cells]) -> Iterator[str]:
    """Yield aligned lines, the first column to the left; nothing without rows."""
    lines = [list(headings), *map(list, rows)]
    if len(lines) == 1:
        return
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    for line in lines:
        first = clean_line(line[0]).ljust(widths[0])
        yield "  ".join(
            (first, *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)))
        ).rstrip()


def _us(record: Record) -> str:
    return f"{record['us']:.1f}" if record["us"] < 1000 else f"{record['us']:,.0f}"


def _share(value: float) -> str:
    return f"{value:.0%}"
