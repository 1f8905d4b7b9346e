"""`qzo export --round-zeros`: float zero points become integers where a format holds no others; the cost is told."""

import json

import pytest
import torch

import qzo
from qzo.checkpoints.integer_zeros import with_integer_zeros
from qzo.cli.main import main
from qzo.nn.weights import PackedWeight
from tests.checkpoints.formats.test_hqq import write as write_hqq
from tests.support.checkpoints import TYPES, quantized, write_gguf
from tests.support.paths import FIXTURES

IDS = torch.arange(24).view(2, 12)
FORMATS = ("gptq", "awq", "compressed-tensors")
AWQ = FIXTURES / "autoround-awq-zp-g128"


def load(path):
    return qzo.from_pretrained(path, device="cpu")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def relative(now, was):
    return float((now - was).norm() / was.norm())


@pytest.fixture(scope="module")
def q4_1(tmp_path_factory):
    path = tmp_path_factory.mktemp("q4_1") / "m.gguf"
    write_gguf(path, TYPES.Q4_1)
    return path


@pytest.fixture(scope="module", params=["gguf", "hqq"])
def source(request, q4_1, tmp_path_factory):
    return q4_1 if request.param == "gguf" else write_hqq(tmp_path_factory.mktemp("hqq") / "in")


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_exported_loads_with_the_same_codes_and_the_error_that_was_told(source, form, tmp_path):
    model = load(source)
    errors = qzo.export(model, tmp_path / "out", form, round_zeros=True)
    assert errors is not None
    exported = load(tmp_path / "out")
    old, new = quantized(model), quantized(exported)
    assert set(new) == set(old) == set(errors)
    for name, layer in new.items():
        assert torch.equal(layer.packed().unpacked(), old[name].packed().unpacked())
        assert layer.zeros is None or layer.zeros.dtype == torch.uint8
        assert relative(layer.dequantize(), old[name].dequantize()) == pytest.approx(errors[name], rel=1e-4)
        assert 0 < errors[name] < 0.15  # codes are uniform here: half a step over the spread of sixteen is 0.06
    assert 0 < relative(logits(exported), logits(model)) < 0.15


def test_scales_are_the_best_for_the_rounded_zero_points():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (8, 128), dtype=torch.uint8, generator=generator)
    scales = torch.rand(4, 8, generator=generator) + 0.5
    zeros = torch.rand(4, 8, generator=generator) * 19 - 2  # some beyond what a code can be
    weight = PackedWeight.from_codes(codes, scales, zeros)
    made, errors = with_integer_zeros({"a": weight})
    assert made["a"].zeros is not None
    assert torch.equal(made["a"].zeros.float(), zeros.round().clamp(0, 15))
    wanted = weight.dequantize()
    assert errors["a"] == pytest.approx(relative(made["a"].dequantize(), wanted), rel=1e-5)
    for factor in (0.99, 1.01):
        made["a"].scales *= factor
        moved = (made["a"].dequantize() - wanted).unflatten(1, (-1, 32)).square().sum(2)
        made["a"].scales /= factor
        best = (made["a"].dequantize() - wanted).unflatten(1, (-1, 32)).square().sum(2)
        assert bool((moved > best).all())


def test_integers_stay_as_they_are(tmp_path):
    assert qzo.export(load(AWQ), tmp_path / "a", "gptq", round_zeros=True) == {}
    assert qzo.export(load(AWQ), tmp_path / "b", "gptq") is None
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_formats_without_integers_need_no_rounding(q4_1, tmp_path):
    for form in ("gguf", "bitsandbytes"):
        with pytest.raises(
            ValueError, match="round_zeros is for formats that hold integer zero points only, awq, comp"
        ):
            qzo.export(load(q4_1), tmp_path / "out", form, round_zeros=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", FORMATS)
def test_the_command_refuses_before_it_loads(source, form, tmp_path, capsys):
    assert main(["export", str(source), "--to", form, "--output-dir", str(tmp_path / "out")]) == 2
    [line] = capsys.readouterr().err.splitlines()  # not even "loading"
    assert "_proj has a float minimum (GGUF Q4_1) or float zero points (HQQ), which " + form in line
    assert "qzo export --round-zeros" in line
    assert not (tmp_path / "out").exists()


def test_the_command_tells_what_it_cost(q4_1, tmp_path, capsys):
    line = ["export", str(q4_1), "--to", "gptq", "--round-zeros", "--device", "cpu", "--output-dir"]
    errors = qzo.export(load(q4_1), tmp_path / "same", "gptq", round_zeros=True)
    assert errors is not None
    assert main([*line, str(tmp_path / "a"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["rounded_zeros"]
    assert told["layers"] == len(errors)
    assert told["max"] == max(errors.values()) == errors[told["worst"]]
    assert told["mean"] == pytest.approx(sum(errors.values()) / len(errors))
    assert main([*line, str(tmp_path / "b")]) == 0
    text = capsys.readouterr().out
    assert (
        f"off by {told['mean']:.3f} of their size on the mean, by {told['max']:.3f} at most ({told['worst']})" in text
    )
    assert main(["export", str(AWQ), *line[2:], str(tmp_path / "c")]) == 0
    assert "all zero points were integers already" in capsys.readouterr().out
