"""What a checkpoint's config says and what its tensors say: where the two differ, nothing is read wrongly in silence.

format               config says                tensors say                    outcome
GPTQ, auto-round     checkpoint_format, sym     all qzeros of another version  the words are read, one warning
                     sym true                   qzeros of no version           refused
                     bits, group_size           shapes of qweight, scales      refused
                     desc_act false             g_idx in another order         g_idx is read, one warning
                     desc_act true              no g_idx                       refused
AWQ                  zero_point false           qzeros other than 8            refused
                     version gemm               gemv's shapes                  refused
                     bits, group_size           shapes                         refused
compressed-tensors   symmetric                  weight_zero_point, others      refused
                     not symmetric              no weight_zero_point           refused
                     num_bits, group_size       shapes, weight_shape           refused
                     actorder group             no weight_g_idx                refused
                     no actorder                weight_g_idx in another order  it is read, one warning
bitsandbytes         quant_type of quant_state  quant_map of another table     refused
                     blocksize                  absmax                         refused (test_bnb.py)
HQQ, AQLM            every field                shapes                         refused (test_hqq.py, test_aqlm.py)
all                  layers that stay dense     tensors of codes               the tensors are read, as by the tools
                     one quantization_config    a weight stored twice, or as   refused
                                                integers without scales
                     tie_word_embeddings        another lm_head                it is read, transformers warns
"""

import functools
import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qzo
from qzo.checkpoints.formats import FOLDERS
from qzo.checkpoints.source import source_of
from tests.checkpoints.formats.test_bnb import TENSOR, folder_of, packed_tensors
from tests.support.checkpoints import pack_stream, quantized, write_compressed
from tests.support.close import assert_same_bits
from tests.support.gptq_checkpoints import (
    LAYER,
    WHERE,
    contents,
    gptq_layer,
    load,
    put,
    say,
    step,
    write_awq,
    write_gptq,
)

NAMES = {1: "gptq", 2: "gptq_v2"}


