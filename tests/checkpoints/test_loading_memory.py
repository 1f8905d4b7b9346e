"""A float checkpoint of more than 1 GB is quantized in the memory of its result, a layer and 200 MB."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

import qzo

HIDDEN, WIDE, LAYERS, VOCABULARY = 2048, 5632, 6, 512
SCRIPT = """
import sys, torch
torch.set_num_threads(1)
import transformers.models.llama.modeling_llama
import qzo
from qzo.nn.layers import layers

def resident(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))

before = resident("VmRSS:")
model = qzo.from_pretrained(sys.argv[1], device="cpu", dtype=torch.float32)
found = layers(model).values()
held = sum(layer.codes.nbytes for layer in found) + next(iter(found)).arena.data.nbytes
dense = sum(p.nbytes for p in model.parameters())
print(held, dense, resident("VmHWM:") - before)
"""


def write_float_model(folder):
    """A Llama's folder in float32, tensor by tensor; returns the bytes of its weights."""
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        shapes |= {name + f"self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkvo"}
        shapes |= {name + f"mlp.{p}_proj.weight": (WIDE, HIDDEN) for p in ("gate", "up")}
        shapes |= {
            name + "mlp.down_proj.weight": (HIDDEN, WIDE),
            name + "input_layernorm.weight": (HIDDEN,),
            name + "post_attention_layernorm.weight": (HIDDEN,),
        }
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    noise = np.random.default_rng(0).normal(0, 0.02, WIDE * HIDDEN).astype(np.float32)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            file.write(noise[: int(np.prod(shape))].tobytes())
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "hidden_size": HIDDEN,
                "intermediate_size": WIDE,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": 16,
                "vocab_size": VOCABULARY,
                "dtype": "float32",
            }
        )
    )
    return at


def test_a_float_gigabyte_is_loaded_in_the_memory_of_its_int4_size(tmp_path):
    size = write_float_model(tmp_path)
    assert size > 1e9
    root = Path(qzo.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held, dense, grown = map(int, done.stdout.split())
    assert held < size / 7
    layer = 4 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * WIDE)
    assert grown < held + dense + layer + 200e6, f"{grown / 1e6:.0f} MB grown, {(held + dense) / 1e6:.0f} held"
    print(f"{grown / 1e6:.0f} MB grown, {(held + dense) / 1e6:.0f} held")
