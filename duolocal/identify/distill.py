"""DuoAttention's gates: one number per KV head, learned by distillation (arXiv 2410.10819, section 2.3).

Every head's output is gate · full + (1 - gate) · streaming attention. The loss is the squared distance between the
last hidden state and that of the full model, plus an L1 pressure that closes gates nobody misses. The model's own
weights are frozen. As published: gates start at 1 and are clipped to [0, 1]; AdamW without weight decay (that is Adam),
rate 0.02, raised over the first fifth of the steps and lowered over the last; pressure 0.05 on the mean gate.
Otherwise than published, where the distance counts only at the tokens that answer for passkeys, half of it is taken at
the text around them (`text_share`; 0 as published): heads that ordinary text misses are ranked too.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor

from duolocal.identify.mix import mixed_hidden, needs_checkpointing
from duolocal.identify.results import IdentifyProgress
from duolocal.identify.text import PasskeyShape, PasskeyText
from duolocal.models.transformer import Transformer

BETAS = (0.9, 0.999)  # of Adam, as torch and the published code have them
EPSILON = 1e-8
TEXT_SHARE = 0.5  # of the loss
PRESSURE = 0.05
OPEN = 0.5  # a gate above it counts as open


@dataclass(frozen=True)
class DistillSettings:
    """What a distillation depends on beside the model; runs with equal settings give equal gates."""

    steps: int
    num_tokens: int  # of the longest text; the shortest has half of them
    seed: int
    sink_size: int  # tokens
    recent_size: int  # tokens
    passkeys: PasskeyShape
    text_share: float = TEXT_SHARE  # of the loss: at the text that is farther in than a streaming head's window
    rate: float = 0.02
    pressure: float = PRESSURE  # on the mean gate

    def fingerprint(self, *others: str) -> str:
        """Return a hash of all settings and of what else a run depends on: the model's fingerprint, the text."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        for other in others:
            digest.update(hashlib.sha256(other.encode()).digest())
        return digest.hexdigest()

    def rate_at(self, step: int) -> float:
        """Return the rate of step 0..steps-1: a trapeze, never below a tenth."""
        ramp = max(self.steps // 5, 1)
        return self.rate * min(1.0, max((step + 1) / ramp, 0.1), max((self.steps - step) / ramp, 0.1))


@dataclass(frozen=True)
class DistillState:
    """A run between two steps; tables are [num_layers, num_kv_heads] float64 on the CPU."""

    step: int  # done
    gates: Tensor
    mean: Tensor  # Adam's running mean of the gradient
    square: Tensor  # and of its square
    gates_sum: Tensor  # over all steps
    losses: tuple[float, ...] = ()  # one per step, without the pressure

    @classmethod
    def begin(cls, num_layers: int, num_kv_heads: int) -> "DistillState":
        """Return the state before the first step: every gate open."""
        zeros = torch.zeros(num_layers, num_kv_heads, dtype=torch.float64)
        return cls(0, torch.ones_like(zeros), zeros, zeros, zeros)

    @property
    def open_share(self) -> float:
        return float((self.gates > OPEN).double().mean())

    @property
    def mean_gates(self) -> Tensor:
        """The gates' average over all steps so far: how long a head kept its gate open."""
        return self.gates_sum / max(self.step, 1)


def distill(
    transformer: Transformer,
    draw: Callable[[int], PasskeyText],
    settings: DistillSettings,
    *,
    state: DistillState | None = None,
    save: Callable[[DistillState], None] | None = None,
    checkpointing: bool | None = None,
) -> Iterator[IdentifyProgress | DistillState]:
    """Yield progress after every step, and at last the final DistillState.

    transformer: one that computes with `TorchKernels`, the only differentiable ones; draw: the text of step 0, 1, …;
    state: to go on from; save: called with the state after every step; checkpointing: compute every layer once more
    and not keep its activations, None where they would take too much of the free memory.
    """
    config = transformer.config
    if checkpointing is None:
        checkpointing = needs_checkpointing(transformer, settings.num_tokens)
    state = DistillState.begin(config.num_layers, config.num_kv_heads) if state is None else state
    while state.step < settings.steps:
        text = draw(state.step)
        loss, gradient = distance(transformer, state.gates, text, settings, checkpointing=checkpointing)
        state = descend(state, loss, gradient, settings)
        if save is not None:
            save(state)
        yield IdentifyProgress(
            state.step,
            settings.steps,
            "steps",
            f"distilling, {len(text.token_ids):,} tokens",
            loss=loss,
            open_share=state.open_share,
        )
    yield state


def distance(
    transformer: Transformer,
    gates: Tensor,
    text: PasskeyText,
    settings: DistillSettings,
    *,
    checkpointing: bool = True,
) -> tuple[float, Tensor]:
    """Return the mean squared distance at the answers' tokens and at the text's, and its gradient by every gate.

    gates: [num_layers, num_kv_heads]; so is the gradient, float64 on the CPU.
    """
    device = transformer.device
    ids = torch.tensor(text.token_ids, dtype=torch.int64, device=device)
    positions = torch.arange(len(text.token_ids), device=device)
    wide = torch.promote_types(transformer.dtype, torch.float32)
    # The tokens at which the distance counts. Before the window is full nothing is missed.
    answers = torch.tensor(text.predicted_at, device=device)
    around = positions[settings.sink_size + settings.recent_size : text.predicted_at[0]]
    rows = torch.cat((answers, around))
    text_share = settings.text_share if len(around) else 0.0
    shares = torch.full((len(rows),), text_share / max(len(around), 1), dtype=wide, device=device)
    shares[: len(answers)] = (1 - text_share) / len(answers)
    hidden = partial(
        mixed_hidden, transformer, ids, rows, sink_size=settings.sink_size, recent_size=settings.recent_size
    )
    with torch.no_grad():
        target = hidden(None).to(wide)
    leaf = gates.to(device, wide, copy=True).requires_grad_()
    mixed = hidden(leaf, checkpointing=checkpointing).to(wide)
    loss = (mixed - target).square().mean(-1) @ shares
    (gradient,) = torch.autograd.grad(loss, leaf)
    return float(loss.detach()), gradient.to("cpu", torch.float64)


def descend(state: DistillState, loss: float, gradient: Tensor, settings: DistillSettings) -> DistillState:
    """Return the state after one step of Adam down the loss and the pressure, gates clipped to [0, 1]."""
    gradient = gradient + settings.pressure / gradient.numel()  # gates are 0 or more: their L1 norm is their sum
    step = state.step + 1
    mean = BETAS[0] * state.mean + (1 - BETAS[0]) * gradient
    square = BETAS[1] * state.square + (1 - BETAS[1]) * gradient.square()
    move = (mean / (1 - BETAS[0] ** step)) / ((square / (1 - BETAS[1] ** step)).sqrt() + EPSILON)
    gates = (state.gates - settings.rate_at(state.step) * move).clamp(0, 1)
    return replace(
        state,
        step=step,
        gates=gates,
        mean=mean,
        square=square,
        gates_sum=state.gates_sum + gates,
        losses=(*state.losses, loss),
    )
