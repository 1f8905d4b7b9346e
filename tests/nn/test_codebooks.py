"""Layers with codebooks, and codebooks that train: noise, derivative, saving, replay and the command line."""

import pytest
import torch

import qzo
from qzo.cli.main import main
from tests import oracle
from tests.support import tiny
from tests.support.aqlm_checkpoints import BATCH, FIXTURES, LAYER, a_layer, bytes_of, changed, folder_of, train
from tests.support.close import assert_same_bits

# ------------------------------------------------------------------------------------------------- the layer


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
            with qzo.evaluating(layer, qzo.Evaluations(seeds[e : e + 1], coefs[e : e + 1], "ih4")):
                assert_same_bits(stacked[2 * e : 2 * e + 2], layer(x))


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
    other.model.layers[0].mlp.down_proj.arena.data.view(-1)[-1].mul_(1.5)  # an entry of the last layer's
    with pytest.raises(ValueError, match="belongs to another model, or this model is"):
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
    with pytest.raises(ValueError, match="belongs to another model, or this model is"):
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
    qzo.train_only_(model, lambda name: name.startswith("model.layers.1."))
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


# ------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("layers", ["2", "1"])
def test_train_and_replay_codebooks(tmp_path, capsys, layers):
    path, _ = folder_of(tmp_path / "source")
    data = tiny.write_jsonl(tmp_path / "train.jsonl", tiny.RECORDS)
    out = tmp_path / "out"
    assert (
        main(
            [
                "train",
                "--model",
                str(path),
                "--data",
                str(data),
                "--output-dir",
                str(out),
                "--device",
                "cpu",
                "--max-steps",
                "3",
                "--batch-size",
                "4",
                "--directions",
                "1",
                "--train-layers",
                layers,
                "--train-codebooks",
            ]
        )
        == 0
    )
    count = 7 * int(layers)
    assert f"and {count * 2 * 256 * 8:,} numbers of codebooks of" in capsys.readouterr().err
    assert {name.rpartition(".")[2] for name in changed(path, out / "model")} == {"codebooks", "scales"}
    again = tmp_path / "again"
    assert main(["replay", str(path), str(out / "journal.qzo"), "--output-dir", str(again), "--device", "cpu"]) == 0
    assert bytes_of(again) == bytes_of(out / "model")


def test_row_sharing_is_refused_before_anything_is_written(tmp_path, capsys):
    path, _ = folder_of(tmp_path / "source")
    data = tiny.write_jsonl(tmp_path / "train.jsonl", tiny.RECORDS)
    assert (
        main(
            [
                "train",
                "--model",
                str(path),
                "--data",
                str(data),
                "--output-dir",
                str(tmp_path / "out"),
                "--device",
                "cpu",
                "--train-codebooks",
                "--sharing",
                "row",
            ]
        )
        == 2
    )
    assert "sharing='row' has one z" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*"))


def test_codebooks_that_are_not_there_are_one_clear_line(tmp_path, capsys):
    tiny.save_checkpoint(tmp_path / "float")
    data = tiny.write_jsonl(tmp_path / "train.jsonl", tiny.RECORDS)
    out = tmp_path / "out"
    assert (
        main(
            [
                "train",
                "--model",
                str(tmp_path / "float"),
                "--data",
                str(data),
                "--output-dir",
                str(out),
                "--group-size",
                "32",
                "--device",
                "cpu",
                "--train-codebooks",
            ]
        )
        == 2
    )
    assert "that trains has codebooks" in capsys.readouterr().err
