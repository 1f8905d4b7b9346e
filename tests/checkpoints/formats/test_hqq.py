"""HQQ's own folders (config.json, qmodel.pt): read through shapes and places only, saved by patching scales."""

import json
import shutil
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import qzo
from qzo.checkpoints.formats import hqq
from tests.support.checkpoints import (
    FFN,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    VOCAB,
    quantized,
    relative_error,
    scale_randomly,
)
from tests.support.paths import FIXTURES

FIXTURE = FIXTURES / "hqq-own-g64"
PACKINGS = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8"}
LAYER = "model.layers.1.mlp.up_proj"


def load(path):
    return qzo.from_pretrained(path, device="cpu")


def pack(rows, bits):
    """HQQ's planes of codes [R, g], word by word: of a word's codes the first is the highest."""
    per, width = (10, 30) if bits == 3 else (8 // bits, 8)
    count = -(-len(rows) // per)
    words = np.zeros((count, rows.shape[1]), np.int64)
    for r, row in enumerate(rows):
        words[r % count] |= row.astype(np.int64) << width - bits * (r // count + 1)
    return torch.from_numpy(words.astype(np.int32 if bits == 3 else np.uint8))


def unpack(state):
    """float32 [N, K] of a quantized module, code by code."""
    words, bits, (n, k) = state["W_q"].numpy(), state["nbits"], state["shape"]
    size, width = state["group_size"] or k, 30 if bits == 3 else 8
    out = np.zeros((n * k // size, size), np.float32)
    for r in range(len(out)):
        code = words[r % len(words)] >> width - bits * (r // len(words) + 1) & (1 << bits) - 1
        out[r] = (code.astype(np.float32) - state["zero"][r].float().numpy()) * state["scale"][r].float().numpy()
    return torch.from_numpy(out).view(n, k)


def write(folder, bits=4, size=32, dtype=torch.float16, change=None, **save):
    """A Llama folder of HQQ's own kind with random codes, zeros that are no whole numbers and scales of both signs.

    change(modules): what to do to the dictionary before it is saved.
    """
    rng = np.random.default_rng(bits)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        vocab_size=VOCAB,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(0)
    modules = {}
    for name, tensor in LlamaForCausalLM(config).state_dict().items():
        module, (n, *k) = name.removesuffix(".weight"), tensor.shape
        if not name.endswith("_proj.weight"):
            modules[module] = {"weight": tensor.to(dtype)}
            continue
        rows = n * k[0] // (size or k[0])
        codes = rng.integers(0, 2**bits, (rows, size or k[0]))
        scale = torch.from_numpy(rng.uniform(0.5, 1.5, (rows, 1)) * rng.choice([-1, 1], (rows, 1)) / 8 / 2**bits)
        zero = torch.from_numpy(rng.uniform(-0.5, 2**bits - 0.5, (rows, 1)))
        modules[module] = {
            "W_q": torch.nn.Parameter(pack(codes, bits), requires_grad=False),
            "nbits": bits,
            "group_size": size,
            "shape": torch.Size([n, k[0]]),
            "scale": scale.to(dtype),
            "zero": zero.to(dtype),
            "axis": 1,
            "packing": PACKINGS[bits],
            "unpack_view_dtype": torch.int32 if bits == 3 else torch.uint8,
            "view_as_float": False,
            "quant_scale": False,
            "quant_zero": False,
            "compute_dtype": dtype,
            "channel_wise": True,
        }
    if change:
        change(modules)
    folder.mkdir(exist_ok=True)
    torch.save(modules, folder / "qmodel.pt", **save)
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"dtype": str(dtype).split(".")[1]}))
    return folder


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_fixture():
    expected = load_file(FIXTURE / "expected.safetensors")
    modules, model = torch.load(FIXTURE / "qmodel.pt", weights_only=True), load(FIXTURE)
    assert {name for name, state in modules.items() if "W_q" in state} == set(quantized(model))
    for name, layer in quantized(model).items():
        assert torch.equal(layer.dequantize(), unpack(modules[name])), name
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
    assert relative_error(logits, expected["logits"]) < 2e-5  # float32 sums in another order


@pytest.mark.parametrize(
    ("bits", "size", "dtype"),
    [
        (4, 32, torch.float32),
        (4, 32, torch.bfloat16),
        (4, None, torch.float16),
        (3, 32, torch.float16),
        (3, None, torch.float32),
        (8, 32, torch.float16),
        (8, None, torch.float32),
        (2, 32, torch.bfloat16),
    ],
)
def test_saved_scales_and_nothing_else(tmp_path, bits, size, dtype):
    source = write(tmp_path / "in", bits, size, dtype)
    model, before = load(source), torch.load(source / "qmodel.pt", weights_only=True)
    for name, layer in quantized(model).items():
        assert torch.equal(layer.dequantize(), unpack(before[name])), name
    qzo.save_pretrained(model, tmp_path / "same")
    assert contents(tmp_path / "same") == contents(source)
    new = scale_randomly(model, keep=0.5)
    qzo.save_pretrained(model, tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "out" / "qmodel.pt") as archive:
        assert archive.testzip() is None  # every CRC-32 fits its bytes
    after = torch.load(tmp_path / "out" / "qmodel.pt", weights_only=True)
    for name, scales in new.items():
        assert torch.equal(after[name].pop("scale").view(scales.T.shape), scales.T.to(dtype)), name
        assert not torch.equal(before[name].pop("scale").view(scales.T.shape), scales.T.to(dtype)), name
    assert str(after) == str(before)
    assert all(
        torch.equal(after[name][key], before[name][key])
        for name in before
        for key in before[name]
        if isinstance(before[name][key], torch.Tensor)
    )
    assert changed_entries(source / "qmodel.pt", tmp_path / "out" / "qmodel.pt") == len(new)
    for name, layer in quantized(load(tmp_path / "out")).items():
        assert torch.equal(layer.read_scales(), new[name].to(dtype).float()), name


def changed_entries(before, after):
    """How many entries differ; everything but their bytes and CRC-32s has to be the same."""
    changed, old, new = 0, before.read_bytes(), after.read_bytes()
    masked = [bytearray(old), bytearray(new)]
    with zipfile.ZipFile(before) as a, zipfile.ZipFile(after) as b:
        at = a.start_dir
        for one, other in zip(a.infolist(), b.infolist(), strict=True):
            if one.CRC != other.CRC:
                changed += 1
                start = a.read(one.filename) and old.index(a.read(one.filename), one.header_offset)
                end = start + one.file_size
                for data in masked:
                    for begin, stop in ((start, end), (end + 4, end + 8), (at + 16, at + 20)):
                        data[begin:stop] = bytes(stop - begin)
            at += 46 + len(one.filename.encode()) + len(one.extra) + len(one.comment)
    assert masked[0] == masked[1]
    return changed


def test_a_step_with_rate_zero_saves_the_same_bytes(tmp_path):
    model = load(write(tmp_path / "in"))
    optimizer = qzo.QZO(model, lr=0.0, directions=2)
    ids = torch.arange(24).view(2, 12)
    optimizer.step(lambda: qzo.losses(model, {"input_ids": ids, "labels": ids}, 4))
    qzo.save_pretrained(model, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "in")


def test_bias_and_older_files_with_a_meta_dictionary(tmp_path):
    def old(modules):
        for state in modules.values():
            if "W_q" in state:
                words = state.pop("W_q")
                state["meta"] = {key: state.pop(key) for key in list(state)}
                state |= {"W_q": words, "bias": None}

    new, older = load(write(tmp_path / "new")), load(write(tmp_path / "old", change=old))
    for name, layer in quantized(new).items():
        assert torch.equal(layer.dequantize(), older.get_submodule(name).dequantize()), name
    scale_randomly(older)
    qzo.save_pretrained(older, tmp_path / "out")
    assert torch.equal(
        load(tmp_path / "out").get_submodule(LAYER).read_scales(),
        older.get_submodule(LAYER).read_scales().half().float(),
    )


def test_a_file_saved_from_a_gpu(tmp_path, monkeypatch):
    here = load(write(tmp_path / "cpu"))
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    model = load(write(tmp_path / "gpu"))
    monkeypatch.undo()
    assert b"cuda:0" in (tmp_path / "gpu" / "qmodel.pt").read_bytes()
    for name, layer in quantized(here).items():
        assert torch.equal(layer.dequantize(), model.get_submodule(name).dequantize()), name
    qzo.save_pretrained(model, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "gpu")


def test_words_that_the_file_calls_floats(tmp_path):
    def floats(modules):
        for state in modules.values():
            if "W_q" in state:
                state |= {"W_q": state["W_q"].data.view(torch.float16), "view_as_float": True}

    plain, viewed = load(write(tmp_path / "plain")), load(write(tmp_path / "viewed", change=floats))
    for name, layer in quantized(plain).items():
        assert torch.equal(layer.dequantize(), viewed.get_submodule(name).dequantize()), name


def test_export_says_why_not(tmp_path):
    with pytest.raises(ValueError, match="float zero points"):
        qzo.export(load(write(tmp_path / "in")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------- refused


def put(**fields):
    return lambda modules: modules[LAYER].update(fields)


NAN = torch.full((FFN * 3, 1), float("nan")).half()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(axis=0), f"{LAYER}.W_q in qmodel.pt: axis is 0; only HQQ weights with axis=1 can be read"),
        (put(quant_scale=True), "quant_scale is True; only"),
        (put(channel_wise=False), "channel_wise is False; only"),
        (put(nbits=1, packing="1bit_u8"), "1 bits in packing '1bit_u8'; supported are"),
        (put(packing="4bit_32"), "4 bits in packing '4bit_32'"),
        (put(nbits=torch.ones(2)), r"nbits is torch.float32 \[2\]; it has to be a whole number above 0"),
        (put(group_size=16), r"scale must be a float tensor \[960, 1\], got torch.float16 \[480, 1\]"),
        (put(group_size=7), "group_size is 7, which does not divide in_features=96"),
        (put(shape=torch.Size([FFN * HIDDEN])), r"shape is torch.Size\(\[15360\]\); it has to be"),
        (put(shape=torch.Size([FFN * 2, HIDDEN])), r"scale must be a float tensor \[960, 1\]"),
        (put(W_q=torch.zeros(4, 4, dtype=torch.uint8)), r"must be torch.uint8 \[240, 32\], got torch.uint8 \[4, 4\]"),
        (put(W_q=torch.zeros(32, 240, dtype=torch.uint8).T), "up_proj.W_q in qmodel.pt is not contiguous"),
        (put(scale=None), r"scale must be a float tensor \[480, 1\], got None"),
        (put(scale=NAN), "scale holds NaN or infinity"),
        (put(zero=NAN), "zero holds NaN or infinity"),
        (lambda m: m.update({LAYER: torch.ones(1)}), rf"'{LAYER}' is torch.float32 \[1\]; HQQ saves"),
    ],
)
def test_refused(tmp_path, change, message):
    source = write(tmp_path / "in", change=change)
    with pytest.raises(ValueError, match=message) as error:
        load(source)
    assert "\n" not in str(error.value)


def test_transformers_own_layout_is_refused(tmp_path):
    source = write(tmp_path / "in")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "hqq"}}))
    with pytest.raises(ValueError, match="HQQ weights in transformers' layout"):
        load(source)


def test_layers_that_share_their_scales_are_not_written(tmp_path):
    def share(modules):
        modules[LAYER]["scale"] = modules[LAYER.replace("up_proj", "gate_proj")]["scale"]

    model = load(write(tmp_path / "in", change=share))
    with pytest.raises(ValueError, match="two layers share the bytes of their scales"):
        qzo.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_reading_takes_no_more_than_a_layer(tmp_path):
    source = write(tmp_path / "in")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {name: value for name, value, _ in hqq.weights(source, None, torch.float32)}
    assert len(found) == 7 * LAYERS + 2 * LAYERS + 3
    shutil.rmtree(source)  # no tensor is a map of the file
    assert all(torch.isfinite(v).all() for v in found.values() if isinstance(v, torch.Tensor))
