"""GPTQ, AWQ and auto-round folders that the tools wrote, and made GPTQ ones for what those lack."""

import functools
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qzo
from qzo.checkpoints.formats import safetensors_file
from tests.support.checkpoints import quantized, relative_error, scale_randomly
from tests.support.close import ULP, assert_close, assert_same_bits
from tests.support.gptq_checkpoints import (
    IDS,
    LAYER,
    WHERE,
    contents,
    decode_folder,
    drop,
    first,
    gptq_layer,
    load,
    put,
    say,
    step,
    write_gptq,
)
from tests.support.paths import FIXTURES

NAMES = [
    "gptqmodel-gptq-sym-g128",
    "gptqmodel-gptq-asym-g32-v2",
    "gptqmodel-gptq-sym-g64-desc",
    "gptqmodel-gptq-3bit-sym-g64",
    "autoround-ar-sym-g128",
    "autoround-awq-zp-g128",
]
LOGITS_FP32 = 2e-5  # float32 sums in another order; one zero point off in a group gives 1e-2


@pytest.fixture(params=NAMES)
def fixture(request):
    return FIXTURES / request.param


def test_logits(fixture):
    expected = load_file(fixture / "expected.safetensors")
    with torch.no_grad():
        logits = load(fixture)(expected["input_ids"]).logits
    assert relative_error(logits, expected["logits"]) < LOGITS_FP32


def test_weights(fixture):
    model, expected = load(fixture), decode_folder(fixture)
    assert set(quantized(model)) == set(expected)
    for name, layer in quantized(model).items():
        assert torch.equal(layer.dequantize(), expected[name]), name


def test_a_layer_in_the_kernel(fixture):
    """float16 in Triton's interpreter, under noise, beside the float32 product of the file's own decoding."""
    layer, weight = quantized(load(fixture))[LAYER].half(), decode_folder(fixture)[LAYER].double()
    x = torch.randn(8, layer.in_features, generator=torch.Generator().manual_seed(0)).half()
    with qzo.backend("triton"), qzo.evaluating(layer, qzo.Evaluations([3, 3], [0.0, 0.01], "ih4")):
        got = layer(x)
    want, size = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    assert_close(got[:4], want[:4], want[:4].abs() + 1e-2 * size[:4], 2.0**-11 + 64 * ULP)
    assert relative_error(got[4:], want[4:]) > 1e-3