def loaded(folder):
    """(the model, the texts of the warnings)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load(folder)
    return model, [str(warning.message) for warning in caught]


def symmetric(folder, bits, stored, **config):
    """A GPTQ folder of symmetric layers with zero points stored as version `stored` has them."""
    return write_gptq(folder, bits, zeros="middle", layer=functools.partial(gptq_layer, version=stored), **config)


def stored_as(bits, value):
    """A change of LAYER: all its zero points stored as this number."""
    return put("qzeros", lambda t: pack_stream(torch.full((len(t), t.shape[1] * 32 // bits), value), bits))


# ------------------------------------------------------------------------------------- GPTQ's zero points


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("said", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("stored", [1, 2])
def test_symmetric_zero_points_are_the_middle_however_they_are_stored(tmp_path, bits, said, stored):
    config = {} if said is None else {"checkpoint_format": said}
    folder = symmetric(tmp_path / "in", bits, stored, sym=True, meta={"quantizer": ["gptqmodel:5.7.0"]}, **config)
    want = load(symmetric(tmp_path / "plain", bits, 1))
    model, told = loaded(folder)
    for name, layer in quantized(want).items():
        assert_same_bits(quantized(model)[name].dequantize(), layer.dequantize())
    assert len(told) == (NAMES[stored] != (said or "gptq"))
    assert all(f"not {2 ** (bits - 1)}: they are stored as '{NAMES[stored]}' has them" in text for text in told)
    step(model, 0.0)
    qzo.save_pretrained(model, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(folder)


def test_transformers_own_loading_reads_the_words_too(tmp_path):
    folder = symmetric(tmp_path / "in", 4, 2, sym=True)
    with qzo.loading(), pytest.warns(UserWarning, match=r"as 9, not 8"):
        model = AutoModelForCausalLM.from_pretrained(folder)
    want = load(symmetric(tmp_path / "plain", 4, 1))
    for name, layer in quantized(want).items():
        assert_same_bits(quantized(model)[name].dequantize(), layer.dequantize())
    model.save_pretrained(tmp_path / "out")
    got = load_file(tmp_path / "out/model.safetensors")
    assert_same_bits(got[f"{LAYER}.qzeros"], load_file(folder / "model.safetensors")[f"{LAYER}.qzeros"])


@pytest.mark.parametrize(
    "config",
    [
        {"sym": True, "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"},
        {"sym": True, "checkpoint_format": "gptq", "format": "gptq_v2"},
        {"sym": False, "dynamic": {".*": {"sym": True}}},
        {"sym": None},
    ],
)
def test_who_says_that_a_layer_is_symmetric(tmp_path, config):
    model, told = loaded(symmetric(tmp_path / "in", 4, 2, **config))
    assert all(layer.zeros is None for layer in quantized(model).values())
    assert len(told) == 1


@pytest.mark.parametrize(
    ("config", "change"),
    [
        ({"sym": False}, None),
        ({"sym": True, "dynamic": {".*up": {"sym": False}}}, None),
        ({"sym": None}, put("qzeros", torch.zeros_like)),
    ],
)
def test_asymmetric_zero_points_are_read_as_the_config_says(tmp_path, config, change):
    stored = 2 if config["sym"] is False else 1
    model, told = loaded(symmetric(tmp_path / "in", 4, stored, change=change or stored_as(4, 8), **config))
    assert not told
    assert bool((quantized(model)[LAYER].zeros == (9 if change is None else 1)).all())


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (
            {},
            put("qzeros", lambda t: t.clone().index_fill_(1, torch.tensor([3]), 0x77777770)),
            WHERE
            + "the config says sym true, .* stored as 7 .* or 8 .* these are numbers from 0 to 7; .* set sym to false",
        ),
        ({}, stored_as(4, 3), WHERE + "the config says sym true, .*these are all 3"),
        (
            {},
            stored_as(4, 8),
            WHERE + r"its zero points are stored as checkpoint_format 'gptq_v2' has them and those of "
            r"model\.layers\.0\.mlp\.\w+_proj as 'gptq', so it cannot be told",
        ),
        (
            {"format": "gptq_v2", "checkpoint_format": "gptq", "sym": False},
            None,
            r"_proj\.qweight in .*checkpoint_format and format of the quantization_config "
            r"read its zero points differently",
        ),
    ],
)
def test_zero_points_that_mean_nothing(tmp_path, config, change, message):
    folder = symmetric(tmp_path / "in", 4, 1, change=change, **{"sym": True} | config)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_an_order_of_columns_that_the_config_denies_is_read(tmp_path):
    folder = write_gptq(tmp_path / "in", order=True)
    want = load(folder)
    say(folder, {"desc_act": False})
    model, told = loaded(folder)
    [text] = told
    assert "desc_act false" in text
    for name, layer in quantized(want).items():
        assert_same_bits(quantized(model)[name].dequantize(), layer.dequantize())


# ------------------------------------------------------------------------------------- GPTQ's and AWQ's other fields


def gemv(tensors):
    """LAYER in the shapes that version gemv has."""
    n, k = 160, 96
    tensors |= {
        f"{LAYER}.qweight": torch.zeros(n, k // 8, dtype=torch.int32),
        f"{LAYER}.qzeros": torch.zeros(n, 1, dtype=torch.int32),
        f"{LAYER}.scales": torch.ones(n, 8).half(),
    }


@pytest.mark.parametrize(
    ("write", "config", "change", "message"),
    [
        (write_gptq, {"bits": 8}, None, r"are not 8 bits, which the config says, but 4$"),
        (
            write_gptq,
            {"group_size": 96, "dynamic": {".*down": {"group_size": 32}}},
            None,
            r"scales must be floats \[1, 160\]",
        ),
        (write_gptq, {"dynamic": {".*up": {"desc_act": True}}}, None, rf"no {LAYER}\.g_idx beside it"),
        (
            write_gptq,
            {"quant_method": "awq", "version": "gemm"},
            None,
            "no multiple of group_size|scales must be floats",
        ),
        (write_awq, {"quant_method": "gptq"}, None, "not 4 bits, which the config says, but none that fit"),
        (
            write_awq,
            {"zero_point": False},
            None,
            "zero_point false, for which all zero points are 8, and these go from 0 to",
        ),
        (
            write_awq,
            {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "sym": True},
            None,
            "zero_point false, for which all zero points are 8",
        ),
        (write_awq, {"group_size": 96}, None, "scales must be floats|no multiple of group_size"),
        (write_awq, {}, gemv, WHERE + r"scales must be floats \[5, 96\]"),
        (
            write_gptq,
            {},
            lambda t: t.update({f"{LAYER}.weight": torch.ones(160, 96).half()}),
            rf"^{LAYER}\.weight in .*: {LAYER}\.weight is there already, from {LAYER}\.qweight in model\.safetensors",
        ),
        (
            write_gptq,
            {},
            lambda t: (
                [t.pop(f"{LAYER}.{part}") for part in ("qweight", "qzeros", "scales")]
                + [t.update({f"{LAYER}.weight": torch.ones(160, 96, dtype=torch.int8)})]
            ),
            rf"^{LAYER}\.weight in .*: int8 for {LAYER}\.weight, which holds floats",
        ),
    ],
)
def test_gptq_and_awq(tmp_path, write, config, change, message):
    folder = write(tmp_path / "in", change=change)
    say(folder, config)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("write", "config"),
    [
        (write_gptq, {"dynamic": {"-:.*up": {}}, "modules_in_block_to_quantize": [["self_attn.q_proj"]]}),
        (write_awq, {"modules_to_not_convert": ["up_proj", "model"]}),
    ],
)
def test_layers_that_are_quantized_are_read_whatever_list_they_are_on(tmp_path, write, config):
    folder = write(tmp_path / "in")
    want = quantized(load(folder))
    say(folder, config)
    got = quantized(load(folder))
    assert set(got) == set(want)
    assert_same_bits(got[LAYER].dequantize(), want[LAYER].dequantize())


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_its_own_under_a_config_that_ties_it(tmp_path, tied):
    """transformers says so in its log, and keeps them apart; a head that is not there cannot be made up."""
    folder = write_gptq(tmp_path / "in", change=None if tied else lambda tensors: tensors.pop("lm_head.weight"))
    content = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(content))
    if not tied:
        with pytest.raises(ValueError, match=r"1 tensors are missing, the first is lm_head\.weight"):
            load(folder)
        return
    stored = load_file(folder / "model.safetensors")
    model = load(folder)
    assert_same_bits(model.lm_head.weight.detach().half(), stored["lm_head.weight"])
    assert_same_bits(model.model.embed_tokens.weight.detach().half(), stored["model.embed_tokens.weight"])


# ------------------------------------------------------------------------------------- compressed-tensors, bitsandbytes

PACKED = "model.layers.0.mlp.up_proj.weight"


def compressed(folder, symmetric=True, said=None, change=None, **arguments):
    """A folder of groups of 32; said: what of `symmetric` the config says; change(tensors)."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": symmetric if said is None else said,
        "strategy": "group",
        "group_size": 32,
    } | arguments
    write_compressed(folder, {"": (4, 32, symmetric)}, {"group_0": {"targets": ["Linear"], "weights": weights}})
    tensors = load_file(folder / "model.safetensors")
    if change is not None:
        change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def reordered(tensors):
    tensors[f"{PACKED}_g_idx"] = (torch.arange(96).flip(0) // 32).int()


def ordered_everywhere(tensors):
    """As reordered, and -1 for the other layers: no order."""
    for name in [name for name in tensors if name.endswith("_packed")]:
        tensors[name.replace("_packed", "_g_idx")] = torch.full((8 * tensors[name].shape[1],), -1).int()
    reordered(tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"symmetric": False, "said": True},
            r"config says symmetric, and weight_zero_point beside it has others than 8",
        ),
        ({"said": False}, "no weight_zero_point beside it"),
        ({"num_bits": 8}, r"must be int32 \[96, 40\], got torch\.int32 \[96, 20\]"),
        ({"group_size": 96}, r"not 96 rows of 160 weights in groups of 96"),
        ({"strategy": "channel", "group_size": None}, r"not 96 rows of 160 weights in groups of 160"),
        ({"actorder": "group"}, "no weight_g_idx beside it: the checkpoint is incomplete"),
        ({"change": lambda t: t.update({f"{PACKED}_shape": torch.tensor([160, 95])})}, "not 160 rows of 95 weights"),
        ({"change": lambda t: t.update({f"{PACKED}_shape": torch.tensor([96, 160])})}, r"must be int32 \[96, 20\]"),
    ],
)
def test_compressed_tensors(tmp_path, options, message):
    folder = compressed(tmp_path / "in", **options)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_zero_points_that_say_what_symmetric_says(tmp_path):
    """Some writers keep them; they are no contradiction."""

    def zeros(tensors):
        for name in [name for name in tensors if name.endswith("_packed")]:
            n, groups = tensors[name.replace("_packed", "_scale")].shape
            tensors[name.replace("_packed", "_zero_point")] = pack_stream(torch.full((groups, n), 8), 4).T.contiguous()

    want = quantized(load(compressed(tmp_path / "plain")))
    model, told = loaded(compressed(tmp_path / "in", change=zeros))
    assert not told
    for name, layer in quantized(model).items():
        assert_same_bits(layer.dequantize(), want[name].dequantize())


