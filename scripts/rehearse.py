"""Rehearse the headline job without the hub: fetch, plan, load and chat with a checkpoint of random numbers.

    .venv/bin/python scripts/rehearse.py [--size full|small] [--folder FOLDER] [--tokens N]

Writes a checkpoint in the layout of the AWQ repository of `llama3-8b-awq` (AutoAWQ GEMM, groups of 128, two shards and
their index, a tokenizer of the same kind), serves it from 127.0.0.1 to the real hub client together with a head
pattern, and runs `chat.py` with an empty cache: fetch, plan, load, blocks in a file, a short document, an answer, a
saved session, and that session reopened twice. Weights, pattern and answers are random; speeds and memory are those of
the shapes. "small" keeps the layers and heads, which the published pattern has to fit, and shrinks the rest.

Prints the plan beside the peak memory of the process (Linux), and as its last line one JSON object. Everything lies
below FOLDER and is removed at the end: full size takes 31 GB of disk, 7 GB of memory and some minutes.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from string import ascii_lowercase
from typing import Any
from urllib.parse import unquote

os.environ.setdefault("OMP_PROC_BIND", "true")  # two threads on one core would take forty times as long

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor

from duolocal.bench.first_prompt import can_measure, first_prompt_s
from duolocal.bench.machine import machine_facts
from duolocal.heads.known import pattern_called
from duolocal.heads.pattern import HeadPattern
from duolocal.heads.published import write_published
from duolocal.models.assemble import Role, layer_roles, outer_roles
from duolocal.models.config import ModelConfig
from duolocal.models.names import MODELS
from duolocal.models.safetensors_folder import hf_module
from duolocal.models.synthetic import RandomTensors
from duolocal.plan.memory import GIB, TOKEN_ID_BYTES
from duolocal.plan.weights import AWQ_GROUP
from duolocal.quant.awq import AWQWeight
from duolocal.quantize.model_config import config_to_hf, quantization_config
from duolocal.sample_text import sample_text

ROOT = Path(__file__).parents[1]
NAME = "llama3-8b-awq"
PATTERN = pattern_called("Llama-3-8B-Instruct-Gradient-1048k")
COMMIT = "0" * 40
CPU = torch.device("cpu")
SHARD_BYTES = 5_000_000_000  # as AutoAWQ cuts them
POLL_S = 0.02
# Llama 3's tokenizer: what it splits at, its special tokens by their place behind the others, its chat template.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPECIAL = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
NUM_SPECIAL = 256
TEMPLATE = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """A rehearsal: the model's shapes, the context, and memory for blocks, which the document is longer than."""

    config: ModelConfig
    context: str
    kv_device_memory: str
    max_tokens: int


_FULL = MODELS[NAME].config
SIZES = {
    "full": Size(_FULL, "1M", "24MiB", 16),
    "small": Size(replace(_FULL, head_dim=32, intermediate_size=512, vocab_size=2048), "64K", "4MiB", 8),
}


def write_checkpoint(folder: Path, config: ModelConfig) -> None:
    """Write a checkpoint of random numbers, in AutoAWQ's layout, that says so in its README."""
    folder.mkdir(parents=True)
    first = config.vocab_size - NUM_SPECIAL
    config = replace(config, bos_id=first, eos_ids=(first + 1,))
    raw = {**config_to_hf(config, "config.json"), "torch_dtype": "float16"}
    raw["quantization_config"] = quantization_config(AWQ_GROUP)
    generation = {"bos_token_id": first, "eos_token_id": [first + 1, first + 9]}
    texts = {
        "config.json": json.dumps(raw, indent=2),
        "generation_config.json": json.dumps(generation, indent=2),
        "README.md": f"Random numbers in the shapes of {NAME}, for a rehearsal: it answers nothing.\n",
    }
    for name, text in (texts | tokenizer_files(config.vocab_size)).items():
        (folder / name).write_text(text, encoding="utf-8")
    write_shards(folder, config)


