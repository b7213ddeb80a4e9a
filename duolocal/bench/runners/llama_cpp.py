"""llama.cpp through its C interface: no Python between its calls but the loop, no sampler but an argmax.

Prompts go in batches of 512, its default for both batch sizes; a batch computes the logits of its last token alone.
"""

import ctypes
import logging
import os
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

import llama_cpp
import numpy as np

from duolocal.bench.runners.serve import serve_runner

BATCH = 512
KV_TYPES = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0, "q4_0": llama_cpp.GGML_TYPE_Q4_0}


class LlamaCppRunner:
    """One model, one context, one sequence (number 0)."""

    def load(self, *, path: str, context: int, threads: int, flash: bool, key: str, value: str) -> dict[str, Any]:
        """Load a .gguf; `key` and `value` are names of KV_TYPES."""
        logging.getLogger("llama-cpp-python").setLevel(logging.WARNING)
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(os.fsencode(path), model_params)
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.type_k, params.type_v = KV_TYPES[key], KV_TYPES[value]
        params.offload_kqv = params.op_offload = False
        params.no_perf = True
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp refuses flash={flash}, keys {key}, values {value}, context {context}")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        return {
            "flash": flash,
            "key": key,
            "value": value,
            "batch": BATCH,
            "version": metadata.version("llama-cpp-python"),
            "system_info": llama_cpp.llama_print_system_info().decode(errors="replace").strip(),
        }

    @property
    def position(self) -> int:
        return llama_cpp.llama_memory_seq_pos_max(self._memory, 0) + 1

    def prefill(self, token_ids: Sequence[int]) -> None:
        for start in range(0, len(token_ids), BATCH):
            self._decode(token_ids[start : start + BATCH])

    def greedy(self, token_id: int, num_tokens: int) -> Iterator[int]:
        for _ in range(num_tokens):
            self._decode([token_id])
            logits = llama_cpp.llama_get_logits_ith(self._context, -1)
            token_id = int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())
            yield token_id

    def mark(self) -> int:
        return self.position

    def rewind(self, mark: int) -> None:
        if not llama_cpp.llama_memory_seq_rm(self._memory, 0, mark, -1):
            raise RuntimeError(f"llama.cpp cannot remove the tokens from {mark} on")

    def _decode(self, token_ids: Sequence[int]) -> None:
        array = (llama_cpp.llama_token * len(token_ids))(*token_ids)
        # A batch made by get_one continues sequence 0 and asks for the logits of the last token only.
        code = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(array, len(token_ids)))
        if code != 0:
            raise RuntimeError(f"llama_decode failed with {code} at position {self.position}")
        llama_cpp.llama_synchronize(self._context)


def quantize_q4_0(path: str, target: str, threads: int) -> None:
    """Write the weights of a .gguf anew as Q4_0, whatever they are."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    params.allow_requantize = True
    params.nthread = threads
    code = llama_cpp.llama_model_quantize(os.fsencode(path), os.fsencode(target), ctypes.byref(params))
    if code != 0:
        raise RuntimeError(f"llama_model_quantize failed with {code}")


if __name__ == "__main__":
    serve_runner(LlamaCppRunner())
