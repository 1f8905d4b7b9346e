"""compressed-tensors with several config groups: bits, strategy and group size of each layer by its target."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import qzo
from qzo.checkpoints.formats import compressed_tensors
from qzo.nn.weights import PackedWeight
from tests.support.checkpoints import (
    decode_compressed,
    quantized,
    relative_error,
    scale_randomly,
    write_compressed,
)
from tests.support.paths import FIXTURES
from tests.support.tiny import save_checkpoint

FIXTURE = FIXTURES / "ct-w4a16-sym-g128-gptq"


def load(path):
    return qzo.from_pretrained(path, device="cpu")


def group(targets, bits=4, size=32, symmetric=True, **fields):
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if size else "channel",
        "group_size": size,
    }
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None} | fields


# every way to name a layer: its own name, a pattern, its class
SCHEMES = {
    "q_proj": (3, 32, True),
    "k_proj": (3, 32, False),
    "v_proj": (2, 32, False),
    "gate_proj": (8, 32, False),
    "down_proj": (8, None, True),
    "up_proj": (4, 32, False),
    "": (4, 32, True),
}
GROUPS = {
    "group_0": group(["re:.*q_proj"], 3),
    "group_1": group(["re:.*k_proj$"], 3, symmetric=False),
    "group_2": group(["Linear"]),
    "group_3": group([f"model.layers.{i}.mlp.down_proj" for i in range(2)], 8, None),
    "group_5": group(["re:.*v_proj"], 2, symmetric=False),
    "group_6": group(["re:.*gate_proj"], 8, symmetric=False),
    "group_4": group(["re:model.layers.*up_proj"], symmetric=False, format="pack-quantized"),
}


def bits_of(name):
    return SCHEMES.get(name.split(".")[-1], SCHEMES[""])[0]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A folder of several groups; read only."""
    folder = tmp_path_factory.mktemp("mixed")
    write_compressed(folder, SCHEMES, GROUPS)
    return folder


def test_fixture_with_static_order():
    expected = load_file(FIXTURE / "expected.safetensors")
    model = load(FIXTURE)
    decoded = decode_compressed(FIXTURE / "model.safetensors")
    for name, layer in quantized(model).items():
        assert torch.equal(layer.dequantize(), decoded[name]), name
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
    assert relative_error(logits, expected["logits"]) < 2e-5  # float32 sums in another order


def test_each_layer_has_the_arguments_of_its_target(mixed):
    model, decoded = load(mixed), decode_compressed(mixed / "model.safetensors", bits_of)
    assert set(quantized(model)) == set(decoded)
    for name, layer in quantized(model).items():
        assert torch.equal(layer.dequantize(), decoded[name]), name
        assert layer.group_size == (layer.in_features if name.endswith("down_proj") else 32)


def test_saved_unchanged_is_the_same_folder(mixed, tmp_path):
    qzo.save_pretrained(load(mixed), tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {
        p.name: p.read_bytes() for p in mixed.iterdir()
    }


def test_saved_scales_come_back(mixed, tmp_path):
    model = load(mixed)
    new = scale_randomly(model)
    qzo.save_pretrained(model, tmp_path / "out")
    for name, layer in quantized(load(tmp_path / "out")).items():
        assert torch.equal(layer.read_scales(), new[name].half().float()), name


def test_an_exact_name_beats_a_pattern_and_a_pattern_a_class():
    groups = {
        "a": group(["Linear"], 4, 32),
        "b": group(["re:.*proj"], 3, 64),
        "c": group(["x.q_proj"], 3, None),
        "d": group(["re:.*a_proj"], 4, 128),
    }
    by_target = compressed_tensors.check_config({"format": "pack-quantized", "config_groups": groups}, "here")
    patterns = compressed_tensors._patterns(by_target, "here")
    found = {
        layer: compressed_tensors._arguments(layer, by_target, patterns)["group_size"]
        for layer in ("x.q_proj", "x.k_proj", "x.a_proj", "head")
    }
    # of two patterns the first in alphabetical order counts, as in the library
    assert found == {"x.q_proj": None, "x.k_proj": 64, "x.a_proj": 128, "head": 32}


def refuse(mixed, tmp_path, change, message):
    """The message of the folder whose quantization_config `change` has changed."""
    shutil.copytree(mixed, tmp_path / "changed")
    config = tmp_path / "changed" / "config.json"
    content = json.loads(config.read_text())
    change(content["quantization_config"])
    config.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path / "changed")
    assert "\n" not in str(error.value)


def only(*names):
    def change(quantization):
        quantization["config_groups"] = {name: GROUPS[name] for name in names}

    return change


def set_group(name, value):
    return lambda quantization: quantization["config_groups"].update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            only("group_0"),
            r"no target of the config_groups fits model\.layers\.0\.mlp\.down_proj \(they are re:\.\*q_proj\)",
        ),
        (
            only("group_2", "group_3", "group_4", "group_6"),
            r"k_proj\.weight_packed in model\.safetensors: must be int32 \[32, 12\], got .*9\]",
        ),
        (
            set_group("group_3", group([f"model.layers.{i}.mlp.down_proj" for i in range(2)], 8, 32)),
            r"down_proj\.weight_packed .*\[96, 1\], which is not 96 rows of 160",
        ),
        (set_group("x", group(["re:(("])), r"x: target 're:\(\(' is no regular expression"),
        (set_group("x", group("Linear")), "x: targets must be a list of names, patterns"),
        (
            set_group("x", group(["Conv"], 4, 32, format="int-quantized")),
            "changed: config_groups of int-quantized and pack-quantized; one format for all is read",
        ),
        (
            set_group("x", group(["Conv"], 4, 0) | {"weights": {"num_bits": 4, "strategy": "group"}}),
            "x: group_size is None",
        ),
        (set_group("x", []), "x: it has no weights section"),
        (lambda q: q.update(config_groups=[]), "has no config_groups"),
    ],
)
def test_refused(mixed, tmp_path, change, message):
    refuse(mixed, tmp_path, change, message)


