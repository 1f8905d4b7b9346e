"""Where a folder says how its weights are quantized: in a part of its config, in a file of its tool's own, nowhere."""

import json
import shutil

import pytest
import torch
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

import qzo
from qzo.checkpoints.formats import told
from qzo.cli.main import main
from qzo.nn.layers import layers
from tests.checkpoints.test_vision import logits, same_state
from tests.support.checkpoints import change_config, quantized
from tests.support.close import assert_same_bits
from tests.support.gptq_checkpoints import contents, decode_folder, load, step, write_awq, write_gptq
from tests.support.paths import FIXTURES
from tests.support.vision_models import build

GPTQ = {"quant_method": "gptq", "bits": 4}


@pytest.fixture
def nested(tmp_path):
    """(a quantized Llava whose quantization_config stands in its text_config, the same model from a plain folder)."""
    build("Llava", False).save_pretrained(tmp_path / "float")
    qzo.save_pretrained(qzo.from_pretrained(tmp_path / "float", device="cpu", group_size=32), tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "in")
    change_config(tmp_path / "in", lambda c: c["text_config"].update(quantization_config=c.pop("quantization_config")))
    return tmp_path / "in", load(tmp_path / "plain")


def test_in_the_part_that_is_quantized(nested, tmp_path, capsys):
    folder, want = nested
    model = load(folder)
    same_state(model, want)
    qzo.save_pretrained(model, tmp_path / "same")
    assert contents(tmp_path / "same") == contents(folder)
    for by_transformers in (False, True):
        if by_transformers:
            with qzo.loading():
                model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
            same_state(model, want)
        model.save_pretrained(tmp_path / "again")
        same_state(load(tmp_path / "again"), want)
    assert main(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trains"]["layers"] == len(layers(want))
    assert main(["quantize", str(folder), "--output-dir", str(tmp_path / "q")]) == 2
    assert "is quantized already" in capsys.readouterr().err


def test_an_export_says_it_once(nested, tmp_path):
    """A reader that looks into text_config finds no old format there."""
    folder, want = nested
    qzo.export(load(folder), tmp_path / "gptq", "gptq")
    content = json.loads((tmp_path / "gptq/config.json").read_text())
    assert content["quantization_config"]["quant_method"] == "gptq"
    assert "quantization_config" not in content["text_config"]
    again = load(tmp_path / "gptq")
    assert_same_bits(logits(again), logits(want))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"thinker_config": {"text_config": {"quantization_config": GPTQ}}}, GPTQ),
        ({"quantization_config": GPTQ, "text_config": {"quantization_config": {"quant_method": "awq"}}}, GPTQ),
        ({"text_config": {"quantization_config": GPTQ}, "vision_config": {"quantization_config": dict(GPTQ)}}, GPTQ),
        ({"text_config": {"quantization_config": None}, "quantization_config": None}, None),
    ],
)
def test_which_one_counts(tmp_path, content, found):
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert told.quantization_of(tmp_path) == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"a": {"quantization_config": GPTQ}, "b": {"quantization_config": GPTQ | {"bits": 8}}},
            r"config\.json: the quantization_config in a and that in b differ",
        ),
        (
            {"quantization_config": {"bits": 4}},
            r"config\.json: its quantization_config names no quant_method; add the one",
        ),
        (
            {"text_config": {"quantization_config": {"bits": 4}}},
            "quantization_config in text_config names no quant_method",
        ),
        ({"quantization_config": 4}, "names no quant_method"),
        ({"quantization_config": []}, "names no quant_method"),
        ({"quantization_config": "x"}, "names no quant_method"),
        ({"quantization_config": {"quant_method": ["gptq"]}}, "names no quant_method"),
    ],
)
def test_what_cannot_count(tmp_path, content, message):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        told.quantization_of(tmp_path)
    assert "fetch" not in str(caught.value)


