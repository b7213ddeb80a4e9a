"""One tile of blocks for the queries of a KV head: what the kernels share that read quantized blocks as they are.

Queries and accumulators are in two halves of head_dim, which is how INT4 codes lie. Softmax in base 2 while the keys
pass by (arXiv 2307.08691), sums in float32.
"""

import triton
import triton.language as tl

from duolocal.kernels.gpu.library_attention import dequantize, load_plane
from duolocal.kernels.gpu.planes import load_scales


@triton.jit
def load_queries(q, at, inside, DIM: tl.constexpr):
    """Return both halves of queries [rows, HALF_PAD], 0 where not `inside`, and their sums, for the addends of keys."""
    half: tl.constexpr = DIM // 2
    low = tl.load(q + at, mask=inside, other=0.0)
    high = tl.load(q + at + half, mask=inside, other=0.0)
    return low, high, tl.sum(low.to(tl.float32), 1) + tl.sum(high.to(tl.float32), 1)


@triton.jit
def tile_scores(q_low, q_high, q_sum, record, tokens, columns, mask, KEY: tl.constexpr, DIM: tl.constexpr, DOT):
    """Return the products of queries with the keys of `tokens`, float32 [rows, tokens]; DOT: the type of the products.

    mask: [tokens, HALF_PAD], what of a half is inside head_dim. What is masked counts nothing: the query is 0 there.
    """
    low = load_plane(record, tokens[:, None], columns[None, :], mask, 0, KEY, DIM, DOT)
    high = load_plane(record, tokens[:, None], columns[None, :], mask, 1, KEY, DIM, DOT)
    scores = tl.dot(q_low, tl.trans(low), input_precision="ieee")
    scores = tl.dot(q_high, tl.trans(high), scores, input_precision="ieee")
    if KEY.kind >= 3:
        factor, addend = load_scales(record, tokens, tokens >= 0, KEY)
        scores = scores * factor[None, :]
        if KEY.kind >= 4:
            scores = scores + q_sum[:, None] * addend[None, :]
    return scores


@triton.jit
def softmax_step(scores, top, total):
    """Take scores [rows, tokens], -inf where hidden, into an online softmax.

    top, total: float32 [rows], the largest score so far and the sum of 2^(score - top). Returns both anew, the weights
    of the tile, and the factor by which older weights shrink.
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen nothing yet has no reference: -inf - (-inf) is NaN.
    reference = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - reference[:, None])
    shrink = tl.exp2(top - reference)
    return new_top, total * shrink + tl.sum(weights, 1), weights, shrink


@triton.jit
def add_values(
    weights,
    shrink,
    acc_low,
    acc_high,
    record,
    tokens,
    columns,
    mask,
    VALUE: tl.constexpr,
    DIM: tl.constexpr,
    DOT: tl.constexpr,
    NUMBER: tl.constexpr,
):
    """Return both accumulators, shrunk, with the weighted values of `tokens`; NUMBER: the type that codes become."""
    weights = weights.to(DOT)
    factor, addend = load_scales(record, tokens, tokens >= 0, VALUE)
    low = load_plane(record, tokens[:, None], columns[None, :], mask, 0, VALUE, DIM, NUMBER)
    low = dequantize(low, factor, addend, VALUE.kind, DOT)
    acc_low = tl.dot(weights, low, acc_low * shrink[:, None], input_precision="ieee")
    high = load_plane(record, tokens[:, None], columns[None, :], mask, 1, VALUE, DIM, NUMBER)
    high = dequantize(high, factor, addend, VALUE.kind, DOT)
    acc_high = tl.dot(weights, high, acc_high * shrink[:, None], input_precision="ieee")
    return acc_low, acc_high


@triton.jit
def natural_lse(top, total):
    """Return the natural log-sum-exp of an online softmax; -inf for a row that saw nothing."""
    return (top + tl.log2(tl.where(total > 0.0, total, 1.0))) * 0.6931471805599453


@triton.jit
def store_rows(out, lse, row_at, columns, inside, stored, top, total, acc_low, acc_high, DIM: tl.constexpr):
    """Store the rows of an online softmax, 0 for those that saw nothing, and their log-sum-exp where `stored`."""
    half: tl.constexpr = DIM // 2
    divisor = tl.where(total > 0.0, total, 1.0)[:, None]
    at = row_at[:, None] * DIM + columns[None, :]
    tl.store(out + at, acc_low / divisor, mask=inside)
    tl.store(out + at + half, acc_high / divisor, mask=inside)
    tl.store(lse + row_at, natural_lse(top, total), mask=stored)