# ------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("symmetric", [True, False])
def test_written_with_several_group_sizes_and_bits(tmp_path, symmetric):
    save_checkpoint(tmp_path / "float", hidden=128)
    model = qzo.from_pretrained(tmp_path / "float", device="cpu", group_size=64, symmetric=symmetric)
    kinds = {"q_proj": (4, 32), "down_proj": (8, -1), "up_proj": (2, 64), "gate_proj": (8, 64)}
    for name in list(quantized(model)):
        parent, _, child = name.rpartition(".")
        if child in kinds:
            linear = torch.nn.Linear(128, 128, bias=False)
            # one that is symmetric among others that are not gets zero points of 2^(bits - 1)
            layer = qzo.QZOLinear.from_linear(linear, *kinds[child], symmetric=symmetric or child == "down_proj")
            setattr(model.get_submodule(parent), child, layer)
    qzo.save_pretrained(model, tmp_path / "out")
    again = load(tmp_path / "out")
    decoded = decode_compressed(
        tmp_path / "out" / "model.safetensors", lambda name: kinds.get(name.split(".")[-1], (4, 64))[0]
    )
    for name, layer in quantized(model).items():
        assert torch.equal(again.get_submodule(name).dequantize(), layer.dequantize()), name
        assert torch.equal(decoded[name], layer.dequantize()), name
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    written = [g["weights"] for g in groups.values()]
    assert {(w["num_bits"], w["strategy"], w["group_size"]) for w in written} == {
        (4, "group", 64),
        (4, "group", 32),
        (8, "channel", None),
        (2, "group", 64),
        (8, "group", 64),
    }
    assert {w["symmetric"] for w in written} == {symmetric}
    assert sorted(target for g in groups.values() for target in g["targets"]) == sorted(quantized(model))


@pytest.mark.parametrize("bits", [2, 8])
def test_a_float_model_in_other_bits(tmp_path, bits):
    save_checkpoint(tmp_path / "float")
    model = qzo.from_pretrained(tmp_path / "float", device="cpu", bits=bits, group_size=32)
    qzo.save_pretrained(model, tmp_path / "out")
    for name, layer in quantized(load(tmp_path / "out")).items():
        assert layer.bits == bits
        assert torch.equal(layer.dequantize(), model.get_submodule(name).dequantize()), name


def test_a_whole_row_of_the_common_size_needs_no_group_of_its_own():
    packed = {
        f"layer{k}": PackedWeight.from_codes(torch.zeros(4, k, dtype=torch.uint8), torch.ones(k // 64, 4))
        for k in (64, 128)
    }
    groups = compressed_tensors.quantization_config(packed, [])["config_groups"]
    assert [(g["targets"], g["weights"]["group_size"]) for g in groups.values()] == [(["Linear"], 64)]


def test_columns_sorted_by_group(tmp_path):
    """Old files with actorder "group": weight_g_idx is no run of groups anywhere."""
    order = ("q_proj", "up_proj", "k_proj", "gate_proj")
    write_compressed(tmp_path / "in", SCHEMES, GROUPS, order=order)
    model, decoded = load(tmp_path / "in"), decode_compressed(tmp_path / "in" / "model.safetensors", bits_of)
    for name, layer in quantized(model).items():
        assert torch.equal(layer.dequantize(), decoded[name]), name
        assert (layer.perm is not None) == name.endswith(order)
    plain = LlamaForCausalLM(model.config).eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict(state | {f"{name}.weight": weight for name, weight in decoded.items()})
    with torch.no_grad():
        ids = torch.arange(24).view(2, 12)
        assert relative_error(model(ids).logits, plain(ids).logits) < 2e-5
    qzo.save_pretrained(model, tmp_path / "same")
    assert (tmp_path / "same/model.safetensors").read_bytes() == (tmp_path / "in/model.safetensors").read_bytes()
    new = scale_randomly(model)
    qzo.save_pretrained(model, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    changed = decode_compressed(tmp_path / "out" / "model.safetensors", bits_of)
    for name, layer in quantized(load(tmp_path / "out")).items():
        assert torch.equal(after[f"{name}.weight_scale"], new[name].half().T), name
        assert torch.equal(layer.dequantize(), changed[name]), name


def test_sorted_columns_are_not_written_anew():
    packed = PackedWeight.from_codes(
        torch.zeros(4, 64, dtype=torch.uint8), torch.ones(2, 4), perm=torch.arange(64).flip(0)
    )
    with pytest.raises(ValueError, match="a has its columns sorted by group"):
        compressed_tensors.quantization_config({"a": packed}, [])


@pytest.mark.parametrize("g_idx", [torch.full((96,), -1), torch.arange(96) // 32])
def test_an_order_that_changes_nothing(mixed, tmp_path, g_idx):
    shutil.copytree(mixed, tmp_path / "in")
    tensors = load_file(mixed / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    save_file(tensors | {f"{name}.weight_g_idx": g_idx.int()}, tmp_path / "in" / "model.safetensors")
    model = load(tmp_path / "in")
    assert torch.equal(model.get_submodule(name).dequantize(), load(mixed).get_submodule(name).dequantize())
    qzo.save_pretrained(model, tmp_path / "out")
    before, after = (tmp_path / folder / "model.safetensors" for folder in ("in", "out"))
    assert before.read_bytes() == after.read_bytes()