def test_an_order_that_compressed_tensors_does_not_name(tmp_path):
    model, told = loaded(compressed(tmp_path / "in", actorder="static", change=reordered))
    [text] = told
    assert "names no actorder 'group'" in text
    assert model.get_submodule(LAYER).perm is not None
    again, told = loaded(compressed(tmp_path / "named", actorder="group", change=ordered_everywhere))
    assert not told
    assert_same_bits(again.get_submodule(LAYER).dequantize(), model.get_submodule(LAYER).dequantize())


@pytest.mark.parametrize(("kind", "other"), [("nf4", "fp4"), ("fp4", "nf4")])
def test_a_table_that_is_not_the_kinds(tmp_path, kind, other):
    path, tensors = folder_of(tmp_path / "in", kind)
    weight = torch.zeros_like(tensors[f"{TENSOR}.quant_map"]) + 1
    table = packed_tensors(weight.view(1, 16).repeat(1, 4), other)[".quant_map"]
    save_file(tensors | {f"{TENSOR}.quant_map": table}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"its quant_map is not the table of {kind}, which its quant_state names"):
        load(path)
    rounded = {name: t.half().float() if name.endswith(".quant_map") else t for name, t in tensors.items()}
    save_file(rounded, path / "model.safetensors", {"format": "pt"})
    assert quantized(load(path))


def test_every_tools_own_folder_contradicts_nothing(tmp_path):
    from tests.checkpoints.formats.test_gptq import FIXTURES

    seen = set()
    for folder in sorted(path.parent for path in FIXTURES.glob("*/config.json")):
        shutil.copytree(folder, tmp_path / folder.name)
        model, told = loaded(tmp_path / folder.name)
        assert not [text for text in told if "config" in text or "checkpoint_format" in text], folder
        source = source_of(model)
        assert source is not None
        seen.add(source.method)
    assert seen == set(FOLDERS)
