"""The working memory of a prefill chunk and of a decode step: what lives beside weights and cache, and for how long.

Owns the arithmetic of temporaries, per kind of kernels. Each figure follows the code it speaks of: which tensors are
alive at once in `models/transformer.py` and in the path of the cache. Numbers of elements, then bytes at the end.
"""

from dataclasses import dataclass

from duolocal.cache.cache import exact_recent_size
from duolocal.kernels.attention import KEY_SPAN, QUERY_TILE
from duolocal.kernels.cpu.attention import TILE_ROWS
from duolocal.kernels.cpu.structs import KEY_TILE, MOST_AHEAD
from duolocal.kernels.sparse import SparsePrefill, tiles_at_once
from duolocal.kernels.torch_kernels import VOCAB_TILE
from duolocal.plan.request import Request

GPU_SPAN = 32768  # tokens of blocks decoded at a time: SPAN of kernels/gpu/library_attention.py, which imports triton
# Holes of small blocks in the heap, Python objects of the engine. Large blocks leave none: duolocal/engine/heap.py.
# Measured (tests/test_plan_memory.py): a process grew by 0 to 2 MB more than what was alive at once.
HEAP_HOLES = 2 << 20
# torch's library of products keeps packed copies of what it multiplies, more of them for whole matrices than for many
# small products: measured likewise, as a share of what is alive and a rest.
ATTENTION_COPIES, ATTENTION_REST = 1.05, 3 << 20
MATRIX_COPIES, MATRIX_REST = 1.15, 4 << 20
SPARSE_COPIES = 8  # of the weights of all blocks in a tile: two numbers each, and what choosing makes of them
_SPANS_PER_THREAD = 8  # partial results of decode attention, as in kernels/cpu/attention.py
_SAMPLING_COPIES = 8  # of the logits of one token, float64


@dataclass(frozen=True)
class Working:
    """Bytes that are alive at once beside weights and cache, at most."""

    prefill: int
    decode: int

    @property
    def most(self) -> int:
        return max(self.prefill, self.decode)


def working_bytes(request: Request) -> Working:
    """Return what a chunk of a prefill and a decode step hold beside weights and cache.

    Grows with the chunk, not with the context beyond a span of blocks; where prefill is sparse, with the blocks that
    are weighed for a tile.
    """
    shape = _Shape.of(request)
    if request.kernels == "triton":
        prefill, decode = _triton(shape), 0
    elif request.kernels == "compiled":
        recorded = _recorded(shape, request.ahead)
        prefill, decode = _compiled(shape, request.threads) + recorded, recorded
    else:
        prefill, decode = _torch(shape), 0
    if request.sparse:
        policy, num_heads = SparsePrefill(), shape.most_retrieval * shape.group
        num_blocks = request.max_blocks
        tiles = tiles_at_once(policy, num_heads=num_heads, num_blocks=num_blocks)
        prefill += tiles * num_heads * policy.asked_per_tile * (num_blocks + 1) * 4 * SPARSE_COPIES
    sampling = request.config.vocab_size * 8 * _SAMPLING_COPIES
    return Working(prefill + shape.saved_ring + sampling, decode + sampling)


@dataclass(frozen=True)
class _Shape:
    chunk: int
    hidden: int
    inner: int
    queries: int  # num_heads * head_dim
    keys: int  # num_kv_heads * head_dim
    vocab: int
    dim: int
    group: int
    kv_heads: int
    layers: int
    most_retrieval: int  # retrieval heads of the layer that has most
    slots: int
    recent: int
    context: int
    itemsize: int

    @classmethod
    def of(cls, request: Request) -> "_Shape":
        config, heads = request.config, request.heads
        recent = exact_recent_size(heads)
        return cls(
            chunk=min(request.chunk_size, request.context),
            hidden=config.hidden_size,
            inner=config.intermediate_size,
            queries=config.num_heads * config.head_dim,
            keys=config.num_kv_heads * config.head_dim,
            vocab=config.vocab_size,
            dim=config.head_dim,
            group=config.num_heads // config.num_kv_heads,
            kv_heads=config.num_kv_heads,
            layers=config.num_layers,
            most_retrieval=max(map(sum, heads.retrieval)),
            slots=heads.sink_size + recent,
            recent=recent,
            context=request.context,
            itemsize=request.dtype.itemsize,
        )

    @property
    def saved_ring(self) -> int:
        """Bytes of the ring slots that a chunk overwrites, kept until it is whole (`DuoCache.begin`)."""
        return 2 * self.layers * self.keys * min(self.chunk, self.slots) * self.itemsize


