"""How much a question looks at each sentence of a chunk: one chunk of text in a window of constant size.

The chunk is read without any question, so that several questions can be asked of it; each of them is then read after
the chunk as if it were the only one, and nothing of it stays. The score of a sentence is

    (sum over heads of  max(0, a - b) ** 3) ** (1/3),   a = mean over the question's tokens of
                                                            max over the sentence's tokens of  attention weight

with b the same for a question that asks nothing: what every question looks at (first words, line breaks, headings) says
nothing about this one. The cube lets the few heads that look things up outvote the many that do not, without having to
know which they are. Scores of different chunks can be compared: each is of as many tokens as the others.

The heads of the first five eighths of the layers are listened to, and the others are not computed: retrieval heads
lie in the middle of a model (docs/reader.md has what was measured).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from duolocal.engine.engine import Engine
from duolocal.errors import SettingsError
from duolocal.heads import uniform_plan
from duolocal.models.observe import ObservedCache, attention_weights, layer_by_layer, weighted_values
from duolocal.models.transformer import Cache
from duolocal.tokenizer import ChatPiece, Message, Tokenizer

LAYER_SHARE = 5 / 8
POWER = 3
NOTHING = "N/A"  # the question that asks nothing
INTRODUCTION = "Read the text and answer the question.\n\n"
MAX_ASKED = 512  # tokens of questions listened to at a time; a longer one is taken alone


def listened_layers(num_layers: int) -> int:
    """Return how many layers are computed and listened to."""
    return max(1, round(num_layers * LAYER_SHARE))


class Frame:
    """What stands before a chunk and after it: the model's chat template with an introduction, or plain lines."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._after: list[ChatPiece] = []
        pieces = [ChatPiece(INTRODUCTION)]
        if tokenizer.has_chat_template:
            rendered = tokenizer.chat_pieces([Message("user", "text")], add_generation_prompt=True)
            at = next((at for at, piece in enumerate(rendered) if piece.message == 0), None)
            if at is not None:
                pieces = [*rendered[:at], replace(rendered[at], text=INTRODUCTION)]
                self._after = rendered[at + 1 :]
        self.before = tokenizer.encode_pieces(pieces)

    def question(self, text: str) -> list[int]:
        """Return what stands after a chunk when `text` is asked."""
        return self._tokenizer.encode_pieces([ChatPiece(f"\n\n{text.strip()}"), *self._after], continues=True)


