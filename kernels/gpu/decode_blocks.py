"""One range of a retrieval head's blocks, attended to by one new token: the loop of the split kernel in `decode.py`.

Tiles lie with tokens (scores) and dimensions (output) along the rows of the tensor core's product and query heads along
its columns: eight columns are enough for a group of eight, sixteen rows of query heads would be half empty. Every
warp is a stream of its own: a leading dimension of STREAMS, which Triton gives to warps, each with its own tokens,
maximum and output, so that no iteration exchanges anything between warps. The streams are joined at the end.

A stream's reference, what softmax subtracts, is the largest score + log2(value factor), not the largest score: the
weights that go into the float16 product with the codes are weight · factor, at most 2^HEADROOM whatever the scales.
"""

import triton
import triton.language as tl

from duolocal.kernels.gpu.planes import load_codes, load_raw_scales, scale_factors, word_numbers

HEADROOM = tl.constexpr(10.0)  # 2^10 of float16's 2^16; what is 2^-34 of the largest weight vanishes
LOWEST = tl.constexpr(-1.0e30)  # instead of -inf, of which differences are NaN


@triton.jit
def _sum_streams(x, weight):
    return tl.sum(x * weight, 0)


@triton.jit
def attend_block_range(
    q,  # [GROUP, DIM], this KV head's
    records,
    table,  # [max_blocks], this head's
    listed,  # int32, the blocks to read; without LISTED all of them are
    length,  # of the list
    partial_out,  # [GROUP, DIM], this program's
    lse_at,  # pointers [COLUMNS]
    begin,  # iterations of TILES * TILE tokens, of the list's where LISTED
    end,
    seen_end,  # positions SINK..seen_end-1 are visible
    scale,
    SINK: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    RECORD_BYTES: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    KEY_DOT: tl.constexpr,
    VALUE_DOT: tl.constexpr,
    STREAMS: tl.constexpr,
    TILES: tl.constexpr,
    TILE_STAGES: tl.constexpr,
    LISTED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Attend to iterations begin..end-1 of one retrieval head; write the output and the log-sum-exp of this range."""
    key_parts: tl.constexpr = 4 if KEY.kind == 5 else (2 if KEY.kind >= 3 else 1)
    value_parts: tl.constexpr = 4 if VALUE.kind == 5 else (2 if VALUE.kind >= 3 else 1)
    key_units: tl.constexpr = DIM_PAD // key_parts
    value_units: tl.constexpr = DIM_PAD // value_parts
    # Of part 0, 1, 2, 3: dimension 0, 1, D/2, D/2 + 1 and every second on (int4), 0, 1 and every second on (8 bits).
    TILE: tl.constexpr = STREAMS * 16
    key_step: tl.constexpr = 1 if key_parts == 1 else 2
    value_step: tl.constexpr = 1 if value_parts == 1 else 2

    columns = tl.arange(0, COLUMNS)
    key_unit = tl.arange(0, key_units)
    value_unit = tl.arange(0, value_units)
    key_inside = key_unit < DIM // key_parts
    value_inside = value_unit < DIM // value_parts
    if DIM == DIM_PAD:
        key_mask: tl.constexpr = None
        value_mask: tl.constexpr = None
    else:
        key_mask = key_inside[None, None, :]
        value_mask = value_inside[None, :, None]

    # The queries, part by part, the same for every stream: [STREAMS, key_units, COLUMNS].
    q_at = q + columns[None, :] * DIM + key_unit[:, None] * key_step
    q_mask = (columns[None, :] < GROUP) & key_inside[:, None]
    q_0 = tl.load(q_at, mask=q_mask, other=0.0)
    q_sum = tl.sum(q_0.to(tl.float32), 0)
    q_0 = tl.broadcast_to(q_0.to(KEY_DOT)[None], (STREAMS, key_units, COLUMNS))
    q_1 = q_0
    q_2 = q_0
    q_3 = q_0
    if key_parts >= 2:
        q_1 = tl.load(q_at + 1, mask=q_mask, other=0.0)
        q_sum += tl.sum(q_1.to(tl.float32), 0)
        q_1 = tl.broadcast_to(q_1.to(KEY_DOT)[None], (STREAMS, key_units, COLUMNS))
    if key_parts == 4:
        q_2 = tl.load(q_at + DIM // 2, mask=q_mask, other=0.0)
        q_3 = tl.load(q_at + DIM // 2 + 1, mask=q_mask, other=0.0)
        q_sum += tl.sum(q_2.to(tl.float32), 0) + tl.sum(q_3.to(tl.float32), 0)
        q_2 = tl.broadcast_to(q_2.to(KEY_DOT)[None], (STREAMS, key_units, COLUMNS))
        q_3 = tl.broadcast_to(q_3.to(KEY_DOT)[None], (STREAMS, key_units, COLUMNS))
    q_sum *= scale

    acc_0 = tl.zeros([STREAMS, value_units, COLUMNS], tl.float32)
    acc_1 = acc_0
    acc_2 = acc_0
    acc_3 = acc_0
    reference = tl.full([STREAMS, COLUMNS], LOWEST, tl.float32)
    # Sums over the tokens wait until the end: summing over rows is an exchange between threads.
    total = tl.zeros([STREAMS, 16, COLUMNS], tl.float32)
    bias = total

    # The records of the next tiles, and their scales, are fetched while these are computed. What lies outside the
    # visible range is read from some record of it, which is whole and finite; its scores are hidden.
    first_block: tl.constexpr = SINK // BLOCK_SIZE
    last_block = length - 1 if LISTED else (seen_end - 1) // BLOCK_SIZE
    rows = tl.arange(0, STREAMS)[:, None] * 16 + tl.arange(0, 16)[None, :]
    at_a = begin * (TILES * TILE)
    record_a = records + _record_index(table, listed, at_a, first_block, last_block, BLOCK_SIZE, LISTED) * RECORD_BYTES
    ahead_a = _record_index(table, listed, at_a + TILES * TILE, first_block, last_block, BLOCK_SIZE, LISTED)
    token = (at_a & (BLOCK_SIZE - 1)) + rows
    key_scales_a, key_minima_a = load_raw_scales(record_a, token, None, KEY)
    value_scales_a, value_minima_a = load_raw_scales(record_a, token, None, VALUE)
    if TILES == 2:
        at_b = at_a + TILE
        index_b = _record_index(table, listed, at_b, first_block, last_block, BLOCK_SIZE, LISTED)
        record_b = records + index_b * RECORD_BYTES
        ahead_b = _record_index(table, listed, at_b + TILES * TILE, first_block, last_block, BLOCK_SIZE, LISTED)
        token = (at_b & (BLOCK_SIZE - 1)) + rows
        key_scales_b, key_minima_b = load_raw_scales(record_b, token, None, KEY)
        value_scales_b, value_minima_b = load_raw_scales(record_b, token, None, VALUE)
    for step in tl.range(begin, end, num_stages=TILE_STAGES):
        at_a = step * (TILES * TILE)
        words_a = load_codes(
            record_a, ((at_a & (BLOCK_SIZE - 1)) + rows)[:, :, None], key_unit[None, None, :], key_mask, KEY, True
        )
        scores_a = _scores(
            words_a, key_scales_a, key_minima_a, q_0, q_1, q_2, q_3, q_sum, scale, KEY.kind, KEY_DOT, INTERPRETED
        )
        positions = _first_position(listed, at_a, last_block, BLOCK_SIZE, LISTED) + rows
        scores_a = _hide(scores_a, positions, seen_end, SINK)
        factor_a, heights = _heights(scores_a, value_scales_a, value_minima_a, VALUE.kind)
        if TILES == 2:
            at_b = at_a + TILE
            words_b = load_codes(
                record_b, ((at_b & (BLOCK_SIZE - 1)) + rows)[:, :, None], key_unit[None, None, :], key_mask, KEY, True
            )
            scores_b = _scores(
                words_b, key_scales_b, key_minima_b, q_0, q_1, q_2, q_3, q_sum, scale, KEY.kind, KEY_DOT, INTERPRETED
            )
            positions = _first_position(listed, at_b, last_block, BLOCK_SIZE, LISTED) + rows
            scores_b = _hide(scores_b, positions, seen_end, SINK)
            factor_b, heights_b = _heights(scores_b, value_scales_b, value_minima_b, VALUE.kind)
            heights = tl.maximum(heights, heights_b)
        new_reference = tl.maximum(reference, tl.max(heights, 1))
        shrink = tl.exp2(reference - new_reference)[:, None, :]
        reference = new_reference
        total *= shrink
        bias *= shrink
        acc_0 *= shrink
        acc_1 *= shrink
        acc_2 *= shrink
        acc_3 *= shrink
        words_a = load_codes(
            record_a, ((at_a & (BLOCK_SIZE - 1)) + rows)[:, None, :], value_unit[None, :, None], value_mask, VALUE, True
        )
        total, bias, acc_0, acc_1, acc_2, acc_3 = _add_values(
            words_a,
            scores_a,
            reference,
            factor_a,
            value_minima_a,
            total,
            bias,
            acc_0,
            acc_1,
            acc_2,
            acc_3,
            VALUE.kind,
            VALUE_DOT,
            INTERPRETED,
        )
        if TILES == 2:
            words_b = load_codes(
                record_b,
                ((at_b & (BLOCK_SIZE - 1)) + rows)[:, None, :],
                value_unit[None, :, None],
                value_mask,
                VALUE,
                True,
            )
            total, bias, acc_0, acc_1, acc_2, acc_3 = _add_values(
                words_b,
                scores_b,
                reference,
                factor_b,
                value_minima_b,
                total,
                bias,
                acc_0,
                acc_1,
                acc_2,
                acc_3,
                VALUE.kind,
                VALUE_DOT,
                INTERPRETED,
            )

        record_a = records + ahead_a * RECORD_BYTES
        token = ((at_a + TILES * TILE) & (BLOCK_SIZE - 1)) + rows
        key_scales_a, key_minima_a = load_raw_scales(record_a, token, None, KEY)
        value_scales_a, value_minima_a = load_raw_scales(record_a, token, None, VALUE)
        ahead_a = _record_index(table, listed, at_a + 2 * TILES * TILE, first_block, last_block, BLOCK_SIZE, LISTED)
        if TILES == 2:
            record_b = records + ahead_b * RECORD_BYTES
            token = ((at_b + TILES * TILE) & (BLOCK_SIZE - 1)) + rows
            key_scales_b, key_minima_b = load_raw_scales(record_b, token, None, KEY)
            value_scales_b, value_minima_b = load_raw_scales(record_b, token, None, VALUE)
            ahead_b = _record_index(table, listed, at_b + 2 * TILES * TILE, first_block, last_block, BLOCK_SIZE, LISTED)

    # Join the streams.
    top = tl.max(reference, 0)
    weight = tl.exp2(reference - top[None, :])
    sum_ = tl.sum(tl.sum(total, 1) * weight, 0)
    seen = sum_ > 0.0
    inverse = 1.0 / tl.where(seen, sum_, 1.0)
    tl.store(lse_at, tl.where(seen, top + tl.log2(tl.where(seen, sum_, 1.0)), float("-inf")), mask=columns < GROUP)
    shift = (tl.sum(tl.sum(bias, 1) * weight, 0) * inverse)[None, :]
    inverse = inverse[None, :]
    weight = weight[:, None, :]
    out_at = partial_out + columns[None, :] * DIM + value_unit[:, None] * value_step
    out_mask = (columns[None, :] < GROUP) & value_inside[:, None]
    tl.store(out_at, _sum_streams(acc_0, weight) * inverse + shift, mask=out_mask)
    if value_parts >= 2:
        tl.store(out_at + 1, _sum_streams(acc_1, weight) * inverse + shift, mask=out_mask)
    if value_parts == 4:
        tl.store(out_at + DIM // 2, _sum_streams(acc_2, weight) * inverse + shift, mask=out_mask)
        tl.store(out_at + DIM // 2 + 1, _sum_streams(acc_3, weight) * inverse + shift, mask=out_mask)


@triton.jit
def _record_index(table, listed, at, first_block, last_block, BLOCK_SIZE: tl.constexpr, LISTED: tl.constexpr):
    """Return the record of the block of position `at`, or of the nearest visible block; LISTED: as the list counts."""
    if LISTED:
        block = tl.load(listed + tl.minimum(at // BLOCK_SIZE, last_block))
    else:
        block = tl.minimum(tl.maximum(at // BLOCK_SIZE, first_block), last_block)
    return tl.load(table + block)


@triton.jit
def _first_position(listed, at, last_block, BLOCK_SIZE: tl.constexpr, LISTED: tl.constexpr):
    """Return the position of the first token of a tile at `at`, which counts through the list where LISTED."""
    if LISTED:
        # Beyond the list nothing is visible.
        block = tl.load(listed + tl.minimum(at // BLOCK_SIZE, last_block))
        at = tl.where(at // BLOCK_SIZE <= last_block, block * BLOCK_SIZE + (at & (BLOCK_SIZE - 1)), -BLOCK_SIZE)
    return at


@triton.jit
def _scores(
    words,
    scales,
    minima,
    q_0,
    q_1,
    q_2,
    q_3,
    q_sum,
    scale,
    KIND: tl.constexpr,
    DOT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Return the scores of a tile, base 2: float32 [STREAMS, 16, COLUMNS]. q_sum includes `scale`."""
    scores = tl.dot(word_numbers(words, 0, KIND, DOT, INTERPRETED), q_0, input_precision="ieee")
    if KIND >= 3:
        scores = tl.dot(word_numbers(words, 8, KIND, DOT, INTERPRETED), q_1, scores)
    if KIND == 5:
        scores = tl.dot(word_numbers(words, 4, KIND, DOT, INTERPRETED), q_2, scores)
        scores = tl.dot(word_numbers(words, 12, KIND, DOT, INTERPRETED), q_3, scores)
    if KIND >= 3:
        factor, addend = scale_factors(scales, minima, KIND)
        scores = scores * (factor * scale)[:, :, None]
        if KIND >= 4:
            scores += addend[:, :, None] * q_sum[None, None, :]
    else:
        scores = scores * scale
    return scores


@triton.jit
def _hide(scores, positions, seen_end, SINK: tl.constexpr):
    visible = (positions >= SINK) & (positions < seen_end)
    return tl.where(visible[:, :, None], scores, float("-inf"))


@triton.jit
def _heights(scores, scales, minima, KIND: tl.constexpr):
    """Return the values' factors [STREAMS, 16], and scores + log2(factor) - HEADROOM; the reference is the largest."""
    factor, _ = scale_factors(scales, minima, KIND)
    if KIND >= 3:
        # A factor of 0 must not let weights grow without bound: float16 has none below 2^-24, bfloat16 hardly any.
        bits = tl.maximum(factor, 5.9604644775390625e-8 if KIND >= 4 else 1.0e-30).to(tl.uint32, bitcast=True)
        # The exponent alone will do, and the last bits of a float32 in [2^23, 2^24) are an integer.
        exponent = ((bits >> 23) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + 127.0 + HEADROOM)
        heights = scores + exponent[:, :, None]
    elif KIND == 1:
        heights = scores - HEADROOM
    else:
        heights = scores
    return factor, heights


@triton.jit
def _add_values(
    words,
    scores,
    reference,
    factor,
    minima,
    total,
    bias,
    acc_0,
    acc_1,
    acc_2,
    acc_3,
    KIND: tl.constexpr,
    DOT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Add a tile's weighted values to sums that already go by `reference`."""
    weights = tl.exp2(scores - reference[:, None, :])
    total += weights
    if KIND >= 4:
        bias += weights * minima.to(tl.float32)[:, :, None]
    if KIND >= 3:
        weights = weights * factor[:, :, None]
    weights = weights.to(DOT)
    if KIND == 5:
        # The offset of the numbers is taken back with the weights as rounded, or their rounding would grow by it.
        bias -= 64.0 * weights.to(tl.float32)
    acc_0 = tl.dot(word_numbers(words, 0, KIND, DOT, INTERPRETED), weights, acc_0, input_precision="ieee")
    if KIND >= 3:
        acc_1 = tl.dot(word_numbers(words, 8, KIND, DOT, INTERPRETED), weights, acc_1)
    if KIND == 5:
        acc_2 = tl.dot(word_numbers(words, 4, KIND, DOT, INTERPRETED), weights, acc_2)
        acc_3 = tl.dot(word_numbers(words, 12, KIND, DOT, INTERPRETED), weights, acc_3)
    return total, bias, acc_0, acc_1, acc_2, acc_3
