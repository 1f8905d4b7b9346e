"""What only servers compute: a rounded cache of the attention, rounded inputs of layers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qzo
from qzo.checkpoints.formats import told
from qzo.checkpoints.formats.compressed_tensors import is_for_servers
from qzo.cli.main import main
from qzo.nn.layers import layers
from tests.checkpoints.test_vision import same_state
from tests.support.checkpoints import change_config
from tests.support.gptq_checkpoints import contents, step
from tests.support.paths import FIXTURES
from tests.support.tiny import RECORDS, save_checkpoint, write_jsonl

SYM = FIXTURES / "ct-w4a16-sym-g64-bias-tied"
CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
UP = "model.layers.0.mlp.up_proj"
INPUTS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}


def load(path, **options):
    return qzo.from_pretrained(path, device="cpu", **options)


def add(folder, tensors):
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


@pytest.fixture
def plain(tmp_path):
    shutil.copytree(SYM, tmp_path / "in")
    (tmp_path / "in/expected.safetensors").unlink()
    return tmp_path / "in"


@pytest.fixture
def cached(plain):
    """A folder with a scheme for the cache and its scales."""
    change_config(plain, lambda content: content["quantization_config"].update(kv_cache_scheme=CACHE))
    owners = {
        name.partition(".self_attn.")[0] + ".self_attn"
        for name in load_file(plain / "model.safetensors")
        if ".self_attn." in name
    }
    add(plain, {f"{owner}.{part}_scale": torch.tensor([0.03125]) for owner in owners for part in "kv"})
    return plain


def test_a_scheme_for_the_cache_is_read_and_kept(cached, tmp_path):
    with pytest.warns(UserWarning, match="kv_cache_scheme") as caught:
        model = load(cached)
    assert [str(w.message) for w in caught] == [
        f"{cached}: kv_cache_scheme (num_bits 8, type 'float', strategy 'tensor', dynamic False): servers round the "
        "attention's cache, with the k_scale and v_scale of these files; training computes it without rounding, what "
        "is saved in this format keeps them as they are, and another format leaves them out"
    ]
    same_state(model, load(SYM))
    qzo.save_pretrained(model, tmp_path / "same")
    assert contents(tmp_path / "same") == contents(cached)
    step(model, 1e-2)
    qzo.save_pretrained(model, tmp_path / "tuned")
    model.save_pretrained(tmp_path / "by-transformers")
    stored = load_file(cached / "model.safetensors")
    for out in ("tuned", "by-transformers"):
        tuned = load_file(tmp_path / out / "model.safetensors")
        assert set(tuned) == set(stored)
        moved = {name for name in stored if not torch.equal(tuned[name], stored[name])}
        assert moved
        assert all(name.endswith(".weight_scale") for name in moved)
        said = json.loads((tmp_path / out / "config.json").read_text())["quantization_config"]
        assert said["kv_cache_scheme"] == CACHE


def test_transformers_own_way_reads_and_keeps_it(cached, tmp_path):
    with qzo.loading():
        model = AutoModelForCausalLM.from_pretrained(cached, dtype=torch.float32)
    same_state(model, load(SYM))
    model.save_pretrained(tmp_path / "out")
    got, stored = load_file(tmp_path / "out/model.safetensors"), load_file(cached / "model.safetensors")
    assert set(got) == set(stored)
    assert all(torch.equal(got[name], stored[name]) for name in stored if is_for_servers(name))


def test_another_format_has_no_scales_of_the_cache(cached, tmp_path):
    model = load(cached)
    qzo.export(model, tmp_path / "gptq", "gptq")
    assert not any(map(is_for_servers, load_file(tmp_path / "gptq/model.safetensors")))
    again = load(tmp_path / "gptq")
    with torch.no_grad():
        ids = torch.arange(12)[None]
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model.layers.0.self_attn.k_scale", True),
        ("model.layers.0.self_attn.v_zero_point", True),
        ("model.layers.0.mlp.up_proj.input_scale", True),
        ("model.layers.0.self_attn.k_proj.output_scale", True),
        ("model.layers.0.self_attn.k_proj.weight_scale", False),
        ("model.layers.0.self_attn.qk_scale", False),
        ("model.layers.0.self_attn.k_scales", False),
    ],
)
def test_names_of_what_servers_read(name, told):
    assert is_for_servers(name) is told
    assert not is_for_servers("model.layers.0.self_attn.k_scale", cache=False)


# ---------------------------------------------------------------------------------------------- inputs


def quantize_inputs(folder, arguments=INPUTS):
    change_config(
        folder, lambda c: c["quantization_config"]["config_groups"]["group_0"].update(input_activations=arguments)
    )


@pytest.mark.parametrize("static", [False, True])
def test_weights_of_quantized_inputs_train_on_request(plain, tmp_path, static):
    quantize_inputs(plain, INPUTS | {"dynamic": not static})
    if static:
        layers = [n.removesuffix("_packed") for n in load_file(plain / "model.safetensors") if n.endswith("_packed")]
        owners = [name.removesuffix(".weight") for name in layers]
        add(plain, {f"{owner}.input_scale": torch.ones(1) for owner in owners})
    with pytest.raises(
        ValueError, match=r"input_activations are quantized too \(num_bits 8, type 'int', strategy 'token'"
    ):
        load(plain)
    with pytest.warns(
        UserWarning, match="input_activations of its quantization_config are left out, as weight_only asks"
    ):
        model = load(plain, weight_only=True)
    same_state(model, load(SYM))
    qzo.save_pretrained(model, tmp_path / "same")
    assert contents(tmp_path / "same") == contents(plain)
    model.save_pretrained(tmp_path / "by-transformers")
    got, stored = load_file(tmp_path / "by-transformers/model.safetensors"), load_file(plain / "model.safetensors")
    assert set(got) == set(stored)
    said = json.loads((tmp_path / "by-transformers/config.json").read_text())["quantization_config"]
    assert said["config_groups"]["group_0"]["input_activations"]["num_bits"] == 8


def test_a_request_that_changes_nothing_is_silent(plain, recwarn):
    same_state(load(plain, weight_only=True), load(SYM))
    assert not recwarn


@pytest.mark.parametrize(
    ("said", "left"),
    [
        (
            {"config_groups": {"a": {"input_activations": INPUTS}, "b": {"output_activations": INPUTS}}},
            "input_activations and output_activations",
        ),
        ({"act_bits": 8, "bits": 4}, "act_bits"),
        ({"act_bits": 16}, None),
        ({"config_groups": 3}, None),
        ({"config_groups": {"a": None}}, None),
    ],
)
def test_what_is_left_out(said, left):
    read, found = told.weight_only(said)
    assert found == left
    assert (read == said) is (left is None)


def test_the_command_line(tmp_path, capsys):
    save_checkpoint(tmp_path / "float")
    qzo.save_pretrained(load(tmp_path / "float", group_size=32), tmp_path / "q")
    quantize_inputs(tmp_path / "q")
    data = write_jsonl(tmp_path / "data.jsonl", RECORDS)
    run = [
        "train",
        "--model",
        str(tmp_path / "q"),
        "--data",
        str(data),
        "--output-dir",
        str(tmp_path / "out"),
        "--max-steps",
        "1",
        "--batch-size",
        "2",
        "--device",
        "cpu",
    ]
    assert main(run) == 2
    assert "--weight-only" in capsys.readouterr().err
    assert main([*run, "--weight-only"]) == 0
    replay = [
        "replay",
        str(tmp_path / "q"),
        str(tmp_path / "out/journal.qzo"),
        "--output-dir",
        str(tmp_path / "again"),
        "--device",
        "cpu",
    ]
    assert main(replay) == 2
    assert main([*replay, "--weight-only"]) == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "out/model")


# ---------------------------------------------------------------------------------------------- W4A8 as it is written


def to_integers(folder, change_tensors=lambda tensors: None):
    """The folder in format int-quantized: the same weights, one int8 each."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for layer, packed in layers(load(folder)).items():
        codes = packed.packed().unpacked().to(torch.int16)
        tensors[f"{layer}.weight"] = (codes - 2 ** (packed.bits - 1)).to(torch.int8)
        if packed.zeros is not None:
            zeros = packed.zeros.to(torch.int16) - 2 ** (packed.bits - 1)
            tensors[f"{layer}.weight_zero_point"] = zeros.T.to(torch.int8).contiguous()
        for part in ("weight_packed", "weight_shape"):
            tensors.pop(f"{layer}.{part}")
    change_tensors(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    change_config(folder, lambda c: c["quantization_config"]["config_groups"]["group_0"].update(format="int-quantized"))
    quantize_inputs(folder)
    return folder


@pytest.mark.filterwarnings("ignore:.*as weight_only asks")
@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"bits": 8}, {"bits": 8, "symmetric": False}])
def test_integers_in_bytes(tmp_path, options):
    save_checkpoint(tmp_path / "float")
    qzo.save_pretrained(load(tmp_path / "float", group_size=32, **options), tmp_path / "in")
    want = load(tmp_path / "in")
    folder = to_integers(tmp_path / "in")
    model = load(folder, weight_only=True)
    same_state(model, want)
    qzo.save_pretrained(model, tmp_path / "same")
    assert contents(tmp_path / "same") == contents(folder)
    step_of_words(model)
    qzo.save_pretrained(model, tmp_path / "out")
    model.save_pretrained(tmp_path / "by-transformers")
    stored = load_file(folder / "model.safetensors")
    for out in ("out", "by-transformers"):
        tuned = load_file(tmp_path / out / "model.safetensors")
        assert set(tuned) == set(stored)
        assert {n.rpartition(".")[2] for n in stored if not torch.equal(tuned[n], stored[n])} == {"weight_scale"}
    qzo.export(model, tmp_path / "gptq", "gptq")
    exported = layers(load(tmp_path / "gptq"))
    assert all(torch.equal(exported[name].codes, layer.codes) for name, layer in layers(model).items())


