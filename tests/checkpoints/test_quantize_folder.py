"""`qzo quantize` writes, a layer at a time, what loading and saving the whole model writes."""

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import OPTConfig, OPTForCausalLM, ResNetConfig, ResNetForImageClassification

import qzo
from qzo.checkpoints import quantize_folder
from qzo.checkpoints.quantize_folder import Quantizing
from qzo.cli import main as command
from qzo.nn.layers import layers
from qzo.nn.quantize import quantize_weight
from tests.nn import test_experts
from tests.support import tiny


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("float") / "tiny")


def run(capsys, *arguments):
    assert command.main(["quantize", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def both(folder, tmp_path, capsys, *options, **loaded):
    """Tensors of the folder that the command writes, and of the one that a loaded model is saved to."""
    found = run(capsys, folder, "--output-dir", tmp_path / "streamed", *options)
    form = loaded.pop("form", "compressed-tensors")
    qzo.export(qzo.from_pretrained(folder, device="cpu", **loaded), tmp_path / "loaded", format=form)
    for name in ("config.json", "quantize_config.json"):
        a, b = (tmp_path / kind / name for kind in ("streamed", "loaded"))
        assert a.exists() == b.exists()
        assert not a.exists() or json.loads(a.read_text()) == json.loads(b.read_text())
    return found, *(load_file(tmp_path / kind / "model.safetensors") for kind in ("streamed", "loaded"))


@pytest.mark.parametrize(
    ("options", "loaded"),
    [
        (["--group-size", 32], {"group_size": 32}),
        (["--bits", 2, "--asymmetric"], {"bits": 2, "symmetric": False}),
        (["--bits", 8, "--group-size", -1], {"bits": 8, "group_size": -1}),
        (
            ["--format", "gptq", "--asymmetric", "--group-size", 32],
            {"form": "gptq", "symmetric": False, "group_size": 32},
        ),
        (["--table", "nf4"], {"form": "bitsandbytes", "table": "nf4"}),
        (["--format", "gptq", "--bits", 8], {"form": "gptq", "bits": 8}),
    ],
)
def test_the_same_bytes_as_a_loaded_model(words, tmp_path, capsys, options, loaded):
    found, streamed, whole = both(words, tmp_path, capsys, *options, **{"group_size": 64} | loaded)
    assert found["layers"] == 14
    assert set(streamed) == set(whole)
    assert all(torch.equal(streamed[name], whole[name]) for name in whole)
    assert all(streamed[name].dtype == whole[name].dtype for name in whole)
    again = qzo.from_pretrained(tmp_path / "streamed", device="cpu")
    assert {layer.bits for layer in layers(again).values()} == {loaded.get("bits", 4)}


@pytest.mark.parametrize("name", ["mixtral", "qwen2"])
def test_experts_are_quantized_one_by_one(name, tmp_path, capsys):
    folder = test_experts.save(name, tmp_path / name)
    found, streamed, whole = both(folder, tmp_path, capsys, "--group-size", 32, group_size=32)
    assert found["error"] is not None
    assert set(streamed) == set(whole)
    assert all(torch.equal(streamed[name], whole[name]) for name in whole)


def test_the_models_loss_is_close_to_the_float_one(words, tmp_path, capsys):
    """And the more bits the closer: through the file, from files in pieces, and with the error that is told."""
    ids = torch.randint(3, 30, (4, 12), generator=torch.Generator().manual_seed(1))
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(words)(ids).logits
        errors = []
        for bits in (2, 4, 8):
            told = run(capsys, words, "--output-dir", tmp_path / str(bits), "--bits", bits, "--group-size", 32)
            model = qzo.from_pretrained(tmp_path / str(bits), device="cpu")
            errors.append((float((model(ids).logits - logits).norm() / logits.norm()), told["error"]))
    assert errors[0][0] > 2 * errors[1][0] > 8 * errors[2][0]
    assert errors[2][0] < 0.05
    weights = {name.removesuffix(".weight"): w for name, w in load_file(words / "model.safetensors").items()}
    squares = [
        [float((layer.dequantize() - weights[name]).square().sum()), float(weights[name].square().sum())]
        for name, layer in layers(model).items()
    ]
    wanted = (sum(s[0] for s in squares) / sum(s[1] for s in squares)) ** 0.5
    assert errors[2][1] == pytest.approx(wanted, rel=1e-4)


def test_tensors_are_read_one_at_a_time_and_once(words, tmp_path, monkeypatch):
    read, plain, alive = [], quantize_folder.safetensors_file.read, []

    def watched(*place):
        assert sum(found() is not None for found in alive) <= 1  # what the writer has just written
        tensor = plain(*place)
        alive.append(weakref.ref(tensor))
        read.append(place)
        return tensor

    made = []
    monkeypatch.setattr(quantize_folder, "Quantizing", lambda *a: made.append(Quantizing(*a)) or made[0])
    monkeypatch.setattr(quantize_folder.safetensors_file, "read", watched)
    monkeypatch.setattr(quantize_folder, "from_pretrained", None)
    quantize_folder.quantize_folder(words, tmp_path / "out")
    assert not made[0]._made  # nothing that is written stays
    assert len(read) == len(set(read)) == len(load_file(words / "model.safetensors"))


def test_a_folder_in_several_files_and_what_travels_along(words, tmp_path, capsys):
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(words / "model.safetensors").items()}
    (tmp_path / "split").mkdir()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, tmp_path / "split" / file)
    index = {name: file for file, some in parts.items() for name in some}
    (tmp_path / "split" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "split" / name).write_bytes((words / name).read_bytes())
    run(capsys, tmp_path / "split", "--output-dir", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    name = "model.layers.1.mlp.down_proj"
    weight = quantize_weight(tensors[f"{name}.weight"], 64)
    assert torch.equal(written[f"{name}.weight_scale"].float(), weight.scales.T)


@pytest.mark.parametrize("pickled", [False, True])
def test_names_that_are_not_the_models_are_left_to_transformers(tmp_path, capsys, pickled):
    """OPT's first checkpoints name no "model."; other files hold pickles, which only transformers reads."""
    torch.manual_seed(0)
    model = OPTForCausalLM(
        OPTConfig(
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=64,
            hidden_size=64,
            ffn_dim=128,
            word_embed_proj_dim=64,
            max_position_embeddings=64,
        )
    )
    model.save_pretrained(tmp_path / "opt")
    tensors = load_file(tmp_path / "opt" / "model.safetensors")
    if pickled:
        (tmp_path / "opt" / "model.safetensors").unlink()
        torch.save(tensors, tmp_path / "opt" / "pytorch_model.bin")
    else:
        save_file(
            {name.removeprefix("model."): tensor for name, tensor in tensors.items()},
            tmp_path / "opt" / "model.safetensors",
            {"format": "pt"},
        )
    found = run(capsys, tmp_path / "opt", "--output-dir", tmp_path / "out")
    assert (found["layers"], found["group_size"], found["error"]) == (6, 64, None)
    assert len(layers(qzo.from_pretrained(tmp_path / "out", device="cpu"))) == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("nowhere", "no such file"),
        ("{words} --bits 3", "bits=3"),
        ("{words} --group-size 96", "use one of 32, 64, 128, or -1"),
        ("{words} --format awq --bits 8", "4"),
        ("{quantized}", "is quantized already"),
        ("{resnet}", "no nn.Linear"),
        ("{nan}", "model.layers.1.mlp.up_proj: the weight holds NaN or infinity"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(words, tmp_path, capsys, arguments, said):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    quantize_folder.quantize_folder(words, tmp_path / "quantized")
    (tmp_path / "nan").mkdir()
    tensors = load_file(words / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, tmp_path / "nan" / "model.safetensors")
    (tmp_path / "nan" / "config.json").write_bytes((words / "config.json").read_bytes())
    capsys.readouterr()
    places = {name: tmp_path / name for name in ("resnet", "quantized", "nan")}
    arguments = arguments.format(words=words, **places).split()
    assert command.main(["quantize", *arguments, "--output-dir", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr()
    begun, line = shown.err.splitlines()
    assert begun.startswith("quantizing ")
    assert said in line
    assert not (tmp_path / "out").exists()


def test_the_source_is_not_overwritten(words, capsys):
    assert command.main(["quantize", str(words), "--output-dir", str(words)]) == 2
    assert "existing files are not overwritten" in capsys.readouterr().err
    assert command.main(["quantize", str(words), "--output-dir", str(words), "--overwrite"]) == 2
    assert "never overwritten" in capsys.readouterr().err
