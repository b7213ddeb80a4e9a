"""Requantizes a .gguf with llama.cpp, in a process of its own: it ends the process where a file displeases it."""

from typing import Any

from duolocal.bench.runners.llama_cpp import quantize_q4_0
from duolocal.bench.runners.serve import serve


def _quantize(path: str, target: str, threads: int) -> dict[str, Any]:
    quantize_q4_0(path, target, threads)
    return {}


if __name__ == "__main__":
    serve({"quantize": _quantize})
