"""Memory while loading, measured in a process of its own: matrices stay in the file, nothing is dequantized."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

# Allocator slack, the samples of the fingerprint, Python objects for keys and tokens.
SLACK_BYTES = 24 << 20

CHILD = """
import json, sys
import torch
from duolocal.models.loader import open_model

torch.set_num_threads(1)

def measure():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {key: int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "VmHWM")}

names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
torch.ones(8, 8) @ torch.ones(8, 8)
before = measure()
source = open_model(sys.argv[1])
weights = source.load()
loaded = measure()
held = sum(getattr(layer, name).weight.nbytes for layer in weights.layers for name in names)
held += weights.embedding.nbytes
for layer in weights.layers:
    matrices = [getattr(layer, name).weight.dequantize(torch.float32) for name in names]
    layer_bytes = sum(matrix.nbytes for matrix in matrices)
    del matrices
used = measure()
gathered = sum(getattr(layer, name).weight.nbytes for layer in weights.layers for name in ("q_proj", "k_proj"))
print(json.dumps({
    "size": source.size_bytes,
    "held": held,
    "gathered": gathered,
    "layer": layer_bytes,
    "private": loaded["RssAnon"] - before["RssAnon"],
    "peak_loading": loaded["VmHWM"] - before["VmHWM"],
    "peak_using": used["VmHWM"] - before["VmHWM"],
}))
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc (Linux)")


def measure(path: Path) -> dict[str, int]:
    root = Path(__file__).resolve().parent.parent
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(path)], env=environment, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


def many_shards(folder: Path, *, hidden: int = 512, inner: int = 1536, num_layers: int = 12, vocab: int = 8192) -> None:
    """Write a bf16 llama of about 96 MB in one shard per layer and one for the rest."""
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": vocab,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    weight_map: dict[str, str] = {}

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name)
        weight_map.update(dict.fromkeys(tensors, name))

    save("rest.safetensors", {"model.embed_tokens.weight": zeros(vocab, hidden), "model.norm.weight": zeros(hidden)})
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    for layer in range(num_layers):
        tensors = {f"model.layers.{layer}.{name}.weight": zeros(*shape) for name, shape in shapes.items()}
        save(f"layer{layer}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_folder_of_many_shards(tmp_path: Path):
    many_shards(tmp_path)
    found = measure(tmp_path)
    assert found["size"] > 3 * SLACK_BYTES  # else the limits below would say little
    assert found["held"] < found["size"]
    assert found["private"] < SLACK_BYTES  # all matrices are views of the files
    assert found["peak_loading"] < found["size"] + found["layer"]
    assert found["peak_using"] < found["size"] + found["layer"] + SLACK_BYTES


@pytest.mark.real
def test_the_real_gguf(smollm2_path: Path):
    found = measure(smollm2_path)
    assert found["private"] < found["gathered"] + SLACK_BYTES  # only Q and K, whose rows are put in order, are copied
    assert found["peak_loading"] < found["size"] + found["layer"]  # pages of the file that were touched included
    assert found["peak_using"] < found["size"] + found["gathered"] + found["layer"] + SLACK_BYTES
