"""How few blocks hold 0.98 of the attention of retrieval heads, and which cheap estimate finds them.

    .venv/bin/python scripts/measure_sparse_prefill.py [--texts help,passkey] [--lengths 2K,8K] [--mass 0.98]

Queries and keys of every layer are caught while the model reads real text (beyond its trained window too, where the
figures say less), the keys as their blocks hold them. For every second retrieval head, tiles of queries at the end and
at three quarters of the text are compared with their true attention: share of the blocks behind the window that is read
("density"), share of the attention that is kept (mean over the tile's queries, the lowest hundredth of them, the worst
tile), and multiplications of the estimate beside those of the attention it replaces. With --by-head the policy of
`--prefill sparse` itself reads the texts, and density and kept mass of every retrieval head are printed instead. The
last line is JSON.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

os.environ.setdefault("OMP_PROC_BIND", "true")  # two threads on one core would take forty times as long

import torch
from torch import Tensor

from duolocal.engine.engine import Engine
from duolocal.evaluate.passkey import passkey_prompts
from duolocal.evaluate.tasks import variables_prompts
from duolocal.kernels.blocks import decode_blocks, encode_blocks, hadamard
from duolocal.kernels.interface import Rotation, StepTraits
from duolocal.kernels.sparse import SPENT, SparsePrefill, choose_blocks
from duolocal.models.loader import open_model
from duolocal.models.registry import resolve
from duolocal.sample_text import license_text, sample_text
from duolocal.sizes import parse_tokens
from duolocal.tokenizer import Tokenizer, load_tokenizer

SKIPPED = 5000  # tokens at the beginning of a text that are left out
NOWHERE = float("-inf")


class Catching:
    """A cache that passes everything on to another and remembers queries and keys."""

    traits = StepTraits()

    def __init__(self, engine: Engine) -> None:
        self._cache = engine.cache
        self.q: dict[int, list[Tensor]] = {}
        self.k: dict[int, list[Tensor]] = {}

    def append(self, layer: int, k: Tensor, v: Tensor, _rotation: Rotation | None = None) -> None:
        """Remember k [q_len, num_kv_heads, head_dim]."""
        self.k.setdefault(layer, []).append(k.half())
        self._cache.append(layer, k, v)

    def attend(self, layer: int, q: Tensor, positions: Tensor, _rotation: Rotation | None = None) -> Tensor:
        """Remember q [q_len, num_heads, head_dim]."""
        self.q.setdefault(layer, []).append(q.half())
        return self._cache.attend(layer, q, positions)


@torch.inference_mode()
def catch(engine: Engine, token_ids: list[int]) -> dict[int, tuple[Tensor, Tensor]]:
    """Return the queries and keys of every layer: float16 [num_tokens, heads, head_dim]."""
    engine.reset()
    catching = Catching(engine)
    for start in range(0, len(token_ids), engine.chunk_size):
        chunk = token_ids[start : start + engine.chunk_size]
        ids, positions = torch.tensor(chunk), torch.arange(start, start + len(chunk))
        engine.append(chunk, lambda ids=ids, at=positions: engine.transformer.hidden(ids, at, catching))  # type: ignore[misc]
    return {layer: (torch.cat(q), torch.cat(catching.k[layer])) for layer, q in catching.q.items()}


@dataclass(frozen=True)
class Tile:
    """Queries of one KV head, scaled, float32 [group, tile, dim]; all keys up to the last of them, as stored."""

    q: Tensor
    k: Tensor
    number: int
    size: int  # tokens of a block
    sink: int
    recent: int

    @property
    def positions(self) -> Tensor:
        return torch.arange(self.number * self.q.shape[1], (self.number + 1) * self.q.shape[1])

    def lse(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-sum-exps of blocks and window of some queries: [group, n, blocks], [group, n]."""
        i, j = self.positions[rows, None], torch.arange(self.k.shape[0])
        scores = (self.q[:, rows] @ self.k.T).masked_fill(j > i, NOWHERE)
        behind = (j >= self.sink) & (i - j >= self.recent)
        window = scores.masked_fill(behind, NOWHERE).logsumexp(-1)
        return self.pieces(scores.masked_fill(~behind, NOWHERE)).logsumexp(-1), window

    def pieces(self, x: Tensor) -> Tensor:
        """Cut keys [..., kv_len] into the blocks that any query sees: [..., blocks, size]."""
        count = max(0, -(-(int(self.positions[-1]) - self.recent + 1) // self.size))
        return x[..., : count * self.size].unflatten(-1, (count, self.size))


def asked_lse(tile: Tile, policy: SparsePrefill) -> tuple[Tensor, Tensor]:
    """Score every `stride`-th query against every key."""
    return tile.lse(policy.asked(range(1)))


def last_lse(tile: Tile, policy: SparsePrefill) -> tuple[Tensor, Tensor]:
    """Score as many, but the last of the tile."""
    return tile.lse(torch.arange(policy.tile - policy.asked_per_tile, policy.tile))


def digest_lse(tile: Tile, policy: SparsePrefill, *, spread: bool) -> tuple[Tensor, Tensor]:
    """Score queries against the mean key of each block, with its variance along the query where `spread`."""
    rows = policy.asked(range(1))
    exact, window = tile.lse(rows)
    count = exact.shape[-1]
    k = tile.k[: count * tile.size].unflatten(0, (count, tile.size))
    q = tile.q[:, rows]
    guessed = q @ k.mean(1).T + torch.tensor(float(tile.size)).log()
    if spread:
        guessed = guessed + 0.5 * q.square() @ k.var(1, unbiased=False).T
    partly = (exact == NOWHERE) | (torch.arange(count) == tile.sink // tile.size)
    return torch.where(partly, exact, guessed), window


def antidiagonal_lse(tile: Tile, policy: SparsePrefill, *, step: int) -> tuple[Tensor, Tensor]:
    """Sum scores along antidiagonals of step × step squares, as XAttention does; what the window has is given."""
    exact, window = tile.lse(torch.arange(policy.tile))
    count = exact.shape[-1]
    k = tile.k[: count * tile.size].unflatten(0, (-1, step))
    q = tile.q.unflatten(1, (-1, step)).flip(2)
    sums = torch.einsum("gtsd,jsd->gtj", q, k) / step
    blocks = sums.unflatten(-1, (count, -1)).logsumexp(-1)
    behind = exact.unflatten(1, (-1, step)).logsumexp(2)
    window = window.unflatten(1, (-1, step)).logsumexp(2)
    blocks = blocks.masked_fill(behind == NOWHERE, NOWHERE)
    # Scaled to what lies behind the window in truth: no real estimate is as well off.
    return blocks + (behind.logsumexp(-1) - blocks.logsumexp(-1))[..., None], window


Lse = Callable[[Tile, SparsePrefill], tuple[Tensor, Tensor]]


def estimates(policy: SparsePrefill) -> dict[str, tuple[Lse, SparsePrefill, float]]:
    """Return the estimates to try: how each scores, for which policy, and its share of the attention's work."""

    def of(stride: int) -> SparsePrefill:
        return SparsePrefill(policy.mass, tile=policy.tile, stride=stride)

    found: dict[str, tuple[Lse, SparsePrefill, float]] = {}
    true = SparsePrefill(1 - (1 - policy.mass) / SPENT, tile=policy.tile, stride=1)
    found["all queries (truth)"] = (asked_lse, true, 1 / 2)
    for stride in (4, 8, 16, 32):
        if policy.tile % stride == 0:
            found[f"one query in {stride}"] = (asked_lse, of(stride), 1 / (2 * stride))
    found["as many, the last"] = (last_lse, of(16), 1 / 32)
    found["mean keys"] = (lambda t, p: digest_lse(t, p, spread=False), of(4), 1 / 8 / 64)
    found["mean and variance"] = (lambda t, p: digest_lse(t, p, spread=True), of(4), 2 / 8 / 64)
    for step in (8, 16):
        scored = SparsePrefill(policy.mass, tile=policy.tile, stride=step)
        found[f"antidiagonals of {step}*"] = (
            lambda t, p, step=step: antidiagonal_lse(t, p, step=step),  # type: ignore[misc]
            scored,
            1 / (2 * step),
        )
    return found


def vertical_slash(tile: Tile, target: float) -> Tensor:
    """Return the blocks [blocks] that the columns and diagonals of the last 64 queries of the tile point to."""
    rows = torch.arange(max(0, tile.q.shape[1] - 64), tile.q.shape[1])
    i, j = tile.positions[rows, None], torch.arange(tile.k.shape[0])
    weights = (tile.q[:, rows] @ tile.k.T).masked_fill(j > i, NOWHERE).softmax(-1).mean(0)  # [n, kv_len]
    distance = (i - j).clamp_min(0)
    columns = weights.mean(0)
    diagonals = torch.zeros_like(columns).scatter_add_(0, distance.flatten(), weights.flatten()) / len(rows)
    chosen = torch.zeros_like(tile.pieces(columns)[:, 0], dtype=torch.bool)
    first, last = int(tile.positions[0]), int(tile.positions[-1])
    for kind, share in (("column", columns), ("diagonal", diagonals)):
        falling, order = share.sort(descending=True)
        for at in order[falling.cumsum(0) - falling < target].tolist():
            low, high = (at, at) if kind == "column" else (first - at, last - at)
            chosen[max(0, low // tile.size) : max(0, high // tile.size + 1)] = True
    return chosen


def tiles(
    engine: Engine, caught: dict[int, tuple[Tensor, Tensor]], *, tile: int, size: int, every: int = 2
) -> Iterator[tuple[int, int, Tile]]:
    """Yield layer, KV head and tiles of every second retrieval head."""
    plan, layout, group = engine.plan, engine.cache.layout, engine.cache.query_group
    heads = [(layer, head) for layer, flags in enumerate(plan.retrieval) for head, flag in enumerate(flags) if flag]
    for layer, head in heads[::every]:
        q, k = caught[layer]
        whole = k.shape[0] // layout.block_size * layout.block_size
        k = k[:, head].float()
        shape = (-1, layout.block_size, layout.head_dim)
        records = encode_blocks(k[:whole].view(shape), k[:whole].view(shape), layout)
        stored = decode_blocks(records, layout, "key", dtype=torch.float32)
        stored = (hadamard(stored) if layout.key.rotate else stored).flatten(0, 1)
        k = torch.cat((stored, k[whole:]))
        for end in (whole // tile, whole * 3 // 4 // tile):
            rows = slice((end - 1) * tile, end * tile)
            queries = q[rows, head * group : (head + 1) * group].float().transpose(0, 1) * layout.head_dim**-0.5
            yield layer, head, Tile(queries, k[: rows.stop], end - 1, size, plan.sink_size, engine.cache.exact_recent)


@dataclass(frozen=True)
class Kept:
    """What a choice of blocks comes to in one tile."""

    density: float
    mass: float
    lowest: float  # hundredth of the queries

    @classmethod
    def of(cls, tile: Tile, chosen: Tensor) -> "Kept":
        lse, window = tile.lse(torch.arange(tile.q.shape[1]))
        total = torch.logaddexp(lse.logsumexp(-1), window)
        seen = (lse > NOWHERE).any(0).any(0)
        partly = seen & (lse == NOWHERE).any(0).any(0)
        chosen = (chosen | partly) & seen
        mass = ((lse - total[..., None]).exp() * chosen).sum(-1) + (window - total).exp()
        return cls(float(chosen.sum() / seen.sum()), float(mass.mean()), float(mass.quantile(0.01)))


def table(rows: dict[str, list[Kept]], costs: dict[str, float]) -> list[dict[str, object]]:
    """Print and return the means."""
    out = []
    for name, kept in rows.items():
        values = torch.tensor([[each.density, each.mass, each.lowest] for each in kept])
        density, mass, lowest = values.mean(0).tolist()
        worst, short = float(values[:, 1].min()), float((values[:, 1] < 0.97).float().mean())
        row = {"density": density, "mass": mass, "lowest": lowest, "worst_tile": worst, "tiles_below_0.97": short}
        row = {key: round(value, 4) for key, value in row.items()} | {"cost": round(costs.get(name, 0.0), 4)}
        print(f"  {name:24}" + " ".join(f"{key} {value:.3f}" for key, value in row.items()), flush=True)
        out.append({"name": name} | row)
    return out


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--texts", default="help,license,passkey,variables")
    parser.add_argument("--lengths", default="2K,8K")
    parser.add_argument("--mass", type=float, default=0.98)
    parser.add_argument("--tile", type=int, default=128)
    parser.add_argument("--by-head", action="store_true")
    options = parser.parse_args()
    source = open_model(resolve(options.model))
    tokenizer = load_tokenizer(source)
    lengths = [parse_tokens(length) for length in options.lengths.split(",")]
    engine = Engine.load(source, context=max(lengths) + 256)
    if options.by_head:
        measured = SparsePrefill(options.mass, tile=options.tile, measure=True)
        runs = by_head(engine, tokenizer, options.texts.split(","), lengths, measured)
        print(json.dumps({"model": options.model, "kv": engine.kv, "heads": engine.plan.source, "by_head": runs}))
        return
    policy = SparsePrefill(options.mass, tile=options.tile)
    report = []
    for text in options.texts.split(","):
        for length in lengths:
            caught = catch(engine, token_ids(tokenizer, text, length))
            rows: dict[str, list[Kept]] = {}
            costs: dict[str, float] = {}
            print(f"{text} {length:,}: tiles of {policy.tile} queries, blocks of 64 keys")
            for _, _, tile in tiles(engine, caught, tile=policy.tile, size=64):
                for name, (score, asked, cost) in estimates(policy).items():
                    lse, window = score(tile, asked)
                    chosen = _choose(lse, window, asked, tile)
                    rows.setdefault(name, []).append(Kept.of(tile, chosen))
                    costs[name] = cost
                rows.setdefault("columns and diagonals", []).append(Kept.of(tile, vertical_slash(tile, policy.mass)))
                costs["columns and diagonals"] = min(64, policy.tile) / policy.tile / 2
            by_estimate = table(rows, costs)
            rows = {}
            print(f"{text} {length:,}: truth by tile and block")
            for size in (16, 32, 64, 128):
                for queries in (16, 64, 128, 256):
                    true = SparsePrefill(1 - (1 - policy.mass) / SPENT, tile=queries, stride=1)
                    for _, _, tile in tiles(engine, caught, tile=queries, size=size, every=4):
                        lse, window = asked_lse(tile, true)
                        name = f"{queries} x {size}"
                        rows.setdefault(name, []).append(Kept.of(tile, _choose(lse, window, true, tile)))
            report.append({"text": text, "tokens": length, "estimates": by_estimate, "sizes": table(rows, {})})
    print(json.dumps({"model": options.model, "kv": engine.kv, "heads": engine.plan.source, "runs": report}))


def by_head(
    engine: Engine, tokenizer: Tokenizer, texts: list[str], lengths: list[int], policy: SparsePrefill
) -> list[dict[str, object]]:
    """Read the texts with `policy`; print and return density and kept mass of every retrieval head."""
    sparse = Engine.build(engine.transformer, engine.plan, kv=engine.kv, chunk_size=engine.chunk_size, prefill=policy)
    counts = sparse.cache.sparse_counts
    assert counts is not None
    flags = engine.plan.retrieval
    names = [f"{layer}.{head}" for layer, row in enumerate(flags) for head, flag in enumerate(row) if flag]
    out: list[dict[str, object]] = []
    for text in texts:
        for length in lengths:
            sparse.reset()
            counts.reset()
            for _ in sparse.prefill(token_ids(tokenizer, text, length)):
                pass
            density, mass = (counts.read / counts.seen).tolist(), (counts.mass / counts.measured).tolist()
            whole = float(counts.mass.sum() / counts.measured.sum())
            print(f"{text} {length:,}: density {counts.density:.3f}, mass {whole:.4f}, by layer.head:")
            rows = sorted(zip(density, mass, names, strict=True))
            print("  " + ", ".join(f"{name} {d:.2f} {m:.3f}" for d, m, name in rows), flush=True)
            heads = {name: [round(d, 4), round(m, 4)] for d, m, name in rows}
            out.append({"text": text, "tokens": length, "density": counts.density, "mass": whole, "heads": heads})
    return out


def _choose(lse: Tensor, window: Tensor, asked: SparsePrefill, tile: Tile) -> Tensor:
    one = range(tile.number, tile.number + 1)
    sizes = {"sink_size": tile.sink, "recent_size": tile.recent, "size": tile.size}
    return choose_blocks(lse[None], window[None], asked, one, **sizes)[0, 0]


def token_ids(tokenizer: Tokenizer, text: str, length: int) -> list[int]:
    """Return `length` tokens of a text, or a prompt about that long with something hidden in Python's help."""
    if text == "passkey":
        return list(passkey_prompts(tokenizer, sample_text(), num_tokens=length, depths=[0.35])[0].token_ids)
    if text == "variables":
        return list(variables_prompts(tokenizer, sample_text(), num_tokens=length, samples=1)[0].token_ids)
    return tokenizer.encode({"help": sample_text, "license": license_text}[text]())[SKIPPED : SKIPPED + length]


if __name__ == "__main__":
    main()
