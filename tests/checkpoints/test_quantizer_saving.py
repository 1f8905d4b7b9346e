"""transformers' save_pretrained around QZOLinear: the source's bytes, new scales, shards, names."""

import copy
import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming

import qzo
from qzo.nn.layers import layers
from tests.support.checkpoints import scale_randomly
from tests.support.front_door import (
    FIXTURES,
    FOLDERS,
    GPTQ,
    MODELS,
    config_of,
    load,
    logits,
    make,
    quantize,
    same,
    same_layers,
    tensors_of,
)
from tests.support.gptq_checkpoints import write_gptq


@pytest.mark.parametrize("with_qzo", [False, True])
@pytest.mark.parametrize("name", FOLDERS)
def test_saving_writes_the_sources_bytes_and_new_scales(tmp_path, name, with_qzo):
    source = FIXTURES / name
    model = qzo.from_pretrained(source, device="cpu") if with_qzo else load(source)
    model.save_pretrained(tmp_path / "same")
    same(tensors_of(tmp_path / "same"), tensors_of(source))
    assert config_of(tmp_path / "same")["quantization_config"] == config_of(source)["quantization_config"]
    scale_randomly(model, keep=0.5)
    model.save_pretrained(tmp_path / "tuned")
    qzo.save_pretrained(model, tmp_path / "by-qzo")
    got = tensors_of(tmp_path / "tuned")
    same(got, tensors_of(tmp_path / "by-qzo"))
    changed = {name for name, tensor in tensors_of(source).items() if not torch.equal(got[name], tensor)}
    assert {name.rpartition(".")[2] for name in changed} <= {"scales", "weight_scale"}
    assert len(changed) == len(layers(model))


@pytest.mark.parametrize("name", MODELS)
def test_a_float_source_is_saved_as_compressed_tensors(tmp_path, name):
    folder = make(name, tmp_path / "float")
    model = quantize(folder, symmetric=name != "qwen2-bias")
    scale_randomly(model)
    model.save_pretrained(tmp_path / "out")
    assert config_of(tmp_path / "out")["quantization_config"]["quant_method"] == "compressed-tensors"
    want = qzo.from_pretrained(folder, device="cpu", group_size=32, symmetric=name != "qwen2-bias")
    scale_randomly(want)
    for save, out in ((qzo.save_pretrained, "by-qzo"), (type(want).save_pretrained, "want")):
        save(want, tmp_path / out)
        same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / out))
        assert config_of(tmp_path / "out")["quantization_config"] == config_of(tmp_path / out)["quantization_config"]
    qzo.save_pretrained(model, tmp_path / "model-by-qzo")
    same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "model-by-qzo"))
    for layer in layers(model).values():
        layer.arena.write(layer.arena_name, layer.read_scales().half().float())
    again = qzo.from_pretrained(tmp_path / "out", device="cpu", dtype=torch.bfloat16)
    same_layers(again, model)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_a_float_source_on_a_table_is_saved_as_bitsandbytes(tmp_path):
    model = qzo.from_pretrained(make("llama", tmp_path / "float"), device="cpu", group_size=32, table="nf4")
    scale_randomly(model)
    model.save_pretrained(tmp_path / "out")
    qzo.save_pretrained(model, tmp_path / "by-qzo")
    same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "by-qzo"))
    assert config_of(tmp_path / "out")["quantization_config"]["quant_method"] == "bitsandbytes"


def test_a_config_in_a_file_of_its_own_is_written_to_config_json(tmp_path):
    """AutoGPTQ's first folders have it in quantize_config.json only, where transformers does not look."""
    write_gptq(tmp_path / "in")
    config = config_of(tmp_path / "in")
    quantization = config.pop("quantization_config")
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    (tmp_path / "in" / "quantize_config.json").write_text(json.dumps(quantization))
    model = qzo.from_pretrained(tmp_path / "in", device="cpu", dtype=torch.float16)
    model.save_pretrained(tmp_path / "out")
    same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "in"))
    assert config_of(tmp_path / "out")["quantization_config"] == quantization
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))
    with pytest.raises(ValueError, match="the checkpoint holds no 4-bit linear layer of this model"):
        quantize(tmp_path / "in")


def test_transformers_reads_what_is_saved(tmp_path):
    pytest.importorskip("compressed_tensors", reason="the compressed-tensors library is not installed")
    model = quantize(make("llama", tmp_path / "float"), dtype=torch.float32)
    model.save_pretrained(tmp_path / "out")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert not layers(other, trainable=None)
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-4)


def test_shards_and_copies(tmp_path):
    model = copy.deepcopy(load(GPTQ))
    scale_randomly(model)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    model.save_pretrained(tmp_path / "one")
    same(tensors_of(tmp_path / "shards"), tensors_of(tmp_path / "one"))
    again = load(tmp_path / "shards")
    assert torch.equal(logits(again), logits(load(tmp_path / "one")))
    again.save_pretrained(tmp_path / "again")
    same(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "one"))


def test_a_changed_dense_tensor_is_saved_and_tied_ones_once(tmp_path):
    model = qzo.from_pretrained(FIXTURES / "ct-w4a16-sym-g64-bias-tied", device="cpu")
    model.model.norm.weight.data *= 2
    bias = next(name for name in model.state_dict() if name.endswith("proj.bias"))
    model.get_parameter(bias).data += 1
    model.save_pretrained(tmp_path)
    got, source = tensors_of(tmp_path), tensors_of(FIXTURES / "ct-w4a16-sym-g64-bias-tied")
    assert set(got) == set(source)
    for name in ("model.norm.weight", bias):
        assert torch.equal(got.pop(name), model.get_parameter(name))
        del source[name]
    same(got, source)


def test_names_of_a_model_that_qzo_loaded_are_the_files(tmp_path, monkeypatch):
    """transformers would give some architectures' tensors the names of older files."""
    model = qzo.from_pretrained(GPTQ, device="cpu")
    monkeypatch.setattr(
        conversion_mapping, "get_model_conversion_mapping", lambda *_, **__: [WeightRenaming("old_norm", "model.norm")]
    )
    model.save_pretrained(tmp_path)
    same(tensors_of(tmp_path), tensors_of(GPTQ))


def test_biases_of_zeros_that_the_model_lacks_come_along(tmp_path):
    def add_biases(tensors):
        tensors |= {
            name.replace("scales", "bias"): torch.zeros(t.shape[1], dtype=torch.float16)
            for name, t in tensors.items()
            if name.endswith("scales")
        }

    write_gptq(tmp_path / "in", change=add_biases)
    qzo.from_pretrained(tmp_path / "in", device="cpu").save_pretrained(tmp_path / "out")
    same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "in"))
