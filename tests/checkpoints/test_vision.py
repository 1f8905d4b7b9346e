"""Vision-language models: float folders quantized on the way in, older names of tensors, saving under them."""

import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import revert_weight_conversion

import qzo
from qzo.cli.main import main
from qzo.nn.layers import layers
from tests.support.close import assert_same_bits
from tests.support.vision_models import MODELS, build

IDS = torch.arange(3, 15)[None]
EIGHT_BITS = 0.03  # of the largest logit: rounding every weight to 8 bits; a wrong tensor gives more than 0.3
OLDER = ("Llava", "LlavaNext", "VideoLlava", "Qwen2VL", "PaliGemma", "Gemma3", "InternVL", "Mistral3", "Mllama")


def load(path, **options):
    return qzo.from_pretrained(path, device="cpu", **options)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def same_state(got, want):
    got, want = got.state_dict(), want.state_dict()
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert_same_bits(got[name], tensor)


def tensors(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("name", MODELS)
def test_a_float_folder_is_quantized_on_the_way_in(tmp_path, name, tied):
    model = build(name, tied)
    model.save_pretrained(tmp_path / "float")
    got = load(tmp_path / "float", bits=8, group_size=32)
    want = logits(model)
    assert float((logits(got) - want).abs().max()) < EIGHT_BITS * float(want.abs().max())
    assert got.all_tied_weights_keys == model.all_tied_weights_keys
    assert not any(name.endswith("lm_head") for name in layers(got))
    qzo.save_pretrained(got, tmp_path / "out")
    again = load(tmp_path / "out")
    assert set(layers(again)) == set(layers(got))
    assert float((logits(again) - logits(got)).abs().max()) < 1e-4 * float(want.abs().max())


def older(name, tmp_path):
    """(a quantized folder by the names that published ones have, a model of the same folder by the new names)."""
    model = build(name, False)
    model.save_pretrained(tmp_path / "float")
    qzo.save_pretrained(load(tmp_path / "float", group_size=32), tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    new = load_file(tmp_path / "new/model.safetensors")
    old = {name: t.contiguous() for name, t in revert_weight_conversion(model, new).items()}
    assert set(old) - set(new)
    save_file(old, tmp_path / "old/model.safetensors", {"format": "pt"})
    return tmp_path / "old", load(tmp_path / "new")


@pytest.mark.parametrize("name", OLDER)
def test_older_names_are_found(tmp_path, name):
    folder, want = older(name, tmp_path)
    model = load(folder)
    same_state(model, want)
    with qzo.loading():
        same_state(type(model).from_pretrained(folder, dtype=torch.float32), want)
    qzo.save_pretrained(model, tmp_path / "same")
    assert (tmp_path / "same/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    model.save_pretrained(tmp_path / "by-transformers")
    got, stored = tensors(tmp_path / "by-transformers"), tensors(folder)
    assert set(got) == set(stored)
    for key, tensor in stored.items():
        assert_same_bits(got[key], tensor)


@pytest.mark.parametrize("by_transformers", [False, True])
def test_an_export_has_the_new_names_everywhere(tmp_path, by_transformers):
    folder, want = older("LlavaOnevision", tmp_path)
    if by_transformers:
        with qzo.loading():
            model = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    else:
        model = load(folder)
    qzo.export(model, tmp_path / "gptq", "gptq")
    same_state(load(tmp_path / "gptq"), want)
    stored = {name.rpartition(".")[0] for name in tensors(tmp_path / "gptq")}
    assert stored == {name.rpartition(".")[0] for name in tensors(tmp_path / "new")}
    skipped = json.loads((tmp_path / "gptq/config.json").read_text())["quantization_config"]["dynamic"]
    dense = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not n.endswith("lm_head")]
    assert set(skipped) == {f"-:^{re.escape(name)}$" for name in dense}
    assert "model.vision_tower.head.attention.out_proj" in dense
    report = qzo.save_pretrained(model, tmp_path / "out", batch={"input_ids": IDS, "labels": IDS})
    assert report["loss_before"] == report["loss_after"]


def test_older_names_in_inspect(tmp_path, capsys):
    folder, want = older("Llava", tmp_path)
    assert main(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trains"]["layers"] == len(layers(want))


def test_a_float_folder_by_older_names_is_streamed(tmp_path, monkeypatch):
    """No transformers model in floats: each weight is quantized when it is read."""
    build("Llava", False).save_pretrained(tmp_path / "float")
    assert "language_model.lm_head.weight" in tensors(tmp_path / "float")
    want = load(tmp_path / "float", group_size=32)
    monkeypatch.setattr(transformers.LlavaForConditionalGeneration, "from_pretrained", None)
    same_state(load(tmp_path / "float", group_size=32), want)


def test_a_linear_of_another_class_stays_as_it_is():
    """Llama 4's router is one that gives two tensors; nn.MultiheadAttention reads the weight of its own."""
    module = torch.nn.ModuleDict(
        {"attention": torch.nn.MultiheadAttention(64, 2, batch_first=True), "plain": torch.nn.Linear(64, 64)}
    )
    x = torch.randn(1, 3, 64)
    want = module["attention"](x, x, x)[0]
    qzo.quantize_(module, group_size=32)
    assert_same_bits(module["attention"](x, x, x)[0].detach(), want.detach())
    assert list(layers(module)) == ["plain"]
