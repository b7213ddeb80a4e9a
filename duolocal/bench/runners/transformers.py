"""transformers on the same .gguf, which it dequantizes to float32: sdpa attention, logits of the last token only.

Tokens of one request go in one forward pass, as its users do it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from duolocal.bench.runners.serve import serve_runner


class TransformersRunner:
    """One model, one DynamicCache."""

    model: Any
    cache: Any

    def load(self, *, path: str, threads: int) -> dict[str, Any]:
        """Load a .gguf."""
        torch.set_num_threads(threads)
        file = Path(path)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.cache = transformers.DynamicCache(config=self.model.config)
        return {
            "dtype": "float32",
            "attention": self.model.config._attn_implementation,
            "threads": torch.get_num_threads(),
            "version": transformers.__version__,
        }

    @property
    def position(self) -> int:
        return self.cache.get_seq_length()

    def prefill(self, token_ids: Sequence[int]) -> None:
        self._logits(token_ids)

    def greedy(self, token_id: int, num_tokens: int) -> Iterator[int]:
        for _ in range(num_tokens):
            token_id = int(self._logits([token_id]).argmax())
            yield token_id

    def mark(self) -> int:
        return self.position

    def rewind(self, mark: int) -> None:
        self.cache.crop(mark - self.position)  # negative: so many tokens fewer

    @torch.inference_mode()
    def _logits(self, token_ids: Sequence[int]) -> Tensor:
        """Append tokens; return the logits of the last: [1, 1, vocab_size]."""
        ids = torch.tensor([list(token_ids)])
        return self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits


if __name__ == "__main__":
    serve_runner(TransformersRunner())
