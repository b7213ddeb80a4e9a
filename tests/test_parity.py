"""SmolLM2 against transformers, on the same file and the same tokens."""

from pathlib import Path

import pytest
import torch

from duolocal.engine.engine import Engine
from duolocal.sample_text import sample_text
from duolocal.tokenizer import load_tokenizer

NUM_TOKENS = 2304


@pytest.mark.full
@pytest.mark.real
@pytest.mark.parity
def test_smollm2_computes_what_transformers_does(smollm2_path: Path) -> None:
    """All heads retrieval, 16-bit blocks: top-1 agreement of 99.5% and a mean KL of 1e-4 nats or better."""
    transformers = pytest.importorskip("transformers")
    engine = Engine.load(str(smollm2_path), context=NUM_TOKENS, kv="16", heads="all")
    assert engine.source is not None
    token_ids = load_tokenizer(engine.source).encode(sample_text())[:NUM_TOKENS]
    ours = engine.logits(token_ids)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    )
    with torch.inference_mode():
        theirs = model(torch.tensor([token_ids])).logits[0]
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    kl = 0.0
    for start in range(0, NUM_TOKENS, 256):  # in tiles: each of these arrays is 450 MB whole
        mine, other = (x[start : start + 256].double().log_softmax(-1) for x in (ours, theirs))
        kl += (other.exp() * (other - mine)).sum().item()
    print(f"top-1 agreement {agreement:.4%}, mean KL {kl / NUM_TOKENS:.2e} nats over {NUM_TOKENS} tokens")  # noqa: T201
    assert agreement >= 0.995
    assert kl / NUM_TOKENS <= 1e-4
