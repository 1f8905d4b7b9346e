"""auto-round's folders: which module reads them, as what, and what is refused."""

import re

import pytest
import torch

from qzo.checkpoints.formats import auto_round, awq, gptq
from tests.support.checkpoints import quantized
from tests.support.gptq_checkpoints import awq_layer, decode_folder, load, write_gptq


@pytest.mark.parametrize("bits", [2, 4])
def test_auto_round_with_layers_of_their_own(tmp_path, bits):
    extra = {
        "model.layers.1.mlp.up_proj": {"bits": 8},
        ".*down_proj$": {"bits": 8, "group_size": -1},
        "lm_head": {"bits": 16},
        "model.layers.0.mlp.up_proj": {"bits": 8, "sym": True},
    }
    folder = write_gptq(
        tmp_path / "in",
        bits,
        by_layer={"up_proj": (8, 32), "down_proj": (8, -1)},
        layers=2,
        sym=True,
        zeros="middle",
        quant_method="auto-round",
        packing_format="auto_round:auto_gptq",
        extra_config=extra,
        dynamic={".*(up|down)_proj": {"bits": 8}},
    )
    expected = decode_folder(folder)
    for name, layer in quantized(load(folder)).items():
        assert torch.equal(layer.dequantize(), expected[name]), name


def test_auto_round_in_awqs_layout(tmp_path):
    folder = write_gptq(
        tmp_path / "in",
        layer=awq_layer,
        quant_method="auto-round",
        data_type="int",
        packing_format="auto_round:auto_awq",
    )
    expected = decode_folder(folder)
    for name, layer in quantized(load(folder)).items():
        assert torch.equal(layer.dequantize(), expected[name]), name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"packing_format": "auto_round:gptq"}, "packing_format 'auto_round:gptq'; supported are int in auto_round"),
        ({"packing_format": ["x"]}, "packing_format"),
        ({"packing_format": None}, "packing_format 'None'"),
        ({"data_type": "mx_fp"}, "data_type 'mx_fp'"),
        ({"act_bits": 8}, r"activations are quantized too \(act_bits 8\)"),
        ({"extra_config": {"x": 4}}, "extra_config must be layers and what they change"),
        ({"extra_config": {"re:(": {"bits": 4}}}, "is no regular expression"),
    ],
)
def test_auto_round_refused(tmp_path, config, message):
    folder = write_gptq(
        tmp_path / "in", **{"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", **config}
    )
    with pytest.raises(ValueError, match=message):
        load(folder)


# ------------------------------------------------------------------------------------- as the other modules read it

SAID = {"bits": 4, "group_size": 32, "sym": True}


def test_the_packing_names_the_module():
    form, plain = auto_round.check_config(SAID | {"packing_format": "auto_round:auto_gptq"}, "here")
    assert form is gptq
    assert plain == SAID | {"dynamic": {}}
    form, plain = auto_round.check_config(SAID | {"packing_format": "auto_round:auto_awq"}, "here")
    assert form is awq
    assert plain == SAID | {"version": "gemm", "zero_point": False}


@pytest.mark.parametrize(
    ("sym", "extra", "zero_point"),
    [(True, {}, False), (False, {}, True), (True, {"x": {"sym": False}}, True), (True, {"x": {"bits": 4}}, False)],
)
def test_awqs_zero_points_are_there_where_any_layer_is_asymmetric(sym, extra, zero_point):
    said = SAID | {"sym": sym, "packing_format": "auto_round:auto_awq", "extra_config": extra}
    assert auto_round.check_config(said, "here")[1]["zero_point"] == zero_point


def test_names_come_before_patterns_and_a_dot_is_a_dot():
    """Of gptq.py's `dynamic` the first that matches counts; a name with a sign of patterns is one, found anywhere."""
    extra = {"(down)": {"bits": 2}, "a.up": {"bits": 8}}
    _, plain = auto_round.check_config(SAID | {"packing_format": "auto_round:auto_gptq", "extra_config": extra}, "here")
    assert list(plain["dynamic"].values())[:2] == [{"bits": 2}, {"bits": 8}]
    matches = {
        layer: [next(iter(change.values())) for pattern, change in plain["dynamic"].items() if re.match(pattern, layer)]
        for layer in ("a.up", "aXup", "a.upper", "x.down", "x.y.down_proj")
    }
    assert matches == {"a.up": [8], "aXup": [], "a.upper": [], "x.down": [2], "x.y.down_proj": [2]}
