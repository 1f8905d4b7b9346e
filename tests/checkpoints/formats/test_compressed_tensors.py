import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qzo
from qzo.checkpoints.formats import safetensors_file
from tests.support.checkpoints import decode_compressed, quantized, relative_error, scale_randomly
from tests.support.paths import FIXTURES

SYM, ASYM = FIXTURES / "ct-w4a16-sym-g64-bias-tied", FIXTURES / "ct-w4a16-asym-g128-rtn"
LOGITS_FP32 = 2e-5  # float32 sums in another order; one zero point off in a group gives 1e-2
LAYER = "model.layers.0.mlp.up_proj"


def load(path):
    return qzo.from_pretrained(path, device="cpu")


@pytest.fixture(params=[SYM, ASYM], ids=["sym-g64-bias-tied", "asym-g128"])
def fixture(request):
    return request.param


@pytest.fixture
def checkpoint(tmp_path):
    """A copy to damage: the folder, and a function that applies changes to its config or tensors."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(SYM, folder)
    (folder / "expected.safetensors").unlink()

    def change(config=None, tensors=None):
        if config is not None:
            content = json.loads((folder / "config.json").read_text())
            config(content["quantization_config"])
            (folder / "config.json").write_text(json.dumps(content))
        if tensors is not None:
            content = load_file(folder / "model.safetensors")
            tensors(content)
            save_file(content, folder / "model.safetensors", metadata={"format": "pt"})

    return folder, change


def test_logits(fixture):
    expected = load_file(fixture / "expected.safetensors")
    with torch.no_grad():
        logits = load(fixture)(expected["input_ids"]).logits
    assert relative_error(logits, expected["logits"]) < LOGITS_FP32


def test_weights(fixture):
    model, expected = load(fixture), decode_compressed(fixture / "model.safetensors")
    assert set(quantized(model)) == set(expected)
    for name, layer in quantized(model).items():
        assert torch.equal(layer.dequantize(), expected[name]), name


def test_saved_unchanged_is_the_same_folder(fixture, tmp_path):
    qzo.save_pretrained(load(fixture), tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {
        p.name: p.read_bytes() for p in fixture.iterdir()
    }


def test_saved_scales_and_nothing_else(fixture, tmp_path):
    model = load(fixture)
    new = scale_randomly(model, keep=0.5)
    qzo.save_pretrained(model, tmp_path / "out")
    before, after = fixture / "model.safetensors", tmp_path / "out" / "model.safetensors"
    assert list(safetensors_file.places(before).items()) == list(safetensors_file.places(after).items())
    old_tensors, new_tensors = load_file(before), load_file(after)
    for name, old in old_tensors.items():
        if name.endswith(".weight_scale"):
            rounded = new[name.removesuffix(".weight_scale")].T.to(old.dtype)
            assert torch.equal(new_tensors[name], rounded), name
            assert not torch.equal(new_tensors[name], old), name
        else:
            assert torch.equal(new_tensors[name].view(torch.uint8), old.view(torch.uint8)), name
    with safe_open(before, "pt") as a, safe_open(after, "pt") as b:
        assert a.metadata() == b.metadata()
    reloaded = quantized(load(tmp_path / "out"))
    for name, scales in new.items():
        assert torch.equal(reloaded[name].read_scales(), scales.to(torch.float16).float()), name


def test_shards_with_parts_of_one_layer_apart(tmp_path):
    folder, out = tmp_path / "sharded", tmp_path / "out"
    folder.mkdir()
    tensors = load_file(ASYM / "model.safetensors")
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    shutil.copy(ASYM / "config.json", folder)
    assert files[f"{LAYER}.weight_packed"] != files[f"{LAYER}.weight_scale"]
    model = load(folder)
    new = scale_randomly(model)
    qzo.save_pretrained(model, out)
    assert {p.name for p in out.iterdir()} == {p.name for p in folder.iterdir()}
    assert torch.equal(load(out).get_submodule(LAYER).read_scales(), new[LAYER].to(torch.float16).float())
    (folder / files[f"{LAYER}.weight_scale"]).unlink()
    with pytest.raises(FileNotFoundError, match=r"model-0000\d-of-00002\.safetensors is missing"):
        load(folder)


def test_whole_row_scales(checkpoint):
    folder, change = checkpoint

    def one_scale(tensors):
        for name in [n for n in tensors if n.endswith(".weight_scale")]:
            tensors[name] = tensors[name][:, :1].contiguous()

    change(weights(strategy="channel", group_size=None), one_scale)
    model, expected = load(folder), decode_compressed(folder / "model.safetensors")
    for name, layer in quantized(model).items():
        assert layer.group_size == layer.in_features
        assert torch.equal(layer.dequantize(), expected[name]), name


def weights(**changes):
    return lambda q: q["config_groups"]["group_0"]["weights"].update(changes)


def drop(part):
    return lambda tensors: tensors.pop(f"{LAYER}.{part}")


def put(part, tensor):
    return lambda tensors: tensors.update({f"{LAYER}.{part}": tensor})


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (
            weights(num_bits=5),
            None,
            "'num_bits': 5.*supported are 'pack-quantized' and 'int-quantized' with num_bits 2, 3, 4, 8",
        ),
        (weights(type="float"), None, "'type': 'float'"),
        (weights(strategy="tensor_group"), None, "'strategy': 'tensor_group'"),
        (lambda q: q["config_groups"]["group_0"].update(format="float-quantized"), None, "format 'float-quantized'"),
        (
            lambda q: q["config_groups"]["group_0"].update(format="int-quantized"),
            None,
            r"weight_scale in .*: no weight bes",
        ),
        (
            lambda q: q["config_groups"]["group_0"].update(input_activations={"num_bits": 8}),
            None,
            r"group_0: input_activations are quantized too \(num_bits 8\): a server rounds what goes into each layer, "
            r"which qzo does not compute; qzo\.from_pretrained\(\.\.\., weight_only=True\), on the command line",
        ),
        (lambda q: q["config_groups"]["group_0"].update(targets=[]), None, "no target of the config_groups fits"),
        (lambda q: q.update(transform_config={"config_groups": {}}), None, r"transform_config \(rotated weights\)"),
        (lambda q: q.update(sparsity_config={"format": "sparse-24"}), None, "sparse weights"),
        (
            lambda q: q.update(quant_method="fp_quant"),
            None,
            "quant_method 'fp_quant' cannot be read; supported are aqlm, ",
        ),
        (
            weights(group_size=32),
            None,
            r"weight_scale is \[\d+, \d\], which is not \d+ rows of \d+ weights in groups of 32",
        ),
        (weights(symmetric=False), None, "no weight_zero_point beside it"),
        (None, drop("weight_scale"), rf"{LAYER}\.weight_packed in model\.safetensors: no weight_scale beside it"),
        (
            None,
            put("weight_g_idx", torch.arange(192).int() // 64 + 1),
            "weight_g_idx names groups 1 to 3; there are groups 0 to 2",
        ),
        (None, put("weight_g_idx", torch.arange(192).int() // 64 - 1), "weight_g_idx names groups -1 to 1; there are"),
        (
            None,
            put("weight_g_idx", torch.zeros(192, dtype=torch.int32)),
            "weight_g_idx gives group 0 192 columns; every group has 64",
        ),
        (None, put("weight_g_idx", torch.zeros(192)), r"weight_g_idx must be int32 \[192\], got torch.float32"),
        (None, put("weight_packed", torch.zeros(576, 23, dtype=torch.int32)), r"must be int32 \[576, 24\], got .*23\]"),
        (None, put("weight_scale", torch.full((576, 3), float("nan"))), rf"{LAYER}\.weight_packed .*scales hold NaN"),
        (
            None,
            put("k_scale", torch.ones(1)),
            rf"{LAYER}\.k_scale in model\.safetensors: LlamaForCausalLM has no tensor",
        ),
    ],
)
def test_refused(checkpoint, config, tensors, message):
    folder, change = checkpoint
    change(config, tensors)
    with pytest.raises(ValueError, match=message):
        load(folder)


# ------------------------------------------------------------------------------------- the library itself


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
def test_library_reads_what_is_written(tmp_path, symmetric, group_size):
    pytest.importorskip("compressed_tensors", reason="the compressed-tensors library is not installed")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        vocab_size=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "float")
    model = qzo.from_pretrained(tmp_path / "float", device="cpu", group_size=group_size, symmetric=symmetric)
    scale_randomly(model)
    qzo.save_pretrained(model, tmp_path / "out")
    unpacked = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, quantization_config=unpacked)
    for name, layer in quantized(load(tmp_path / "out")).items():
        # the library multiplies in the scales' float16: one rounding of the exact product
        assert torch.equal(theirs.get_submodule(name).weight.half(), layer.dequantize().half()), name