def _compiled(s: _Shape, threads: int) -> int:
    attention = max(
        2 * s.hidden + s.queries + 2 * s.keys,  # x, x normed, q, k, v
        s.hidden + 2 * s.queries + 3 * s.keys,  # x; q and k before and after RoPE, v
        2 * s.hidden + 2 * s.queries + 2 * s.keys,  # x, q, k, v, attended, projected
    )
    mlp = 2 * s.hidden + max(s.hidden, s.inner)  # x before and after attention; x normed, or the product of gate and up
    # The states of the chunk before live on where a long prompt is generated from; gate, up and codes stay.
    activations = s.chunk * (
        (max(attention, mlp) + s.hidden + 2 * s.inner) * 4 + _codes(max(s.inner, s.hidden, s.queries))
    )
    tile = min(max(1, TILE_ROWS // s.group), s.chunk) * s.group
    scratch = tile * (3 * s.dim + KEY_TILE + 6) + 3 * s.dim * KEY_TILE + tile * (s.dim + KEY_TILE) // 2
    partial = MOST_AHEAD * s.kv_heads * (_SPANS_PER_THREAD * threads + 1) * s.group * (s.dim + 2)
    return activations + 4 * (threads * scratch + partial)


def _recorded(s: _Shape, ahead: tuple[int, ...]) -> int:
    """Return what the recorded decode steps keep: most tensors of every layer, for each token of each step."""
    counts = 1, *(1 + tokens for tokens in ahead)
    layers = s.layers * (4 * s.hidden + 3 * s.queries + 3 * s.keys + s.inner) * 4
    scratch = 2 * s.inner * 4 + _codes(s.hidden) + _codes(s.queries) + _codes(s.inner)
    return sum(counts) * (layers + scratch) + max(counts) * 4 * s.vocab


def _codes(cols: int) -> int:
    """Return the bytes of a token's activations in integer codes (`CpuKernels`), with what aligns them."""
    return 2 * cols + 17 * (-(-cols // 256) * 8) + 7 * 64


def _torch(s: _Shape) -> int:
    """Matrices are decoded whole, one at a time, and so are spans of blocks."""
    wide = max(4, s.itemsize)  # scores, softmax and sums
    n, span = s.chunk, min(KEY_SPAN, s.context)
    tile = min(QUERY_TILE, n)
    band = min(s.slots + tile, s.slots + n)  # keys that a tile of queries sees in the window
    projections = n * (2 * s.hidden + s.queries + 2 * s.keys) * s.itemsize + s.queries * s.hidden * s.itemsize
    held = n * (s.hidden + s.queries + 2 * s.keys) * s.itemsize  # x, q, k, v
    held += 2 * (n + s.slots) * s.keys * s.itemsize  # keys and values of window and chunk, side by side
    out = n * s.queries * wide
    heads = s.kv_heads * s.group
    window = heads * tile * (band * 2 + 2 * s.dim) * wide + tile * band * (8 + 3 * s.kv_heads)
    window += 2 * band * s.keys * (wide + s.itemsize)
    retrieval = s.most_retrieval
    rows = retrieval * s.group
    blocks = 0
    if retrieval and s.context > s.slots:
        keys = retrieval * span * s.dim * wide  # of a span, decoded; values are as many
        # The weights of the last tile live on: while a span is decoded, and while the next scores are made.
        decoding = rows * tile * span * wide + 3 * keys + keys // 2
        scoring = rows * tile * (2 * span + s.dim) * wide + 2 * keys + tile * span * (8 + 2)
        blocks = rows * n * s.dim * 4 * wide + max(decoding, scoring)  # q, q rotated and scaled, out
    attention = held + out + max(window, blocks)
    mlp = n * (3 * s.hidden + 4 * s.inner) * s.itemsize
    gate = n * (3 * s.hidden + 2 * s.inner) * s.itemsize + s.hidden * s.inner * s.itemsize
    tiles = 2 if s.vocab > VOCAB_TILE else 1  # of lm_head: the next one is made while the last is held
    output = n * s.hidden * s.itemsize + tiles * s.hidden * min(s.vocab, VOCAB_TILE) * s.itemsize
    before = n * s.hidden * s.itemsize  # the states of the chunk before
    matrices = max(projections, gate, output) + before
    others = max(attention, mlp) + before
    return max(int(matrices * MATRIX_COPIES) + MATRIX_REST, int(others * ATTENTION_COPIES) + ATTENTION_REST)


def _triton(s: _Shape) -> int:
    """As the notes in kernels/gpu/library_attention.py say; 16-bit. Not measured: no GPU has run it yet."""
    n, size = s.chunk, s.itemsize
    retrieval = s.most_retrieval * s.dim
    # q, k, v before and after RoPE; the band's result in float32; the square, queries and results of the blocks
    attention = n * (2 * size * (s.queries + s.keys) + 8 * s.queries + retrieval * (24 * s.group + 4))
    attention += 4 * retrieval * min(GPU_SPAN, s.context)
    mlp = n * s.inner * 3 * size + s.hidden * s.inner * size  # gate, up and their product; a matrix decoded
    return max(attention, mlp) + n * s.hidden * 4 * size
