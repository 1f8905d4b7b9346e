"""AWQ's layouts gemv and gemv_fast, packed code by code as AutoAWQ's source tells."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qzo
from qzo.checkpoints.formats.awq_gemv import words_of_groups
from qzo.cli.main import main
from qzo.nn.layers import layers
from tests.support.checkpoints import quantized, scale_randomly
from tests.support.close import assert_same_bits
from tests.support.gptq_checkpoints import LAYER, contents, drop, first, load, put, write_gptq

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2}  # gemv_fast packs runs of 64
BATCH = {"input_ids": torch.arange(24).view(2, 12), "labels": torch.arange(24).view(2, 12)}


def padded_groups(groups, size):
    """How many groups the scales hold: words of eight, in twos for groups of 64, in fours for 32."""
    step = 8 * {32: 4, 64: 2}.get(size, 1)
    return -(-groups // step) * step


def sequence(values):
    """int32 [rows, count / 8]: eight numbers a word, the first in the lowest bits."""
    words = [
        [sum(int(v) << 4 * i for i, v in enumerate(row[at : at + 8])) for at in range(0, len(row), 8)] for row in values
    ]
    return torch.tensor([[word - (1 << 32 if word >> 31 else 0) for word in row] for row in words], dtype=torch.int32)


def wide(tensor, count):
    """[G, N] with rows of zeros up to `count`."""
    return torch.cat([tensor, tensor.new_zeros(count - len(tensor), tensor.shape[1])])


def gemv(codes, zeros, scales, bits):
    count = padded_groups(len(scales), codes.shape[1] // len(scales))
    return {
        "qweight": sequence(codes),
        "qzeros": sequence(wide(zeros, count).T),
        "scales": wide(scales, count).T.contiguous(),
    }


def gemv_fast(codes, zeros, scales, bits):
    """Rows 4r .. 4r + 3 of 64 inputs are one list of 256 numbers, of which word w holds 4w .. 4w + 3."""
    n, k = codes.shape
    order = [
        0,
        1,
        8,
        9,
        16,
        17,
        24,
        25,
        2,
        3,
        10,
        11,
        18,
        19,
        26,
        27,
        4,
        5,
        12,
        13,
        20,
        21,
        28,
        29,
        6,
        7,
        14,
        15,
        22,
        23,
        30,
        31,
    ]
    order = [order[8 * run + i] for run in range(4) for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    mixed = codes.view(n, -1, 32)[..., order].reshape(n, k).numpy()
    words = np.zeros((n // 4, k), dtype=np.int64)
    for r in range(n // 4):
        for start in range(0, k, 64):
            run = mixed[4 * r : 4 * r + 4, start : start + 64].flatten()
            for w in range(64):
                words[r, start + w] = sum(int(v) << 4 * j for j, v in enumerate(run[4 * w : 4 * w + 4]))
    count = padded_groups(len(scales), k // len(scales))
    return {
        "qweight": torch.from_numpy(words.astype(np.uint16).view(np.int16)),
        "scales": wide(scales, count),
        "scaled_zeros": wide(-(scales.float() * zeros).half(), count),
    }


FORMS = {"gemv": gemv, "gemv_fast": gemv_fast}


def write(folder, version, size=64, said=None, **options):
    """The folder, and what its layers are: {name: float32 [N, K]}."""
    want: dict[int, torch.Tensor] = {}

    def layer(codes, zeros, scales, bits):
        groups = torch.arange(codes.shape[1]) // (codes.shape[1] // len(scales))
        want[len(want)] = ((codes.T - zeros[groups]) * scales.float()[groups]).T
        return FORMS[version](codes, zeros, scales, bits)

    given = {
        "size": size,
        "quant_method": "awq",
        "version": said or version,
        "sizes": SIZES,
        "zero_point": True,
    } | options
    return write_gptq(folder, layer=layer, **given), list(want.values())


def in_file_order(model, want):
    """The layers by the order in which they were written."""
    names = [
        f"model.layers.0.{p}"
        for p in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    ]
    assert set(names) == set(quantized(model))
    return zip((quantized(model)[name] for name in names), want, strict=True)


@pytest.mark.parametrize("said", ["gemv", "GEMV", "gemv_fast", "GEMV_fast"])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_every_code_and_back(tmp_path, said, size):
    folder, want = write(tmp_path / "in", said.lower(), size, said)
    model = load(folder)
    for layer, weight in in_file_order(model, want):
        assert_same_bits(layer.dequantize(), weight)
    qzo.save_pretrained(model, tmp_path / "same")
    assert contents(tmp_path / "same") == contents(folder)


@pytest.mark.parametrize("version", FORMS)
def test_what_moved_is_written_in_its_place(tmp_path, version):
    folder, _ = write(tmp_path / "in", version)
    model = load(folder)
    new = scale_randomly(model, keep=0.5)
    report = qzo.save_pretrained(model, tmp_path / "out", batch=BATCH)
    again = load(tmp_path / "out")
    for name, layer in layers(again).items():
        assert_same_bits(layer.read_scales(), new[name].half().float())
        assert_same_bits(layer.zeros, layers(model)[name].zeros)
        assert_same_bits(layer.codes, layers(model)[name].codes)
    assert report["loss_after"] == float(qzo.losses(again, BATCH, 1))
    old, tuned = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    moved = {name.rpartition(".")[2] for name in old if not torch.equal(old[name], tuned[name])}
    assert moved == ({"scales"} if version == "gemv" else {"scales", "scaled_zeros"})
    if version == "gemv_fast":
        scales, zeros = tuned[f"{LAYER}.scales"], layers(again)[LAYER].zeros
        assert zeros is not None
        assert_same_bits(tuned[f"{LAYER}.scaled_zeros"][: len(zeros)], -(scales[: len(zeros)].float() * zeros).half())


@pytest.mark.parametrize("version", FORMS)
def test_through_transformers_and_out_to_other_formats(tmp_path, version):
    folder, want = write(tmp_path / "in", version)
    with qzo.loading():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for layer, weight in in_file_order(model, want):
        assert_same_bits(layer.dequantize(), weight)
    model.save_pretrained(tmp_path / "again")
    got, stored = load_file(tmp_path / "again/model.safetensors"), load_file(folder / "model.safetensors")
    assert set(got) == set(stored)
    assert all(torch.equal(got[name], stored[name]) for name in stored)
    qzo.export(model, tmp_path / "gptq", "gptq")
    for layer, weight in in_file_order(load(tmp_path / "gptq"), want):
        assert_same_bits(layer.dequantize(), weight)


def test_inspect_reads_it(tmp_path, capsys):
    folder, _ = write(tmp_path / "in", "gemv")
    assert main(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trains"]["layers"] == 7


@pytest.mark.parametrize(
    ("inputs", "size", "words"),
    [(128, 128, 1), (2048, 128, 2), (128, 64, 2), (2048, 64, 4), (96, 32, 4), (2048, 2048, 1)],
)
def test_words_of_groups(inputs, size, words):
    assert words_of_groups(inputs, size) == words


@pytest.mark.parametrize(
    ("version", "change", "message"),
    [
        ("gemv", drop("qzeros"), r"no model\.layers\.0\.mlp\.up_proj\.qzeros beside it"),
        (
            "gemv",
            put("scales", lambda t: t[:, :-1]),
            r"scales must be floats \[256, 16\], got torch.float16 \[256, 15\]",
        ),
        ("gemv", put("qzeros", lambda t: t.float()), r"qzeros must be torch.int32 \[256, 2\], got torch.float32"),
        ("gemv", put("qweight", lambda t: t.float()), r"must be a matrix of torch.int32, got torch.float32"),
        ("gemv", put("scales", first(float("nan"))), "scales hold NaN"),
        ("gemv_fast", drop("scaled_zeros"), r"no model\.layers\.0\.mlp\.up_proj\.scaled_zeros beside it"),
        (
            "gemv_fast",
            put("scaled_zeros", first(0.4)),
            "scaled_zeros are no scales times whole zero points from 0 to 15",
        ),
        ("gemv_fast", put("qweight", lambda t: t[:, :100]), "100 inputs; gemv_fast packs them in runs of 64"),
        ("gemv_fast", put("qweight", lambda t: t.int()), r"must be a matrix of torch.int16, got torch.int32"),
    ],
)
def test_refused(tmp_path, version, change, message):
    folder, _ = write(tmp_path / "in", version, change=change)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_the_layout_that_the_config_does_not_name_is_refused(tmp_path):
    folder, _ = write(tmp_path / "in", "gemv", said="gemm")
    with pytest.raises(ValueError, match=r"\.qweight in model\.safetensors: scales must be floats"):
        load(folder)
