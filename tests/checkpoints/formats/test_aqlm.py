"""AQLM folders: the tool's files, made ones, saving, what is refused, and what qzo inspect tells of them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import qzo
from qzo.cli.main import main
from tests.support.aqlm_checkpoints import (
    BATCH,
    FIXTURES,
    LAYER,
    a_layer,
    bytes_of,
    changed,
    decoded,
    folder_of,
    settle,
    train,
)

# ---------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("bits", FIXTURES)
def test_the_tools_own_files(bits):
    model = qzo.from_pretrained(FIXTURES[bits], device="cpu")
    want = load_file(FIXTURES[bits] / "expected.safetensors")
    with torch.no_grad():
        got = model(want["input_ids"]).logits
    assert float((got - want["logits"]).norm() / want["logits"].norm()) < 2e-5
    tensors = load_file(FIXTURES[bits] / "model.safetensors")
    for layer in [name.removesuffix(".codes") for name in tensors if name.endswith(".codes")]:
        torch.testing.assert_close(
            model.get_submodule(layer).dequantize().double(), decoded(tensors, layer), rtol=2e-6, atol=1e-6
        )


@pytest.mark.parametrize("bits", FIXTURES)
def test_the_tools_own_files_through_the_kernels(bits):
    model = qzo.from_pretrained(FIXTURES[bits], device="cpu", dtype=torch.float16)
    want = load_file(FIXTURES[bits] / "expected.safetensors")
    with torch.no_grad(), qzo.backend("triton"):
        got = model(want["input_ids"]).logits.float()
    assert float((got - want["logits"]).norm() / want["logits"].norm()) < 6e-3


@pytest.mark.parametrize(("books", "bits"), [(1, 12), (1, 16), (2, 8), (3, 8), (2, 6), (8, 4)])
def test_made_folders(tmp_path, books, bits):
    path, tensors = folder_of(tmp_path / "source", books, bits)
    model = qzo.from_pretrained(path, device="cpu")
    layer = model.get_submodule(LAYER)
    assert (layer.bits, layer.group_size, list(layer.codebooks.shape)) == (bits, 64, [books, 1 << bits, 8])
    torch.testing.assert_close(layer.dequantize().double(), decoded(tensors, LAYER), rtol=2e-6, atol=1e-6)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x).double(), x.double() @ decoded(tensors, LAYER).T, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("bits", FIXTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_step_without_a_rate_saves_the_same_bytes(tmp_path, bits, dtype):
    model = train(qzo.from_pretrained(FIXTURES[bits], device="cpu", dtype=dtype), 0.0, eps=0.1)
    qzo.save_pretrained(model, tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(FIXTURES[bits])


@pytest.mark.parametrize("bits", FIXTURES)
def test_a_step_changes_scales_and_nothing_else(tmp_path, bits):
    model = train(qzo.from_pretrained(FIXTURES[bits], device="cpu"), 0.1)
    report = qzo.save_pretrained(model, tmp_path / "out", BATCH)
    names = load_file(FIXTURES[bits] / "model.safetensors").keys()
    assert changed(FIXTURES[bits], tmp_path / "out") == {name for name in names if name.endswith(".scales")}
    again = qzo.from_pretrained(tmp_path / "out", device="cpu")
    assert float(qzo.losses(again, BATCH, 1)) == report["loss_after"]
    for name, scales in qzo.scales(model).items():
        torch.testing.assert_close(qzo.scales(again)[name], scales, rtol=2.0**-11, atol=0)


def test_no_other_format_holds_them(tmp_path):
    model = qzo.from_pretrained(FIXTURES[8], device="cpu")
    for name in ("gptq", "awq", "compressed-tensors"):
        with pytest.raises(ValueError, match="stand for vectors"):
            qzo.export(model, tmp_path / "no", format=name)
    with pytest.raises(ValueError, match="these have other codes"):
        qzo.export(model, tmp_path / "no", format="bitsandbytes")
    assert not (tmp_path / "no").exists()


# ---------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebooks": torch.zeros(2, 255, 1, 8)}, r"codebooks must be floats \[2, 256, 1, 8\], got .* \[2, 255"),
        ({"codebooks": torch.full((2, 256, 1, 8), float("nan"))}, "codebooks hold NaN or infinity"),
        ({"codebooks": None}, "no codebooks beside it"),
        ({"scales": None}, "no scales beside it"),
        ({"scales": torch.ones(3, 1, 1, 1)}, r"scales must be floats \[64, 1, 1, 1\], got torch.float32 \[3"),
        ({"scales": torch.full((64, 1, 1, 1), float("inf"))}, "scales hold NaN or infinity"),
        ({"codes": torch.zeros(64, 8, 2, dtype=torch.int16)}, "must be torch.int8"),
        ({"codes": torch.zeros(64, 8, 3, dtype=torch.int8)}, r"must be torch.int8 \[N, K/8, 2\]"),
        ({"codes": torch.zeros(64, 7, 2, dtype=torch.int8)}, r"has shape \[64, 56\]"),
    ],
)
def test_damaged_layers_are_one_clear_line(tmp_path, change, message):
    path, tensors = folder_of(tmp_path / "source")
    for part, value in change.items():
        tensors.pop(f"{LAYER}.{part}")
        if value is not None:
            tensors[f"{LAYER}.{part}"] = value
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message) as error:
        qzo.from_pretrained(path, device="cpu")
    assert f"{LAYER}.codes in model.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("codes", "scales", "books", "message"),
    [
        (torch.zeros(0, 8, 2, dtype=torch.int8), 0, (2, 256, 8), r"integers \[N, K/8, 2\], got torch.int8 \[0, 8, 2\]"),
        (torch.zeros(4, 0, 2, dtype=torch.int8), 4, (2, 256, 8), r"got torch.int8 \[4, 0, 2\]"),
        (torch.full((4, 8, 2), float("nan")), 4, (2, 256, 8), "got torch.float32"),
        (torch.zeros(4, 8, 2, dtype=torch.bool), 4, (2, 256, 8), "got torch.bool"),
        (torch.full((4, 8, 2), -1), 4, (2, 256, 8), r"in 0..255, the entries of a codebook; got -1 to -1"),
        (
            torch.zeros(4, 8, 2, dtype=torch.int8),
            3,
            (2, 256, 8),
            r"scales must be floats \[4\], got torch.float32 \[3\]",
        ),
        (torch.zeros(4, 8, 2, dtype=torch.int8), 4, (2, 200, 8), "codebooks must be floats"),
        (torch.zeros(4, 8, 2, dtype=torch.int8), 4, (2, 256, 4), "codebooks must be floats"),
    ],
)
def test_vectors_that_do_not_fit(codes, scales, books, message):
    with pytest.raises(ValueError, match=message):
        qzo.PackedWeight.from_vectors(codes, torch.ones(scales), torch.zeros(books))


def test_an_input_of_another_width_is_named():
    with pytest.raises(ValueError, match=r"x has 63 columns.*last dimension of its input must agree"):
        a_layer()(torch.randn(3, 63))


def test_a_code_beyond_its_codebook(tmp_path):
    path, tensors = folder_of(tmp_path / "source", 1, 12)
    tensors[f"{LAYER}.codes"][3, 2, 0] = 5000
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"codes must be in 0..4095, the entries of a codebook; got .* to 5000"):
        qzo.from_pretrained(path, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_group_size": 16}, "in_group_size is 16; AQLM vectors of 8 inputs"),
        ({"in_group_size": 8.0}, "in_group_size is 8.0"),
        ({"out_group_size": 2}, "out_group_size is 2; AQLM vectors of 8 inputs of one output"),
        ({"num_codebooks": 0}, "num_codebooks is 0; expected a whole number"),
        ({"nbits_per_codebook": 17}, "nbits_per_codebook is 17; expected a whole number from 1 to 16"),
        ({"nbits_per_codebook": "8"}, "nbits_per_codebook is '8'"),
    ],
)
def test_configs_that_are_refused(tmp_path, changes, message):
    path, _ = folder_of(tmp_path / "source")
    settle(path, **changes)
    with pytest.raises(ValueError, match=message):
        qzo.from_pretrained(path, device="cpu")


def test_a_copy_of_the_fixtures_is_what_is_trained(tmp_path):
    """The source is never written to, and has to be there when the model is saved."""
    shutil.copytree(FIXTURES[8], tmp_path / "source")
    model = train(qzo.from_pretrained(tmp_path / "source", device="cpu"), 0.1)
    with pytest.raises(ValueError, match="never overwritten"):
        qzo.save_pretrained(model, tmp_path / "source")
    old = tmp_path / "old"
    old.mkdir()
    (old / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index.json of another checkpoint, beside which readers would not find"):
        qzo.save_pretrained(model, old)
    assert [path.name for path in old.iterdir()] == ["model.safetensors.index.json"]
    shutil.rmtree(tmp_path / "source")
    with pytest.raises(FileNotFoundError, match="is gone"):
        qzo.save_pretrained(model, tmp_path / "out")


# --------------------------------------------------------------------------------------------------- inspected


def test_inspect(tmp_path, capsys):
    path, tensors = folder_of(tmp_path / "source")
    assert main(["inspect", str(path), "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == "aqlm"
    assert [(kind["bits"], kind["group_size"], kind["codebooks"], kind["layers"]) for kind in found["layers"]] == [
        (8, "row", 2, 14)
    ]
    model = qzo.from_pretrained(path, device="cpu")
    quantized = [module for module in model.modules() if isinstance(module, qzo.QZOLinear)]
    assert found["bytes"]["codes"] == sum(layer.codes.nbytes for layer in quantized)
    assert found["bytes"]["codebooks"] == sum(t.nbytes for name, t in tensors.items() if name.endswith(".codebooks"))
    assert found["trains"]["scales"] == sum(scales.numel() for scales in qzo.scales(model).values())
    assert main(["inspect", str(path), "--device", "cpu"]) == 0
    assert "14 of 2 codebooks of 8 bits, one scale a row: " in capsys.readouterr().out
