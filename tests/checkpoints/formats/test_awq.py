"""AWQ folders, made for what those of the tool lack, and what of them is refused."""

import pytest
import torch

import qzo
from tests.support.checkpoints import quantized
from tests.support.close import assert_same_bits
from tests.support.gptq_checkpoints import (
    LAYER,
    WHERE,
    awq_layer,
    contents,
    decode_folder,
    drop,
    first,
    load,
    put,
    say,
    step,
    write_awq,
    write_gptq,
)


@pytest.mark.parametrize(
    ("size", "config"),
    [
        (32, {"version": "gemm", "zero_point": True}),
        (-1, {"version": "GEMM", "zero_point": True}),
        (96, {"checkpoint_format": "gemm", "format": "gemm", "zero_point": False}),
    ],
)
def test_awq(tmp_path, size, config):
    folder = write_gptq(
        tmp_path / "in",
        size=-1 if size == 96 else size,
        layer=awq_layer,
        quant_method="awq",
        zeros="any" if config["zero_point"] else "middle",
        **config,
    )
    found, expected = quantized(load(folder)), decode_folder(folder)
    for name, layer in found.items():
        assert torch.equal(layer.dequantize(), expected[name]), name
    assert (found[LAYER].zeros is None) != config["zero_point"]


def test_awq_takes_dense_tensors_of_any_dtype(tmp_path):
    norm = torch.randn(96)
    folder = write_awq(tmp_path / "in", change=lambda tensors: tensors.update({"model.norm.weight": norm}))
    model = load(folder)
    assert_same_bits(model.model.norm.weight.detach(), norm)
    step(model, 0.0)
    qzo.save_pretrained(model, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(folder)


# ------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (
            {"version": "marlin"},
            None,
            "in: AWQ weights in version 'marlin'; supported are 'gemm', 'gemv', 'gemv_fast': ",
        ),
        ({"version": "gemv_fast"}, None, r"no \S+\.scaled_zeros beside it"),
        ({"version": "marlin"}, None, "'marlin'"),
        ({"w_bit": 8}, None, "in: the quantization_config says bits 4 and w_bit 8, which are two names of one setting"),
        ({"q_group_size": 64}, None, "says group_size 32 and q_group_size 64, which"),
        ({"version": 4}, None, "AWQ weights in version 4"),
        ({"bits": 8}, None, "bits is 8; supported are 4"),
        ({"group_size": 64}, None, "no multiple of group_size 64"),
        ({}, drop("qzeros"), WHERE + rf"no {LAYER}\.qzeros beside it"),
        ({}, put("qzeros", lambda t: t[:, :-1]), WHERE + r"qzeros must be int32 \[3, 20\], got \[3, 19\]"),
        ({}, put("qweight", lambda t: t[:, :-1]), WHERE + r"scales must be floats \[3, 152\] for 96 inputs"),
        ({}, put("scales", first(float("nan"))), WHERE + "scales hold NaN"),
    ],
)
def test_awq_refused(tmp_path, config, tensors, message):
    folder = write_gptq(tmp_path / "in", layer=awq_layer, change=tensors)
    say(folder, {"quant_method": "awq", "version": "gemm", **config})
    with pytest.raises(ValueError, match=message):
        load(folder)