def tokenizer_files(vocab_size: int) -> dict[str, str]:
    """Return a tokenizer like Llama 3's with merges of its own: bytes, then beginnings of words, the shorter first."""
    plain = vocab_size - NUM_SPECIAL
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    words = deque("Ġ")
    while len(tokens) < plain:
        begun = words.popleft()
        for letter in ascii_lowercase[: plain - len(tokens)]:
            merges.append((begun, letter))
            words.append(begun + letter)
            tokens.append(begun + letter)
    special = [f"<|{SPECIAL.get(index, f'reserved_special_token_{index}')}|>" for index in range(NUM_SPECIAL)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    bos = {"SpecialToken": {"id": special[0], "type_id": 0}}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": plain + i, "content": token, **flags} for i, token in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
                byte_level,
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {special[0]: {"id": special[0], "ids": [plain], "tokens": [special[0]]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    settings = {"bos_token": special[0], "eos_token": special[9], "chat_template": TEMPLATE}
    return {"tokenizer.json": json.dumps(described), "tokenizer_config.json": json.dumps(settings)}


def write_shards(folder: Path, config: ModelConfig) -> None:
    """Write the weights in the order and the files of AutoAWQ; a shard is in memory while it is made."""
    embedding, *others = outer_roles(config)
    layers = [role for layer in range(config.num_layers) for role in layer_roles(config, layer)]
    shard: dict[str, Tensor] = {}
    written: list[list[str]] = []  # names of tensors, by shard
    total = 0

    def write() -> None:
        save_file(shard, folder / f"{len(written)}.part", metadata={"format": "pt"})
        written.append(list(shard))
        shard.clear()

    source = RandomTensors("AWQ", "F16", group_size=AWQ_GROUP, device=CPU)
    for role in (embedding, *layers, *others):
        made = random_tensors(source, role)
        if sum(tensor.nbytes for tensor in (shard | made).values()) > SHARD_BYTES:
            write()
        shard |= made
        total += sum(tensor.nbytes for tensor in made.values())
    write()
    weight_map: dict[str, str] = {}
    for index, tensors in enumerate(written):
        name = f"model-{index + 1:05}-of-{len(written):05}.safetensors"
        (folder / f"{index}.part").rename(folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    listed = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listed, indent=2), encoding="utf-8")


def random_tensors(source: RandomTensors, role: Role) -> dict[str, Tensor]:
    """Return what AutoAWQ writes for a role, by name: float16, or the three parts of a quantized matrix."""
    module = hf_module(role)
    if len(role.shape) == 1:
        return {f"{module}.weight": source.vector(role, CPU, torch.float16)}
    weight = source.weight(role, CPU)
    if isinstance(weight, AWQWeight):
        return {f"{module}.{part}": getattr(weight, part) for part in ("qweight", "qzeros", "scales")}
    return {f"{module}.weight": weight.dequantize(torch.float16)}


def write_pattern(folder: Path, config: ModelConfig) -> None:
    """Write a head pattern of random scores in the published layout."""
    draw = random.Random(0).random
    scores = tuple(tuple(draw() for _ in range(config.num_kv_heads)) for _ in range(config.num_layers))
    write_published(HeadPattern(scores, sink_size=64, recent_size=256, default_ratio=0.5, source="random"), folder)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve folder/hub as the repository and folder/patterns as files, on 127.0.0.1; yield the address."""
    repo = re.escape(MODELS[NAME].repo or "")

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0])
            files = {file.name: file for file in (folder / "hub").iterdir()}
            if found := re.fullmatch(rf"/api/models/{repo}(?:/(revision|tree)/[^/]+)?", path):
                sizes = {name: file.stat().st_size for name, file in files.items()}
                tree = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()]
                siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
                about = {"id": MODELS[NAME].repo, "sha": COMMIT, "siblings": siblings}
                self.text(json.dumps(tree if found[1] == "tree" else about))
            elif (found := re.fullmatch(rf"/{repo}/resolve/[^/]+/([^/]+)", path)) and found[1] in files:
                self.file(files[found[1]])
            elif (found := re.fullmatch(r"/patterns/(.+)", path)) and (folder / path[1:]).is_file():
                self.text((folder / path[1:]).read_text(encoding="utf-8"))
            else:
                self.send_error(404)

        def text(self, body: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        def file(self, path: Path) -> None:
            size = path.stat().st_size
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(asked[1]) if asked else 0
            self.send_response(206 if asked else 200)
            for name, value in (
                ("ETag", f'"{path.name}"'),
                ("X-Repo-Commit", COMMIT),
                ("Accept-Ranges", "bytes"),
                ("Content-Range", f"bytes {start}-{size - 1}/{size}"),
                ("Content-Length", str(size - start)),
            ):
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                with path.open("rb") as file:
                    file.seek(start)
                    shutil.copyfileobj(file, self.wfile, 1 << 20)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@dataclass(frozen=True)
class Ran:
    """What a command printed as JSON, what it took, and the most memory it had resident (None: not told here)."""

    report: dict[str, Any]
    elapsed_s: float
    peak_bytes: int | None


def run(words: Sequence[str], *, good: Sequence[int] = (0,)) -> Ran:
    """Run a command, its stderr shown as it comes, and watch its memory. Raises SystemExit where it fails."""
    print(f"$ {' '.join(words)}", flush=True)
    began_s, peak = time.perf_counter(), None
    with subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines: list[str] = []
        reading = threading.Thread(target=lambda: lines.extend(process.stdout or ()))
        reading.start()
        while process.poll() is None:
            with suppress(OSError):
                found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
                peak = int(found[1]) * 1024 if found else peak
            time.sleep(POLL_S)
        reading.join()
    if process.returncode not in good:
        raise SystemExit(f"exit code {process.returncode}")
    return Ran(json.loads("".join(lines)), time.perf_counter() - began_s, peak)


def set_environment(folder: Path, url: str) -> None:
    """Set the environment of what is run: everything is empty, below `folder`, and the server is the only network."""
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE_", "DUOLOCAL_"))]:
        del os.environ[name]
    os.environ |= {
        "HF_ENDPOINT": url,
        "HF_HOME": str(folder / "hf"),
        "DUOLOCAL_CACHE": str(folder / "cache"),
        "DUOLOCAL_SESSIONS": str(folder / "sessions"),
        "DUOLOCAL_HEAD_PATTERNS": f"{url}/patterns",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
    }


def rehearse(size: Size, folder: Path, *, num_tokens: int) -> dict[str, Any]:
    """Make the checkpoint, serve it, and run the job; return what came of it."""
    began_s = time.perf_counter()
    write_checkpoint(folder / "hub", size.config)
    write_pattern(folder / "patterns" / PATTERN.folder, size.config)
    file_bytes = sum(file.stat().st_size for file in (folder / "hub").glob("*.safetensors"))
    print(f"made {file_bytes / 1e9:.2f} GB of random weights in {time.perf_counter() - began_s:.0f} s", flush=True)
    document = folder / "document.txt"
    document.write_text(sample_text()[: 2 * num_tokens], encoding="utf-8")  # with few merges a token is two letters
    load = ["--model", NAME, "--context", size.context, "--kv", "int4", "--kv-device-memory", size.kv_device_memory]
    ask = ["--temperature", "0", "--max-tokens", str(size.max_tokens), "--json", "--session", "rehearsal"]
    with served(folder) as url:
        set_environment(folder, url)
        question = ["--doc", str(document), "--prompt", "What is this about?"]
        first = run(["chat.py", *load, *question, *ask], good=(0, 3))
    planning = run(["-m", "duolocal", "plan", *load, "--json", "--no-measure"])
    again = run(["chat.py", *load, "--prompt", "And what else?", *ask], good=(0, 3))
    words = [*load, "--session", "rehearsal"]
    prompt_s = first_prompt_s(words) if can_measure() else None
    return result(size, first, planning, again, prompt_s)


def result(size: Size, first: Ran, planning: Ran, again: Ran, prompt_s: float | None) -> dict[str, Any]:
    """Return the figures.

    expected: of the plan what a short document reaches, as of the embedding the rows of its tokens are read and few ids
    are kept; and beside the plan a copy of all windows for each turn that can be gone back to. The bytes of a process
    before it has a model are those that planning took, which loads the same libraries.
    """
    config, plan = size.config, planning.report
    device = plan["device_bytes"]
    unread = config.vocab_size * config.hidden_size * 2 + plan["context"] * TOKEN_ID_BYTES
    reached = plan["needed_bytes"] - device["process"] + (planning.peak_bytes or device["process"]) - unread
    windows = device["retrieval_windows"] + device["streaming_windows"]

    def memory(ran: Ran, *, turns: int) -> dict[str, Any]:
        expected = reached + turns * windows
        ratio = None if ran.peak_bytes is None else round(expected / ran.peak_bytes, 3)
        return {"expected_bytes": expected, "peak_bytes": ran.peak_bytes, "expected_over_peak": ratio}

    timings, tokens = first.report["timings"], first.report["tokens"]
    return {
        "model": NAME,
        "weights": "random",
        "context": plan["context"],
        "retrieval_heads": plan["retrieval_heads"],
        "kv": plan["kv"],
        "blocks_in_memory": plan["blocks_on_device"],
        "plan_bytes": plan["needed_bytes"],
        "plan_disk_bytes": plan["disk_bytes"],
        **memory(first, turns=2),  # the document and the answer
        **{f"reopened_{name}": value for name, value in memory(again, turns=3).items()},
        "total_s": round(first.elapsed_s, 1),
        "load_s": timings["load_s"],
        "prompt_tokens": tokens["prompt"],
        "prefill_tokens_per_s": timings["prefill_tokens_per_s"],
        "decode_tokens_per_s": timings["decode_tokens_per_s"],
        "reopened_prompt_tokens": again.report["tokens"]["prompt"],
        "reopened_context_tokens": again.report["tokens"]["context"],
        "reopened_load_s": again.report["timings"]["load_s"],
        "first_prompt_s": None if prompt_s is None else round(prompt_s, 1),
        "machine": machine_facts(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--size", choices=SIZES, default="full", help="true shapes, or reduced ones (default: full)")
    parser.add_argument("--folder", type=Path, help="an empty or absent folder for everything (default: a temporary)")
    parser.add_argument("--tokens", type=int, default=700, help="of the document, about (default: 700)")
    options = parser.parse_args()
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="rehearsal-", dir=options.folder) as made:
        found = rehearse(SIZES[options.size], Path(made), num_tokens=options.tokens)
    for name, value in found.items():
        if name.endswith("_bytes") and value is not None:
            print(f"{name.removesuffix('_bytes').replace('_', ' '):28}{value / GIB:>10.3f} GiB")
        elif name != "machine":
            print(f"{name.replace('_', ' '):28}{value!s:>10}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
