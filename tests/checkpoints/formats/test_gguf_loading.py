"""GGUF models loaded in little memory, and exported to other formats."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import qzo
from qzo.checkpoints.formats.gguf import weights
from qzo.checkpoints.formats.gguf_file import GGUFFile
from tests.checkpoints.formats.test_gguf_models import CASES, encode, finish, load, logits, original, write
from tests.support.checkpoints import TYPES, blocks, relative_error


@pytest.mark.parametrize("kind", [TYPES.Q4_1, TYPES.Q8_0, TYPES.Q5_0])
def test_wide_tensors_are_read_in_blocks_of_rows(tmp_path, kind):
    rows, width = 40, 65536  # 16 rows a block
    data = encode(np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32), kind)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(32, np.float32))
    writer.add_tensor("blk.0.ffn_up.weight", data, raw_dtype=kind)
    writer.add_tensor(
        "blk.0.ffn_down.weight", blocks((1, 32), TYPES.Q4_0, np.random.default_rng(1)), raw_dtype=TYPES.Q4_0
    )
    finish(writer)
    _, (_, weight, _), _ = weights(GGUFFile(tmp_path / "m.gguf"), torch.float32)
    got = weight if kind == TYPES.Q5_0 else weight.dequantize()
    torch.testing.assert_close(got, torch.from_numpy(gguf.dequantize(data, kind)), rtol=0, atol=1e-6)


LOADING = """
import sys, torch, qzo, transformers
from transformers import LlamaForCausalLM, AutoModelForCausalLM
from qzo.reports.footprint import weights_bytes

def resident(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))

torch.set_num_threads(1)
torch.nn.Linear(8, 8)(torch.ones(1, 8))
before = resident("VmRSS")
model = qzo.from_pretrained(sys.argv[1], device="cpu")
print(sum(weights_bytes(model, "cpu").values()), resident("VmHWM") - before)
"""


def test_a_load_takes_little_more_than_the_model(tmp_path):
    """A layer and 200 MB are allowed whatever the model. The holes that temporaries leave between tensors
    grow with it: here they would make over 80 MB of the 35."""
    hidden, layers, vocabulary = 1024, 16, 16000
    rng, path = np.random.default_rng(0), tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "context_length": 64,
        "embedding_length": hidden,
        "feed_forward_length": 4 * hidden,
        "block_count": layers,
        "attention.head_count": 8,
    }.items():
        writer.add_uint32("llama." + key, value)
    writer.add_layer_norm_rms_eps(1e-5)
    wide = 4 * hidden
    shapes = {"ffn_gate": (wide, hidden), "ffn_up": (wide, hidden), "ffn_down": (hidden, wide)}
    shapes |= {name: (hidden, hidden) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    stored = {name: blocks(shape, TYPES.Q4_0, rng) for name, shape in shapes.items()}
    embedding = gguf.quantize(rng.normal(size=(vocabulary, hidden)).astype(np.float32), TYPES.Q8_0)
    writer.add_tensor("token_embd.weight", embedding, raw_dtype=TYPES.Q8_0)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(layers):
        for name, data in stored.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", data, raw_dtype=TYPES.Q4_0)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(hidden, np.float32))
    finish(writer)
    root = Path(qzo.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", LOADING, path], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held, peak = map(int, done.stdout.split())
    assert held < peak < held + 60e6


# ------------------------------------------------------------------------------------------ other formats


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama3", TYPES.Q4_0),
        ("qwen3", TYPES.Q4_0),
        ("gemma2", TYPES.Q8_0),
        ("gemma3", TYPES.Q4_0),
        ("phi3-long", TYPES.Q4_0),
    ],
)
def test_export(name, kind, tmp_path):
    case = dataclasses.replace(CASES[name], kinds=(kind,))
    model = original(case)
    write(tmp_path / "m.gguf", case, model)
    ours = load(tmp_path / "m.gguf")
    qzo.export(ours, tmp_path / "ct", format="compressed-tensors")
    exported = load(tmp_path / "ct")
    for layer, scales in qzo.scales(ours).items():
        assert torch.equal(scales, qzo.scales(exported)[layer]), layer
    # dense tensors of the folder are float16, which random weights enlarge
    assert relative_error(logits(exported), logits(ours)) < 2e-2