@pytest.mark.parametrize("names", [("w_bit", "q_group_size"), ("bits", "group_size")])
def test_awqs_own_file(tmp_path, names):
    """AutoAWQ's first folders have no quantization_config."""
    folder = write_awq(tmp_path / "in", zero_point=True)
    want = quantized(load(folder))
    said = change_config(folder, lambda content: content.pop("quantization_config"))
    own = {names[0]: said["bits"], names[1]: said["group_size"], "zero_point": True, "version": "GEMM"}
    (folder / "quant_config.json").write_text(json.dumps(own))
    model = load(folder)
    for name, layer in quantized(model).items():
        assert_same_bits(layer.dequantize(), want[name].dequantize())
    step(model, 0.0)
    qzo.save_pretrained(model, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(folder)
    qzo.export(model, tmp_path / "gptq", "gptq")
    assert not (tmp_path / "gptq/quant_config.json").exists()
    (folder / "quant_config.json").write_text(json.dumps(own | {"version": "Marlin"}))
    with pytest.raises(ValueError, match="AWQ weights in version 'Marlin'"):
        load(folder)


SAID = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("config.json", SAID | {"quant_method": "AWQ", "version": "GEMM"}),
        ("config.json", {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "zero_point": True}),
        ("config.json", SAID | {"version": None, "w_bit": 4}),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "zero_point": True}),
        ("quant_config.json", SAID | {"quant_method": None}),
        ("quant_config.json", SAID | {"quant_method": "AWQ"}),
        ("quantize_config.json", SAID),
    ],
)  # AutoGPTQ's name, for weights in AWQ's layout
def test_awq_by_other_names(tmp_path, place, said):
    """Names are those of AutoAWQ or transformers; one that says no version is GEMM."""
    folder = write_awq(tmp_path / "in", zero_point=True)
    want = decode_folder(folder)
    change_config(folder, lambda content: content.pop("quantization_config"))
    if place == "config.json":
        change_config(folder, lambda content: content.update(quantization_config=said))
    else:
        (folder / place).write_text(json.dumps(said))
    model = load(folder)
    for name, layer in quantized(model).items():
        assert_same_bits(layer.dequantize(), want[name])
    qzo.save_pretrained(model, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(folder)
    qzo.export(model, tmp_path / "gptq", "gptq")
    assert not (tmp_path / "gptq/quant_config.json").exists()
    for name, layer in quantized(load(tmp_path / "gptq")).items():
        assert_same_bits(layer.dequantize(), want[name])


def test_compressed_tensors_first_name_for_it(tmp_path):
    shutil.copytree(FIXTURES / "ct-w4a16-sym-g128-gptq", tmp_path / "in")
    change_config(
        tmp_path / "in", lambda content: content.update(compression_config=content.pop("quantization_config"))
    )
    model, want = load(tmp_path / "in"), load(FIXTURES / "ct-w4a16-sym-g128-gptq")
    same_state(model, want)
    qzo.export(model, tmp_path / "gptq", "gptq")
    content = json.loads((tmp_path / "gptq/config.json").read_text())
    assert "compression_config" not in content
    assert content["quantization_config"]["quant_method"] == "gptq"


@pytest.mark.parametrize("named", ["GPTQ", "Gptq"])
@pytest.mark.parametrize("version", [None, "GPTQ", "gptq_V2"])
def test_gptq_in_capitals(tmp_path, named, version):
    """And one that names no checkpoint_format is version 1, as AutoGPTQ wrote it."""
    given = {} if version is None else {"checkpoint_format": version}
    folder = write_gptq(tmp_path / "in", quant_method=named, **given)
    want = decode_folder(write_gptq(tmp_path / "plain", **{key: value.lower() for key, value in given.items()}))
    model = load(folder)
    for name, layer in quantized(model).items():
        assert_same_bits(layer.dequantize(), want[name])
    qzo.save_pretrained(model, tmp_path / "same")
    assert contents(tmp_path / "same") == contents(folder)
    with qzo.loading():
        again = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    same_state(again, model)
    again.save_pretrained(tmp_path / "again")
    same_state(load(tmp_path / "again"), model)
    assert named not in AUTO_QUANTIZATION_CONFIG_MAPPING


def test_formats_named_by_another_case_elsewhere(tmp_path):
    folder = write_gptq(tmp_path / "in")
    said = change_config(folder, lambda content: content.pop("quantization_config"))
    want = decode_folder(write_gptq(tmp_path / "plain"))
    (folder / "quantize_config.json").write_text(json.dumps(said | {"quant_method": "GPTQ"}))
    for name, layer in quantized(load(folder)).items():
        assert_same_bits(layer.dequantize(), want[name])
