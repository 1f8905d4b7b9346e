import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
)

import qzo
from qzo.checkpoints import load as hf
from tests.support.checkpoints import quantized, relative_error, scale_randomly
from tests.support.float_models import MODELS, make
from tests.support.paths import FIXTURES, ROOT

CT = FIXTURES / "ct-w4a16-sym-g64-bias-tied"
IDS = torch.arange(24).view(2, 12)


def load(path, **options):
    return qzo.from_pretrained(path, **{"device": "cpu", "group_size": 32} | options)


def forward(model, ids=IDS):
    with torch.no_grad():
        return model(ids)[0]


@pytest.fixture
def llama(tmp_path):
    """A folder with a float Llama, random weights."""
    return make("llama-tied", tmp_path / "float")


# ------------------------------------------------------------------------------------- float sources


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_float_model_quantized_saved_and_loaded_again(tmp_path, name, symmetric):
    folder = make(name, tmp_path / "float")
    model = load(folder, symmetric=symmetric)
    assert type(model) is MODELS[name][0]
    assert len(quantized(model)) == MODELS[name][2]
    float_model = MODELS[name][0].from_pretrained(folder).eval()
    expected = copy.deepcopy(float_model)
    for layer_name, layer in quantized(model).items():
        expected.get_submodule(layer_name).weight.data = layer.dequantize()
    assert relative_error(forward(model), forward(expected)) < 2e-5  # float32 sums in another order
    assert relative_error(forward(model), forward(float_model)) < 0.35  # what 4 bits cost random weights
    scale_randomly(model)
    qzo.save_pretrained(model, tmp_path / "out")
    again = load(tmp_path / "out")
    assert type(again) is type(model)
    for layer in quantized(model).values():
        layer.arena.write(layer.arena_name, layer.read_scales().half().float())
    assert torch.equal(forward(again), forward(model))


@pytest.mark.parametrize(("group_size", "strategy", "stored"), [(32, "group", 32), (-1, "channel", None)])
def test_written_config(llama, tmp_path, group_size, strategy, stored):
    qzo.save_pretrained(load(llama, group_size=group_size, symmetric=False), tmp_path / "out")
    written, source = (json.loads((p / "config.json").read_text()) for p in (tmp_path / "out", llama))
    quantization = written.pop("quantization_config")
    assert written == source
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["format"] == "pack-quantized"
    assert quantization["quantization_status"] == "compressed"
    assert quantization["ignore"] == ["lm_head"]
    group = quantization["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    expected = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": strategy, "group_size": stored}
    assert {key: group["weights"][key] for key in expected} == expected


def test_dtype_of_the_model(llama):
    model = load(llama, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert forward(model).dtype == torch.bfloat16
    assert qzo.scales(model)["model.layers.0.mlp.up_proj"].dtype == torch.float32


def test_ready_to_train_and_copied_with_its_source(llama, tmp_path):
    for model in (load(llama), load(CT)):
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        assert len({id(layer.arena) for layer in quantized(model).values()}) == 1
        assert model.lm_head.weight is model.model.embed_tokens.weight
        reference = copy.deepcopy(model)
        scale_randomly(reference)
        qzo.save_pretrained(reference, tmp_path / "out")
        name = "model.layers.1.mlp.down_proj"
        assert torch.equal(qzo.scales(load(tmp_path / "out"))[name], qzo.scales(reference)[name].half().float())


def test_layers_never_exist_in_float(monkeypatch):
    fill, empty, buffers = hf.fill, set(), {}

    def record(model, *rest):
        empty.update(name for name, parameter in model.named_parameters() if parameter.is_meta)
        buffers.update({name: buffer.clone() for name, buffer in model.named_buffers()})
        return fill(model, *rest)

    monkeypatch.setattr(hf, "fill", record)
    model = load(CT)
    assert {name + ".weight" for name in quantized(model)} < empty
    assert buffers["model.rotary_emb.inv_freq"][0] == 1  # computed, not merely allocated


def test_generation_settings_come_along(tmp_path):
    shutil.copytree(CT, tmp_path / "ct")
    (tmp_path / "ct" / "generation_config.json").write_text('{"max_new_tokens": 7, "eos_token_id": 9}')
    model = load(tmp_path / "ct")
    assert model.generation_config.max_new_tokens == 7
    assert model.generate(IDS[:, :3], do_sample=False, max_new_tokens=2, pad_token_id=0).shape == (2, 5)


# ------------------------------------------------------------------------------------- bad input


def test_a_config_that_is_no_json(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load(tmp_path)


def test_options_that_do_not_fit(llama):
    with pytest.raises(ValueError, match=r"group_size=128 does not divide in_features=96; use 32, -1"):
        load(llama, group_size=128, strict=True)
    with pytest.raises(ValueError, match="bits=3: codes have 2, 4, 8 bits here"):
        load(llama, bits=3)


def test_model_without_linears(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"^ResNetForImageClassification has no nn\.Linear to quantize \(skip: 'lm_head', 'score', 'classifier', "
        r"'qa_outputs'\), nor a Conv1D of transformers: its matrices are in Conv2d, Linear; leave out of skip what is",
    ):
        load(tmp_path)


# ------------------------------------------------------------------------------------- imports


def test_import_is_light():
    check = """
import sys, qzo, torch
heavy = {"transformers", "tokenizers", "gguf", "huggingface_hub"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else "touched a device" if torch.cuda.is_initialized() else 0)
"""
    root = ROOT
    result = subprocess.run([sys.executable, "-c", check], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