def test_a_step_of_learning_rate_0_is_saved_as_the_same_bytes(fixture, tmp_path):
    model = load(fixture)
    step(model, 0.0)
    qzo.save_pretrained(model, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(fixture)


def test_a_step_changes_scales_and_nothing_else(fixture, tmp_path):
    model = load(fixture)
    before = {name: layer.read_scales() for name, layer in quantized(model).items()}
    step(model, 1e-2)
    qzo.save_pretrained(model, tmp_path / "out")
    old, new = fixture / "model.safetensors", tmp_path / "out" / "model.safetensors"
    assert list(safetensors_file.places(old).items()) == list(safetensors_file.places(new).items())
    with safe_open(old, "pt") as a, safe_open(new, "pt") as b:
        assert a.metadata() == b.metadata()
    tensors = load_file(new)
    for name, tensor in load_file(old).items():
        owner, _, leaf = name.rpartition(".")
        if leaf == "scales":
            layer = quantized(model)[owner]
            assert torch.equal(tensors[name], layer.read_scales().half()), name
            assert torch.equal(tensors[name].sign(), tensor.sign()), name
            assert not torch.equal(layer.read_scales(), before[owner]), name
        else:
            assert_same_bits(tensors[name], tensor)
    rest = contents(tmp_path / "out")
    assert {k: v for k, v in rest.items() if k != new.name} == {
        k: v for k, v in contents(fixture).items() if k != old.name
    }
    reloaded, decoded = load(tmp_path / "out"), decode_folder(tmp_path / "out")
    for name, layer in quantized(reloaded).items():
        assert torch.equal(layer.dequantize(), decoded[name]), name


def test_a_journal_of_an_act_order_model(tmp_path):
    """Replayed on the base it gives the same scales, and on a base of another order it is refused."""
    model = load(FIXTURES / NAMES[2])
    optimizer = qzo.QZO(model, lr=1e-2, journal=tmp_path / "journal.qzo")
    for _ in range(2):
        optimizer.step(lambda: qzo.losses(model, {"input_ids": IDS, "labels": IDS}, 2))
    optimizer.close()
    again = load(FIXTURES / NAMES[2])
    assert qzo.replay(again, tmp_path / "journal.qzo") == 2
    for name, scales in qzo.scales(again).items():
        assert_same_bits(scales, qzo.scales(model)[name])
    other = load(FIXTURES / NAMES[2])
    perm = other.get_submodule(LAYER).perm
    perm[:2] = perm[:2].flip(0)
    with pytest.raises(qzo.JournalError, match="another model"):
        qzo.replay(other, tmp_path / "journal.qzo")


def test_what_the_fixtures_are_there_for():
    assert int((load_file(FIXTURES / NAMES[2] / "model.safetensors")[f"{LAYER}.g_idx"].diff() < 0).sum()) > 50
    assert quantized(load(FIXTURES / NAMES[2]))[LAYER].perm is not None
    assert quantized(load(FIXTURES / NAMES[0]))[LAYER].perm is None
    negative = torch.cat([layer.read_scales().flatten() < 0 for layer in quantized(load(FIXTURES / NAMES[4])).values()])
    assert 0.4 < negative.float().mean() < 0.6
    assert [quantized(load(FIXTURES / name))[LAYER].zeros is None for name in NAMES] == [
        True,
        False,
        True,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("name", NAMES[2::2])
def test_rounding_report(name, tmp_path):
    """save_pretrained(batch=...) knows the scales that it writes."""
    model = load(FIXTURES / name)
    scale_randomly(model)
    report = qzo.save_pretrained(model, tmp_path / "out", batch={"input_ids": IDS, "labels": IDS})
    saved = qzo.losses(load(tmp_path / "out"), {"input_ids": IDS, "labels": IDS}, 1)
    assert report["loss_after"] == float(saved)


def test_shards(tmp_path):
    """Parts of a layer in different files: each file is patched where it lies."""
    folder, source = tmp_path / "sharded", FIXTURES / NAMES[2]
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    files = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    shutil.copy(source / "config.json", folder)
    model = load(folder)
    step(model, 0.0)
    qzo.save_pretrained(model, tmp_path / "same")
    assert contents(tmp_path / "same") == contents(folder)
    new = scale_randomly(model)
    qzo.save_pretrained(model, tmp_path / "out")
    assert quantized(load(tmp_path / "out")).keys() == new.keys()
    for name, layer in quantized(load(tmp_path / "out")).items():
        assert torch.equal(layer.read_scales(), new[name].half().float()), name


# ------------------------------------------------------------------------------------- what the fixtures lack


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("version", "whole_words"), [(1, False), (1, True), (2, False)])
def test_every_zero_point_of_every_version(tmp_path, bits, version, whole_words):
    """Zero points of 0 borrow from the neighbour in GPTQModel's version 1 and in nobody else's."""
    layer = functools.partial(gptq_layer, version=version, whole_words=whole_words)
    folder = write_gptq(
        tmp_path / "in",
        bits,
        layer=layer,
        order=True,
        checkpoint_format="gptq_v2" if version == 2 else "gptq",
        meta={"quantizer": ["gptqmodel:7.6.0" if whole_words else "auto_gptq:0.7.1"]},
    )
    plain = write_gptq(
        tmp_path / "plain",
        bits,
        order=True,
        layer=lambda codes, zeros, scales, b, order: {"codes": codes, "zeros": zeros, "scales": scales, "order": order},
    )
    truth = load_file(plain / "model.safetensors")
    for name, linear in quantized(load(folder)).items():
        assert linear.perm is not None
        codes, zeros, scales, order = (truth[f"{name}.{part}"] for part in ("codes", "zeros", "scales", "order"))
        want = ((codes.T - zeros[order]) * scales.float()[order]).T
        assert torch.equal(linear.dequantize(), want), name
        assert linear.bits == (4 if bits == 3 else bits)
        assert (zeros == 0).any()


def test_reading_whole_words_field_by_field_would_be_seen(tmp_path):
    layer = functools.partial(gptq_layer, whole_words=True)
    folder = write_gptq(tmp_path / "in", layer=layer, meta={"quantizer": "someone"})
    other = write_gptq(tmp_path / "out", layer=layer, meta={"quantizer": "gptqmodel:1"})
    a, b = quantized(load(folder))[LAYER], quantized(load(other))[LAYER]
    assert not torch.equal(a.dequantize(), b.dequantize())


@pytest.mark.parametrize("size", [32, -1, None])
def test_whole_rows_and_no_g_idx(tmp_path, size):
    folder = write_gptq(tmp_path / "in", size=size or -1, group_size=size)
    expected = decode_folder(folder)
    for name, layer in quantized(load(folder)).items():
        assert torch.equal(layer.dequantize(), expected[name]), name
        assert layer.group_size == (32 if size == 32 else layer.in_features)


def test_dynamic(tmp_path):
    """The first pattern that fits counts; a layer whose tensors are there is quantized, whatever is to be skipped."""
    dynamic = {
        "-:.*o_proj": {},
        r"+:.*up_proj": {"bits": 8},
        ".*up_proj": {"bits": 2, "group_size": 32},
        r".*(down|gate)_proj$": {"group_size": 32},
        "q_proj": {"bits": 8},
        ".*q_proj": {"bits": 2},
    }
    sizes = {"up_proj": (8, -1), "down_proj": (4, 32), "gate_proj": (4, 32), "q_proj": (2, -1)}
    folder = write_gptq(tmp_path / "in", 4, -1, by_layer=sizes, dynamic=dynamic)
    found = quantized(load(folder))
    assert {name.split(".")[-1]: (layer.bits, layer.group_size) for name, layer in found.items()} == {
        "q_proj": (2, 96),
        "k_proj": (4, 96),
        "v_proj": (4, 96),
        "o_proj": (4, 96),
        "gate_proj": (4, 32),
        "up_proj": (8, 96),
        "down_proj": (4, 32),
    }
    for name, want in decode_folder(folder).items():
        assert torch.equal(found[name].dequantize(), want), name


def test_a_quantized_head_and_the_zero_biases_of_old_files(tmp_path):
    def biases(tensors):
        tensors |= {
            f"{n.removesuffix('.scales')}.bias": torch.zeros(t.shape[1]).half()
            for n, t in list(tensors.items())
            if n.endswith(".scales")
        }

    folder = write_gptq(tmp_path / "in", head=True, lm_head=True, change=biases)
    model = load(folder)
    assert torch.equal(quantized(model)["lm_head"].dequantize(), decode_folder(folder)["lm_head"])
    step(model, 0.0)
    qzo.save_pretrained(model, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(folder)
    write_gptq(folder, change=lambda tensors: tensors.update({f"{LAYER}.bias": torch.ones(160).half()}))
    with pytest.raises(ValueError, match=rf"LlamaForCausalLM has no tensor {LAYER}\.bias"):
        load(folder)


def test_a_config_of_its_own(tmp_path):
    """AutoGPTQ's first folders: one file of any name, and a quantize_config.json without a quant_method."""
    folder = write_gptq(tmp_path / "in")
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
    content = json.loads((folder / "config.json").read_text())
    beside = content.pop("quantization_config")
    del beside["quant_method"]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"holds the quantized tensor model\.layers.*has no quantization_config that"):
        load(folder)
    (folder / "quantize_config.json").write_text(json.dumps(beside))
    model = load(folder)
    step(model, 0.0)
    qzo.save_pretrained(model, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(folder)
    (folder / "quantize_config.json").write_text(json.dumps(beside | {"quant_method": ["gptq"]}))
    with pytest.raises(ValueError, match=r"quant_method \['gptq'\] cannot be read"):
        load(folder)
    qzo.export(model, tmp_path / "awq", "awq")
    assert not (tmp_path / "awq" / "quantize_config.json").exists()
    expected = decode_folder(write_gptq(tmp_path / "again"))
    for name, layer in quantized(load(tmp_path / "awq")).items():
        assert torch.equal(layer.dequantize(), expected[name]), name


# ------------------------------------------------------------------------------------- what is refused

GPTQ_REFUSED = [
    ({"bits": 5}, None, "in: bits is 5; supported are 2, 3, 4, 8"),
    ({"bits": "four"}, None, "bits is 'four'"),
    ({"bits": True}, None, "bits is True"),
    ({"group_size": 0}, None, "group_size is 0; it has to be a whole number above 0, or -1"),
    ({"group_size": 48}, None, "qweight in .*in_features 160 is no multiple of group_size 48: a last group that is "),
    (
        {"group_size": 96, "dynamic": {".*down": {"group_size": 32}}},
        None,
        r"qweight in model.*scales must be floats \[1, 160\] for 96 inputs in groups of 96 and 160 outputs, got ",
    ),
    ({"group_size": 128}, None, "no multiple of group_size 128"),
    ({"checkpoint_format": "marlin"}, None, "GPTQ weights in checkpoint_format 'marlin'; supported are gptq and gptq_"),
    ({"is_marlin_format": True}, None, "checkpoint_format 'marlin'"),
    ({"checkpoint_format": ["gptq"]}, None, r"checkpoint_format \['gptq'\]"),
    ({"pack_dtype": "int16"}, None, "packed in 'int16'; supported is int32"),
    ({"adapter": {"rank": 8}}, None, "has an adapter, which is not supported"),
    ({"dynamic": {"re:(": {}}}, None, r"dynamic 're:\(' is no regular expression"),
    ({"dynamic": {".*up": 8}}, None, "dynamic must be patterns and what they change"),
    (
        {"dynamic": {".*up": {"bits": 8}}},
        None,
        WHERE + r"int32 \[12, 160\] with qzeros \[3, 20\] are not 8 bits, which "
        "the config says, but 4$",
    ),
    ({"dynamic": {".*up": {"bits": 16}}}, None, WHERE + "dynamic: bits is 16"),
    ({"desc_act": True}, None, r"no model\.layers\.0\.mlp\.down_proj\.g_idx beside it: the checkpoint"),
    ({"quant_method": "exl2"}, None, "quant_method 'exl2' cannot be read; supported are aqlm, auto-round, awq, bi"),
    ({}, drop("scales"), WHERE + rf"no {LAYER}\.scales beside it: the checkpoint is incomplete"),
    ({}, drop("qzeros"), rf"no {LAYER}\.qzeros beside it"),
    ({}, drop("qweight"), rf"^{LAYER}\.(scales|qzeros) in model\.safetensors: LlamaForCausalLM has no tensor"),
    ({}, put("qweight", lambda t: t[:-1]), WHERE + r"in_features 88 is no multiple of group_size 32"),
    ({}, put("qweight", lambda t: t[:, :-8]), WHERE + r"int32 \[12, 152\] with qzeros \[3, 20\] are not 4 bits"),
    ({}, put("qweight", lambda t: t.float()), WHERE + r"must be an int32 matrix, got torch\.float32 \[12, 160\]"),
    ({}, put("qweight", lambda t: t[:0]), WHERE + r"must be an int32 matrix, got torch\.int32 \[0, 160\]"),
    ({}, put("qzeros", lambda t: t[:2]), WHERE + r"qzeros are \[2, 20\], scales \[3, 160\]: the groups differ"),
    ({}, put("qzeros", lambda t: t[0]), WHERE + r"qzeros must be an int32 matrix, got torch\.int32 \[20\]"),
    ({}, put("scales", lambda t: t[:2]), WHERE + r"scales must be floats \[3, 160\].*got torch\.float16 \[2, 160\]"),
    ({}, put("scales", lambda t: t.int()), "scales must be floats"),
    ({}, put("scales", first(float("nan"))), WHERE + "scales hold NaN"),
    ({}, put("scales", first(float("-inf"))), WHERE + "scales hold NaN"),
]


@pytest.mark.parametrize(("config", "tensors", "message"), GPTQ_REFUSED)
def test_gptq_refused(tmp_path, config, tensors, message):
    folder = write_gptq(tmp_path / "in", change=tensors)
    say(folder, config)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (first(-1), "g_idx names groups -1 to 2; there are groups 0 to 2"),
        (first(3), "g_idx names groups 0 to 3"),
        (lambda t: t % 2, "g_idx gives group 0 .* columns; every group has 32"),
        (lambda t: t[:-1], r"are not 4 bits, which the config says, but none that fit together"),
        (lambda t: t.float(), r"g_idx must be int32 \[96\], got torch\.float32"),
    ],
)
def test_g_idx_refused(tmp_path, change, message):
    folder = write_gptq(tmp_path / "in", order=True, change=put("g_idx", change))
    with pytest.raises(ValueError, match=WHERE + ".*" + message):
        load(folder)