def step_of_words(model):
    batch = {"input_ids": torch.arange(3, 27).view(2, 12), "labels": torch.arange(3, 27).view(2, 12)}
    qzo.QZO(model, lr=1e-1, directions=2).step(lambda: qzo.losses(model, batch, 4))


@pytest.mark.filterwarnings("ignore:.*as weight_only asks")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"] * 2}),
            "weight goes from -1[46] to 14, which 4 bits do not",
        ),
        (
            lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].half()}),
            "weight must be an int8 matrix, got torch.float16",
        ),
        (
            lambda t: t.update({f"{UP}.weight_scale": torch.ones(3)}),
            r"weight_scale is \[3\], which is not 64 rows of 64",
        ),
        (lambda t: t.update({f"{UP}.weight_zero_point": torch.zeros(3)}), r"weight_zero_point must be int8 \[64, 2\]"),
        (lambda t: t.pop(f"{UP}.weight"), "weight_scale in model.safetensors: no weight beside it"),
    ],
)
def test_integers_that_cannot_be_read(tmp_path, spoil, message):
    save_checkpoint(tmp_path / "float")
    qzo.save_pretrained(load(tmp_path / "float", group_size=32), tmp_path / "in")
    folder = to_integers(tmp_path / "in", spoil)
    with pytest.raises(ValueError, match=message):
        load(folder, weight_only=True)


def test_integers_through_transformers_are_refused(tmp_path, plain):
    folder = to_integers(plain)
    quantize_inputs(folder, None)
    with qzo.loading(), pytest.raises(ValueError, match=r"'int-quantized' is read by qzo\.from_pretrained only"):
        AutoModelForCausalLM.from_pretrained(folder)
