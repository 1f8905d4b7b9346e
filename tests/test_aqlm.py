"""AQLM folders: the tool's files, made ones, saving, codebooks that train, and what is refused."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qzo
from qzo.__main__ import main
from qzo.kernels import perturb
from qzo.kernels.noise import LAWS
from tests import oracle, tiny
from tests.close import assert_same_bits

FIXTURES = {bits: Path(__file__).parent / f"fixtures/aqlm-{books}x{bits}-g8" for books, bits in ((1, 12), (2, 8))}
LAYER = "model.layers.0.mlp.down_proj"
BATCH = {"input_ids": torch.arange(1, 25).view(2, 12), "labels": torch.arange(1, 25).view(2, 12)}


def decoded(tensors, layer):
    """float64 [N, K] of a layer, vector by vector."""
    codes, books, scales = (tensors[f"{layer}.{part}"] for part in ("codes", "codebooks", "scales"))
    index = codes.long() % books.shape[1]
    vectors = sum(books.double()[c, :, 0][index[:, :, c]] for c in range(codes.shape[2]))
    return vectors.flatten(1) * scales.double().view(-1, 1)


def vector_tensors(weight, books, bits, generator):
    """The tensors of a layer in AQLM's layout: random codes for vectors of the size of a float weight's [N, K]."""
    n, k = weight.shape
    codes = torch.randint(0, 1 << bits, (n, k // 8, books), generator=generator)
    signed = torch.where(codes >= 1 << bits - 1, codes - (1 << bits), codes)
    codebooks = torch.randn(books, 1 << bits, 1, 8, generator=generator) / books**0.5
    return {"codes": signed.to(torch.int8 if bits <= 8 else torch.int16), "codebooks": codebooks.half(),
            "scales": (weight.std(1) * (0.5 + torch.rand(n, generator=generator))).half().view(n, 1, 1, 1)}


def folder_of(path, books=2, bits=8):
    """A folder of a tiny Llama; returns (path, its tensors)."""
    tiny.save_checkpoint(path)
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(path / "model.safetensors")
    for name in sorted(name for name in tensors if name.endswith("_proj.weight")):
        made = vector_tensors(tensors.pop(name).float(), books, bits, generator)
        tensors |= {f"{name.removesuffix('.weight')}.{part}": value for part, value in made.items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    settle(path, num_codebooks=books, nbits_per_codebook=bits)
    return path, tensors


def settle(path, **changes):
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "aqlm", "in_group_size": 8, "out_group_size": 1,
                                     "num_codebooks": 2, "nbits_per_codebook": 8,
                                     "linear_weights_not_to_quantize": ["lm_head"]} | changes
    (path / "config.json").write_text(json.dumps(config))


def train(model, lr, steps=1, **options):
    optimizer = qzo.QZO(model, lr=lr, **options)
    for _ in range(steps):
        optimizer.step(lambda: qzo.losses(model, BATCH, 2 * optimizer.param_groups[0]["directions"]))
    optimizer.close()
    return model


def bytes_of(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def changed(before, after):
    before, after = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


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
        torch.testing.assert_close(model.get_submodule(layer).dequantize().double(), decoded(tensors, layer),
                                   rtol=2e-6, atol=1e-6)


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
    for format in ("gptq", "awq", "compressed-tensors"):
        with pytest.raises(ValueError, match="stand for vectors"):
            qzo.export(model, tmp_path / "no", format=format)
    with pytest.raises(ValueError, match="these have other codes"):
        qzo.export(model, tmp_path / "no", format="bitsandbytes")
    assert not (tmp_path / "no").exists()


# ------------------------------------------------------------------------------------------------- the layer

def a_layer(books=2, bits=8, n=24, k=128):
    random = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (n, k // 8, books), generator=random)
    packed = qzo.PackedWeight.from_vectors(codes, torch.rand(n, generator=random) - 0.5,
                                           torch.randn(books, 1 << bits, 8, generator=random))
    return qzo.QZOLinear.from_packed(packed)


def slope(layer, raw_codebooks=None):
    """d W / d coef, float64 [N, K], of relative Rademacher noise of seed 3 on what trains."""
    index = qzo.scale_index(layer)[""]
    z = qzo.noise("rademacher", 3, index).double()
    moved = layer.dequantize().double() * z.T
    if raw_codebooks is not None:
        packed = layer.packed()
        books = packed.codebooks.double() * raw_codebooks.double()
        codes = packed.unpacked().long()
        moved += packed.scales.T.double() * sum(books[c][codes[:, :, c]] for c in range(packed.books)).flatten(1)
    return moved


def measured_slope(layer, x, eps=3e-2):
    with qzo.evaluating(layer, qzo.Evaluations([3, 3], [eps, -eps])):
        plus, minus = layer(x.repeat(2, 1)).double().split(len(x))
    return (plus - minus) / (2 * eps)


@pytest.mark.parametrize("books_train", [False, True])
def test_the_derivative(books_train):
    layer, raw = a_layer(), None
    if books_train:
        assert qzo.train_codebooks_(layer) == [""]
        slot = layer.arena.slots[".codebooks"]
        at = 4 * slot.base4 + torch.arange(layer.codebooks.numel()).view(layer.codebooks.shape)
        raw = qzo.noise("rademacher", 3, at)
        assert_same_bits(raw, oracle.raw_at("rademacher", 3, at).float())
    x = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    want = x.double() @ slope(layer, raw).T
    assert float((measured_slope(layer, x) - want).norm() / want.norm()) < 1e-5


@pytest.mark.usefixtures("nan_poison")
@pytest.mark.parametrize("law", ["rademacher", "ih4"])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("base4", [0, 2**32 - 10])
def test_perturbed_codebooks_have_the_bits_of_their_twin(law, relative, base4):
    values = torch.randn(300, 4, generator=torch.Generator().manual_seed(1))
    seed, coef = torch.tensor([-7]), torch.tensor([oracle.raw_coef(law, -0.3)])
    ours, twin = torch.empty(300, 4), torch.empty(300, 4)
    perturb.launch(values, seed, coef, ours, base4=base4, law=LAWS[law], relative=relative)
    perturb.perturb_codebooks_torch(values, seed, coef, twin, base4=base4, law=LAWS[law], relative=relative)
    assert_same_bits(ours, twin)
    k, c = oracle.raw_at(law, -7, 4 * base4 + torch.arange(1200).view(300, 4)), float(coef)
    factor = (1 + c * k).float().double()
    assert_same_bits(ours, (values.double() * factor if relative else values.double() + c * k).float())


def test_codebooks_larger_than_a_block_of_noise(monkeypatch):
    values, seed, coef = torch.randn(300, 4), torch.tensor([5]), torch.tensor([0.05])
    whole, parts = torch.empty(300, 4), torch.empty(300, 4)
    perturb.perturb_codebooks_torch(values, seed, coef, whole, base4=7, law=LAWS["ih4"], relative=True)
    monkeypatch.setattr(perturb, "BLOCK_QUADS", 64)
    perturb.perturb_codebooks_torch(values, seed, coef, parts, base4=7, law=LAWS["ih4"], relative=True)
    assert_same_bits(parts, whole)


def test_a_state_dict_carries_the_codebooks():
    layer, other = a_layer(), a_layer()
    with torch.no_grad():
        other.codebooks.mul_(2)
    qzo.train_codebooks_(other)
    other.load_state_dict(layer.state_dict())
    assert_same_bits(other.dequantize(), layer.dequantize())
    with pytest.raises(RuntimeError, match="holds 4 codebooks, the layer has 2"):
        other.load_state_dict(a_layer(4).state_dict())
    damaged = layer.state_dict() | {"codebooks": layer.codebooks[:, :64]}
    with pytest.raises(RuntimeError, match=r"codebooks must be floats .* got torch.float32 \[2, 64, 8\] for 8 bits"):
        other.load_state_dict(damaged)
    twelve = a_layer(1, 12)
    damaged = twelve.state_dict()
    damaged["codes"] = damaged["codes"].clone()
    damaged["codes"][0, 0, 0] = 1 << 12
    with pytest.raises(RuntimeError, match="beyond the 4096 entries"):
        twelve.load_state_dict(damaged)


@pytest.mark.parametrize("train", [False, True])
def test_codebooks_keep_their_type_and_are_read_in_that_of_the_input(train):
    layer, x = a_layer(), torch.randn(3, 128).half()
    before = layer.dequantize()
    if train:
        qzo.train_codebooks_(layer)
    half = layer.half()
    assert half.codebooks.dtype == torch.float32
    assert_same_bits(half.dequantize(), before)
    with qzo.backend("triton"):
        kernel = half(x)
    torch.testing.assert_close(kernel, half(x), rtol=1e-3, atol=1e-3)
    assert layer.to("meta").codebooks.is_meta


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_stacked_evaluations_have_the_bits_of_single_ones_where_codebooks_train(backend):
    layer, x = a_layer(3), torch.randn(2, 128).half()
    qzo.train_codebooks_(layer)
    seeds, coefs = [3, 3, 4], [0.1, -0.1, 0.05]
    with qzo.backend(backend):
        with qzo.evaluating(layer, qzo.Evaluations(seeds, coefs, "ih4")):
            stacked = layer(x.repeat(3, 1))
        for e in range(3):
            with qzo.evaluating(layer, qzo.Evaluations(seeds[e:e + 1], coefs[e:e + 1], "ih4")):
                assert_same_bits(stacked[2 * e:2 * e + 2], layer(x))


# ---------------------------------------------------------------------------------------- codebooks that train

def test_codebooks_train_are_saved_and_replayed(tmp_path):
    path, _ = folder_of(tmp_path / "source")

    def begin():
        model = qzo.from_pretrained(path, device="cpu")
        assert qzo.codebooks(model) == {}
        qzo.train_codebooks_(model)
        return model
    model, first = begin(), begin()
    base = qzo.codebooks(model)
    assert len(base) == 14
    train(model, 0.05, steps=3, directions=2, journal=tmp_path / "journal.qzo")
    tuned = qzo.codebooks(model)
    assert all(bool((tuned[name] != base[name]).any()) for name in base)
    assert all(torch.equal(tuned[name].sign(), base[name].sign()) for name in base)
    assert qzo.replay(first, tmp_path / "journal.qzo") == 3
    for name, books in qzo.codebooks(first).items():
        assert_same_bits(books, tuned[name])
    other = begin()
    other.model.layers[0].mlp.down_proj.arena.data.view(-1)[-1].mul_(1.5)         # an entry of the last layer's
    with pytest.raises(ValueError, match="digest"):
        qzo.replay(other, tmp_path / "journal.qzo")
    report = qzo.save_pretrained(model, tmp_path / "out", BATCH)
    parts = {name.rpartition(".")[2] for name in changed(path, tmp_path / "out")}
    assert parts == {"codebooks", "scales"}
    assert float(qzo.losses(qzo.from_pretrained(tmp_path / "out", device="cpu"), BATCH, 1)) == report["loss_after"]
    with pytest.raises(ValueError, match="another model"):
        qzo.replay(qzo.from_pretrained(path, device="cpu"), tmp_path / "journal.qzo")


@pytest.mark.parametrize("bits", FIXTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_without_a_rate_trained_codebooks_are_saved_as_they_were(tmp_path, bits, dtype):
    model = qzo.from_pretrained(FIXTURES[bits], device="cpu", dtype=dtype)
    qzo.train_codebooks_(model)
    qzo.save_pretrained(train(model, 0.0, eps=0.1), tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(FIXTURES[bits])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codebooks_that_trained_and_were_frozen_are_saved(tmp_path, dtype):
    path, _ = folder_of(tmp_path / "source")
    model, other = (qzo.from_pretrained(path, device="cpu", dtype=dtype) for _ in range(2))
    qzo.train_codebooks_(model)
    train(model, 0.2, eps=0.1)
    other.load_state_dict(model.state_dict())
    qzo.train_codebooks_(model, train=False)
    for number, tuned in enumerate((model, other)):
        out = tmp_path / f"out{number}"
        report = qzo.save_pretrained(tuned, out, BATCH)
        assert {name.rpartition(".")[2] for name in changed(path, out)} == {"codebooks", "scales"}
        again = qzo.from_pretrained(out, device="cpu", dtype=dtype)
        assert float(qzo.losses(again, BATCH, 1)) == report["loss_after"]
    assert bytes_of(tmp_path / "out0") == bytes_of(tmp_path / "out1")


def test_a_run_in_16_bits_is_replayed_in_32(tmp_path):
    path, _ = folder_of(tmp_path / "source")
    model, other = (qzo.from_pretrained(path, device="cpu", dtype=d) for d in (torch.bfloat16, torch.float32))
    for one in (model, other):
        qzo.train_codebooks_(one)
    train(model, 0.1, eps=0.1, journal=tmp_path / "journal.qzo")
    assert qzo.replay(other, tmp_path / "journal.qzo") == 1
    for name, books in qzo.codebooks(model).items():
        assert_same_bits(qzo.codebooks(other)[name], books)


def test_frozen_codebooks_are_in_the_digest(tmp_path):
    path, _ = folder_of(tmp_path / "source")
    model, other = (qzo.from_pretrained(path, device="cpu") for _ in range(2))
    train(model, 0.1, journal=tmp_path / "journal.qzo")
    other.get_submodule(LAYER).codebooks.mul_(3)
    with pytest.raises(ValueError, match="digest"):
        qzo.replay(other, tmp_path / "journal.qzo")


def test_codebooks_of_some_layers_are_replayed(tmp_path):
    path, _ = folder_of(tmp_path / "source")
    model = qzo.from_pretrained(path, device="cpu")
    qzo.train_codebooks_(model.model.layers[1])
    train(model, 0.1, journal=tmp_path / "journal.qzo")
    assert len(qzo.codebooks(model)) == 7
    qzo.save_pretrained(model, tmp_path / "out")
    again = tmp_path / "again"
    journal = str(tmp_path / "journal.qzo")
    assert main(["replay", str(path), journal, "--output-dir", str(again), "--device", "cpu"]) == 0
    assert bytes_of(again) == bytes_of(tmp_path / "out")


def test_codebooks_that_diverged_are_not_written(tmp_path):
    path, _ = folder_of(tmp_path / "source")
    model = qzo.from_pretrained(path, device="cpu")
    qzo.train_codebooks_(model)
    model.get_submodule(LAYER).arena.data[-1] = torch.nan
    with pytest.raises(ValueError, match="a number of a codebook is NaN or infinite; the run has diverged"):
        qzo.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_codebooks_stop_training():
    layer = a_layer()
    before = layer.dequantize()
    qzo.train_codebooks_(layer)
    assert set(layer.arena.slots) == {"", ".codebooks"}
    assert_same_bits(layer.dequantize(), before)
    qzo.train_codebooks_(layer, train=False)
    assert set(layer.arena.slots) == {""}
    assert_same_bits(layer.dequantize(), before)


def test_frozen_layers_keep_the_codebooks_they_have(tmp_path):
    path, _ = folder_of(tmp_path / "source")
    model = qzo.from_pretrained(path, device="cpu")
    qzo.train_codebooks_(model)
    train(model, 0.05)
    tuned = qzo.codebooks(model)
    qzo.train_only(model, lambda name: name.startswith("model.layers.1."))
    file = qzo.from_pretrained(path, device="cpu").get_submodule(LAYER).codebooks
    assert file.dtype == torch.float16
    assert set(qzo.codebooks(model)) == {name for name in tuned if name.startswith("model.layers.1.")}
    assert_same_bits(model.get_submodule(LAYER).codebooks, tuned[LAYER].half())
    assert bool((model.get_submodule(LAYER).codebooks != file).any())


def test_an_evaluation_of_coefficient_zero_is_the_plain_forward():
    layer = a_layer()
    qzo.train_codebooks_(layer)
    x = torch.randn(4, 128)
    with qzo.evaluating(layer, qzo.Evaluations([3, 3, 4], [0.1, 0.0, -0.1])):
        stacked = layer(x.repeat(3, 1))
    assert_same_bits(stacked[4:8], layer(x))


def test_what_cannot_train(tmp_path):
    with pytest.raises(ValueError, match="no layer of Sequential that trains has codebooks"):
        qzo.train_codebooks_(torch.nn.Sequential(qzo.QZOLinear(64, 8, group_size=64)))
    layer = a_layer()
    qzo.train_codebooks_(layer)
    evaluations = qzo.Evaluations([3], [0.1], sharing="row")
    with pytest.raises(ValueError, match="sharing='row' has one z"), qzo.evaluating(layer, evaluations):
        pass
    with pytest.raises(ValueError, match="sharing='row' has one z"):
        qzo.QZO(layer, 0.1, sharing="row", journal=tmp_path / "journal.qzo")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------- refused

@pytest.mark.parametrize(("change", "message"), [
    ({"codebooks": torch.zeros(2, 255, 1, 8)}, r"codebooks must be floats \[2, 256, 1, 8\], got .* \[2, 255"),
    ({"codebooks": torch.full((2, 256, 1, 8), float("nan"))}, "codebooks hold NaN or infinity"),
    ({"codebooks": None}, "no codebooks beside it"),
    ({"scales": None}, "no scales beside it"),
    ({"scales": torch.ones(3, 1, 1, 1)}, r"scales must be floats \[64, 1, 1, 1\], got torch.float32 \[3"),
    ({"scales": torch.full((64, 1, 1, 1), float("inf"))}, "scales hold NaN or infinity"),
    ({"codes": torch.zeros(64, 8, 2, dtype=torch.int16)}, "must be torch.int8"),
    ({"codes": torch.zeros(64, 8, 3, dtype=torch.int8)}, r"must be torch.int8 \[N, K/8, 2\]"),
    ({"codes": torch.zeros(64, 7, 2, dtype=torch.int8)}, r"has shape \[64, 56\]"),
])
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


@pytest.mark.parametrize(("codes", "scales", "books", "message"), [
    (torch.zeros(0, 8, 2, dtype=torch.int8), 0, (2, 256, 8), r"integers \[N, K/8, 2\], got torch.int8 \[0, 8, 2\]"),
    (torch.zeros(4, 0, 2, dtype=torch.int8), 4, (2, 256, 8), r"got torch.int8 \[4, 0, 2\]"),
    (torch.full((4, 8, 2), float("nan")), 4, (2, 256, 8), "got torch.float32"),
    (torch.zeros(4, 8, 2, dtype=torch.bool), 4, (2, 256, 8), "got torch.bool"),
    (torch.full((4, 8, 2), -1), 4, (2, 256, 8), r"in 0..255, the entries of a codebook; got -1 to -1"),
    (torch.zeros(4, 8, 2, dtype=torch.int8), 3, (2, 256, 8), r"scales must be floats \[4\], got torch.float32 \[3\]"),
    (torch.zeros(4, 8, 2, dtype=torch.int8), 4, (2, 200, 8), "codebooks must be floats"),
    (torch.zeros(4, 8, 2, dtype=torch.int8), 4, (2, 256, 4), "codebooks must be floats"),
])
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


@pytest.mark.parametrize(("changes", "message"), [
    ({"in_group_size": 16}, "in_group_size is 16; AQLM vectors of 8 inputs"),
    ({"in_group_size": 8.0}, "in_group_size is 8.0"),
    ({"out_group_size": 2}, "out_group_size is 2; AQLM vectors of 8 inputs of one output"),
    ({"num_codebooks": 0}, "num_codebooks is 0; a whole number"),
    ({"nbits_per_codebook": 17}, "nbits_per_codebook is 17; a whole number from 1 to 16"),
    ({"nbits_per_codebook": "8"}, "nbits_per_codebook is '8'"),
])
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


# ------------------------------------------------------------------------------------------- the command line

@pytest.mark.parametrize("layers", ["2", "1"])
def test_train_and_replay_codebooks(tmp_path, capsys, layers):
    path, _ = folder_of(tmp_path / "source")
    data = tiny.write_jsonl(tmp_path / "train.jsonl", tiny.RECORDS)
    out = tmp_path / "out"
    assert main(["train", "--model", str(path), "--data", str(data), "--output-dir", str(out), "--device", "cpu",
                 "--max-steps", "3", "--batch-size", "4", "--directions", "1", "--train-layers", layers,
                 "--train-codebooks"]) == 0
    count = 7 * int(layers)
    assert f"and {count * 2 * 256 * 8:,} numbers of codebooks train" in capsys.readouterr().err
    assert {name.rpartition(".")[2] for name in changed(path, out / "model")} == {"codebooks", "scales"}
    again = tmp_path / "again"
    assert main(["replay", str(path), str(out / "journal.qzo"), "--output-dir", str(again), "--device", "cpu"]) == 0
    assert bytes_of(again) == bytes_of(out / "model")


def test_row_sharing_is_refused_before_anything_is_written(tmp_path, capsys):
    path, _ = folder_of(tmp_path / "source")
    data = tiny.write_jsonl(tmp_path / "train.jsonl", tiny.RECORDS)
    assert main(["train", "--model", str(path), "--data", str(data), "--output-dir", str(tmp_path / "out"), "--device",
                 "cpu", "--train-codebooks", "--sharing", "row"]) == 2
    assert "sharing='row' has one z" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*"))


def test_codebooks_that_are_not_there_are_one_clear_line(tmp_path, capsys):
    tiny.save_checkpoint(tmp_path / "float")
    data = tiny.write_jsonl(tmp_path / "train.jsonl", tiny.RECORDS)
    out = tmp_path / "out"
    assert main(["train", "--model", str(tmp_path / "float"), "--data", str(data), "--output-dir", str(out),
                 "--group-size", "32", "--device", "cpu", "--train-codebooks"]) == 2
    assert "that trains has codebooks" in capsys.readouterr().err


def test_inspect(tmp_path, capsys):
    path, tensors = folder_of(tmp_path / "source")
    assert main(["inspect", str(path), "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == "aqlm"
    assert [(kind["bits"], kind["group_size"], kind["codebooks"], kind["layers"]) for kind in found["layers"]] == [
        (8, "row", 2, 14)]
    model = qzo.from_pretrained(path, device="cpu")
    quantized = [module for module in model.modules() if isinstance(module, qzo.QZOLinear)]
    assert found["bytes"]["codes"] == sum(layer.codes.nbytes for layer in quantized)
    assert found["bytes"]["codebooks"] == sum(t.nbytes for name, t in tensors.items() if name.endswith(".codebooks"))
    assert found["trains"]["scales"] == sum(scales.numel() for scales in qzo.scales(model).values())
    assert main(["inspect", str(path), "--device", "cpu"]) == 0
    assert "14 of 2 codebooks of 8 bits, one scale a row: " in capsys.readouterr().out
