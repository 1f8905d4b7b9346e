"""Vision-language folders as GPTQModel, AutoAWQ, llm-compressor and bitsandbytes name and describe them."""

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import qzo
from qzo.checkpoints.formats import compressed_tensors
from qzo.nn.layers import layers
from tests.checkpoints.test_vision import same_state
from tests.support.checkpoints import change_config, scale_randomly
from tests.support.gptq_checkpoints import contents
from tests.support.vision_models import build

FORMATS = {"gptq": "scales", "awq": "scales", "compressed-tensors": "weight_scale", "bitsandbytes": "absmax"}
BATCH = {"input_ids": torch.arange(3, 15)[None], "labels": torch.arange(3, 15)[None]}
# (model, prefix now, prefix in older files)
OLDER = {
    "Llava": [
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.", ""),
    ],
    "Qwen2VL": [(r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model.")],
    "Gemma3": [
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.", ""),
    ],
}


def load(path, **options):
    return qzo.from_pretrained(path, device="cpu", **options)


def older(name, key):
    for now, then in OLDER[name]:
        renamed = re.sub(now, then, key)
        if renamed != key:
            return renamed
    return key


def made(tmp_path, name, form, old, nested):
    """A quantized folder of the model; old: with the names that older files have; nested: its quantization_config
    stands in its text_config."""
    build(name, False).save_pretrained(tmp_path / "float")
    table = "nf4" if form == "bitsandbytes" else None
    model = load(tmp_path / "float", group_size=32, table=table)
    qzo.export(model, tmp_path / "in", form)
    file = tmp_path / "in/model.safetensors"
    if old:
        tensors = load_file(file)
        renamed = {older(name, key): t for key, t in tensors.items()}
        assert len(renamed) == len(tensors)
        assert set(renamed) != set(tensors)
        save_file(renamed, file, {"format": "pt"})
    if nested:
        change_config(
            tmp_path / "in", lambda c: c["text_config"].update(quantization_config=c.pop("quantization_config"))
        )
    return tmp_path / "in", model


@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", OLDER)
def test_it_loads_trains_on_text_and_is_saved_byte_for_byte(tmp_path, name, form, old, nested):
    folder, want = made(tmp_path, name, form, old, nested)
    model = load(folder)
    assert len(layers(model)) == 14
    assert all(layer.startswith("model.language_model.layers.") for layer in layers(model))
    same_state(model, want)
    qzo.save_pretrained(model, tmp_path / "same")
    assert contents(tmp_path / "same") == contents(folder)
    before = qzo.scales(model)
    qzo.QZO(model, lr=1e-2, directions=2).step(lambda: qzo.losses(model, BATCH, 4))
    assert all(not torch.equal(scales, before[layer]) for layer, scales in qzo.scales(model).items())
    scale_randomly(model)
    qzo.save_pretrained(model, tmp_path / "tuned")
    stored, tuned = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "tuned"))
    assert set(tuned) == set(stored)
    moved = {key.rpartition(".")[2] for key in stored if not torch.equal(stored[key], tuned[key])}
    assert moved == {FORMATS[form]}
    again = load(tmp_path / "tuned")
    assert all(torch.equal(layer.codes, layers(model)[key].codes) for key, layer in layers(again).items())


def test_what_tools_say_of_a_vision_tower_that_stays_dense(tmp_path):
    """llm-compressor names it by patterns in `ignore`, GPTQModel in `dynamic`, AutoAWQ as modules_to_not_convert."""
    said = {
        "gptq": {"dynamic": {"-:^model\\.visual": {}, "-:.*merger": {}}},
        "awq": {"modules_to_not_convert": ["visual", "lm_head"]},
        "compressed-tensors": {"ignore": ["re:.*lm_head", "re:.*visual.*"]},
        "bitsandbytes": {"llm_int8_skip_modules": ["visual", "lm_head"]},
    }
    for form, changes in said.items():
        place = tmp_path / form
        place.mkdir()
        folder, want = made(place, "Qwen2VL", form, True, False)
        change_config(folder, lambda c, changes=changes: c["quantization_config"].update(changes))
        same_state(load(folder), want)


@pytest.mark.parametrize("form", ["gptq", "awq", "compressed-tensors"])
def test_transformers_own_way(tmp_path, form):
    folder, want = made(tmp_path, "Qwen2VL", form, True, False)
    with qzo.loading():
        model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    same_state(model, want)
    model.save_pretrained(tmp_path / "again")
    got, stored = (load_file(path / "model.safetensors") for path in (tmp_path / "again", folder))
    assert set(got) == set(stored)
    assert all(torch.equal(got[key], tensor) for key, tensor in stored.items())


def test_weights_of_attention_that_cannot_be_replaced_are_refused(tmp_path):
    """nn.MultiheadAttention reads its out_proj's weight: a tool that quantizes it writes what no reader can run."""
    build("Gemma3", False).save_pretrained(tmp_path / "float")
    qzo.save_pretrained(load(tmp_path / "float", group_size=32), tmp_path / "in")
    config = json.loads((tmp_path / "in/config.json").read_text())
    config["vision_config"]["vision_use_head"] = True
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    file = tmp_path / "in/model.safetensors"
    tensors, owner = load_file(file), "model.vision_tower.head.attention.out_proj"
    packed = qzo.QZOLinear(32, 32, group_size=32).packed()
    entries = compressed_tensors.entries(owner, packed, config["quantization_config"], torch.float16)
    save_file(tensors | {key: make() for key, _, _, make in entries}, file, {"format": "pt"})
    with pytest.raises(
        ValueError,
        match=r"4-bit weights for model\.vision_tower\.head\.attention\.out_proj, which is a NonDynamicallyQuantizable"
        r"Linear; only nn\.Linear and transformers' Conv1D can be replaced: quantize the model again, and leave this "
        "layer out",
    ):
        load(tmp_path / "in")


def test_a_tower_that_is_quantized_too_is_saved_and_loaded_again(tmp_path):
    """All but the out_proj of its nn.MultiheadAttention, which could not be loaded."""
    build("LlavaOnevision", False).save_pretrained(tmp_path / "float")
    model = load(tmp_path / "float", group_size=32)
    assert not any("vision_tower" in name for name in layers(model))
    qzo.quantize_(model.model.vision_tower, group_size=32)
    tower = {name for name in layers(model) if name.startswith("model.vision_tower.")}
    assert len(tower) == 8
    assert "model.vision_tower.head.attention.out_proj" not in tower
    qzo.save_pretrained(model, tmp_path / "out")
    same_state(load(tmp_path / "out"), model)