class ChunkReader:
    """Reads chunks of up to `chunk_tokens` tokens with an engine's weights, in a cache of its own.

    Invariant: the cache holds the frame and one chunk, whatever was read before; its size is that of a chunk.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        chunk_tokens: int,
        before_layer: Callable[[int], None] = lambda layer: None,
    ) -> None:
        self._transformer = engine.transformer
        self._before_layer = before_layer
        self.frame = Frame(tokenizer)
        config = self._transformer.config
        self.num_layers = listened_layers(config.num_layers)
        longest = len(self.frame.before) + chunk_tokens
        if longest >= engine.context:
            raise SettingsError(
                f"a chunk of {chunk_tokens:,} tokens is read at a time, and the context is {engine.context:,}: "
                f"start with --context {2 * longest} or more"
            )
        plan = uniform_plan(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            retrieval=False,
            sink_size=0,
            recent_size=longest,  # every token of a chunk sees all before it, as computed
        )
        self._engine = Engine.build(self._transformer, plan, kv=engine.kv, chunk_size=engine.chunk_size)
        self._nothing = self.frame.question(NOTHING)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache."""
        return self._engine.cache.memory().total

    def read(self, token_ids: Sequence[int]) -> None:
        """Read a chunk in place of the one before."""
        engine, before = self._engine, self.frame.before
        engine.reset()
        everything = [*before, *token_ids]
        for start in range(0, len(everything), engine.chunk_size):
            part = everything[start : start + engine.chunk_size]
            engine.append(part, lambda part=part, start=start: self._run(part, start))  # type: ignore[misc]

    def _run(self, token_ids: Sequence[int], start: int) -> None:
        device = self._transformer.device
        positions = torch.arange(start, start + len(token_ids), device=device)
        self._layers(torch.tensor(token_ids, device=device), positions, lambda _: self._engine.cache)

    def _layers(self, token_ids: Tensor, positions: Tensor, cache_of: Callable[[int], Cache]) -> None:
        def before(layer: int) -> Cache:
            self._before_layer(layer)
            return cache_of(layer)

        layers = layer_by_layer(self._transformer, token_ids, before, positions=positions)
        for _ in range(self.num_layers):
            next(layers)

    @torch.inference_mode()
    def scores(self, questions: Sequence[Sequence[int]], lengths: Sequence[int]) -> Tensor:
        """Return how much each question looks at each sentence of the chunk: float32 [num_questions, num_sentences].

        questions: as `Frame.question` makes them; lengths: tokens of the sentences, together those of the chunk.
        """
        engine, first = self._engine, len(self.frame.before)
        assert first + sum(lengths) == engine.position, (first, sum(lengths), engine.position)
        sentences = torch.arange(len(lengths), device=self._transformer.device).repeat_interleave(
            torch.tensor(lengths, device=self._transformer.device)
        )
        looks = []
        batch: list[Sequence[int]] = [self._nothing]
        for question in questions:
            if sum(map(len, batch)) + len(question) > MAX_ASKED and batch:
                looks.append(self._looks(batch, sentences, len(lengths)))
                batch = []
            batch.append(question)
        looks.append(self._looks(batch, sentences, len(lengths)))
        all_looks = torch.cat(looks)  # [1 + num_questions, layers * heads, num_sentences]
        more = (all_looks[1:] - all_looks[:1]).clamp_min_(0)
        return more.pow_(POWER).sum(1).pow_(1 / POWER)

    def _looks(self, questions: Sequence[Sequence[int]], sentences: Tensor, count: int) -> Tensor:
        """Return per question, head and sentence the mean of the strongest weights: [n, layers * heads, count]."""
        listening = _Listening(self._engine, questions, sentences, count, first=len(self.frame.before))
        device = self._transformer.device
        token_ids = torch.tensor([token for question in questions for token in question], device=device)
        start = self._engine.position
        positions = torch.cat([torch.arange(start, start + len(question), device=device) for question in questions])
        self._layers(token_ids, positions, lambda layer: ObservedCache(partial(listening.attend, layer)))
        return torch.cat(listening.looks, dim=1)


class _Listening:
    """Attention for questions side by side: each sees the chunk and itself; what each looked at is noted."""

    def __init__(
        self, engine: Engine, questions: Sequence[Sequence[int]], sentences: Tensor, count: int, *, first: int
    ) -> None:
        self._ring = engine.cache.ring
        self._first, self._sentences, self._count = first, sentences, count
        device = engine.transformer.device
        self._held = torch.arange(engine.position, device=device)
        lengths = torch.tensor([len(question) for question in questions], device=device)
        self._question = torch.arange(len(questions), device=device).repeat_interleave(lengths)
        self._num_questions = len(questions)
        self._shares = 1 / lengths[self._question, None].float()  # of a token in its question's mean
        order = torch.arange(len(self._question), device=device)
        others = (self._question[:, None] != self._question) | (order > order[:, None])
        self._hidden = torch.cat((others.new_zeros(len(order), len(self._held)), others), dim=1)
        self.looks: list[Tensor] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """Attend to the chunk and, within each question, to what came before."""
        chunk_k, chunk_v = self._ring.read(layer, self._held)
        keys, values = torch.cat((chunk_k, k), dim=1), torch.cat((chunk_v, v), dim=1)
        outs, looks = [], []
        for head in range(len(keys)):  # one at a time: bounds the weights
            weights = attention_weights(q[head], keys[head], self._hidden)  # [group, q_len, keys]
            outs.append(weighted_values(weights, values[head]))
            seen = weights[..., self._first : len(self._held)]
            best = seen.new_zeros(*seen.shape[:2], self._count)
            best.scatter_reduce_(2, self._sentences.expand_as(seen), seen, "amax")
            mean = best.new_zeros(self._num_questions, best.shape[0], self._count)
            looks.append(mean.index_add_(0, self._question, (best * self._shares).transpose(0, 1)))
        self.looks.append(torch.cat(looks, dim=1))
        return torch.stack(outs)
