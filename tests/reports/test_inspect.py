"""`qzo inspect` against what loading the whole model shows."""

import json
import weakref

import numpy as np
import pytest
import torch

import qzo
from qzo.checkpoints.formats import gguf
from qzo.cli import main as command
from qzo.nn.layers import layers
from qzo.nn.weights import PackedWeight
from qzo.reports import inspect
from qzo.training.loop import choose_layers, trained_count
from tests.nn import test_experts
from tests.support import tiny
from tests.support.checkpoints import TYPES, write_gguf
from tests.support.paths import FIXTURES


def look(capsys, *arguments):
    """What --json prints."""
    assert command.main(["inspect", *map(str, arguments), "--json", "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(
    params=[
        "gguf-q4_0",
        "gguf-q4_1",
        "ct-w4a16-sym-g64-bias-tied",
        "ct-w4a16-asym-g128-rtn",
        "gptqmodel-gptq-sym-g64-desc",
        "hqq-own-g64",
        "bnb-nf4",
    ]
)
def checkpoint(request, tmp_path):
    if request.param.startswith("gguf"):
        wide = {"blk.1.ffn_up.weight": (np.zeros((160, 96 // 32 * 34), np.uint8), TYPES.Q8_0)}
        write_gguf(tmp_path / "m.gguf", getattr(TYPES, request.param[5:].upper()), change=wide, tied=False)
        return tmp_path / "m.gguf"
    return FIXTURES / request.param


def test_it_tells_what_loading_shows(checkpoint, capsys):
    found = look(capsys, checkpoint, "--train-layers", 1)
    model = qzo.from_pretrained(checkpoint, device="cpu")
    held = layers(model)
    scales = torch.cat([s.flatten() for s in qzo.scales(model).values()])
    size = scales[scales != 0].abs()
    assert found["quantized"]
    assert found["class"] == type(model).__name__
    assert sum(kind["layers"] for kind in found["layers"]) == len(held)
    assert sum(kind["weights"] for kind in found["layers"]) == sum(
        m.in_features * m.out_features for m in held.values()
    )
    assert {kind["bits"] for kind in found["layers"]} == {m.bits for m in held.values()}
    zeros = {
        "none" if m.zeros is None else "float" if m.zeros.is_floating_point() else "integer" for m in held.values()
    }
    assert {kind["zeros"] for kind in found["layers"]} == zeros
    assert [kind["table"] for kind in found["layers"]] == [checkpoint.name == "bnb-nf4"] * len(found["layers"])
    assert found["act_order"] == sum(m.perm is not None for m in held.values())
    assert found["scales"] == {
        "count": len(scales),
        "smallest": float(size.min()),
        "largest": float(size.max()),
        "median": pytest.approx(float(size.median()), rel=2**-10),
        "negative": int((scales < 0).sum()),
        "zero": int((scales == 0).sum()),
        "below_float16_normal": int((size < 2**-14).sum()),
    }
    assert found["bytes"]["codes"] == sum(m.codes.nbytes for m in held.values())
    assert found["bytes"]["scales"] == 4 * len(scales)
    for part in ("codes", "zeros", "scales"):  # memory is in pages of an allocator
        assert abs(found["memory"][part] - found["bytes"][part]) < 4096 * (len(held) + 1)
    choose_layers(model, 1)
    assert found["trains"] == {"layers": len(layers(model)), "scales": trained_count(model), "blocks": 1}


def test_types_of_what_stays_dense(tmp_path, capsys):
    write_gguf(
        tmp_path / "m.gguf",
        TYPES.Q4_0,
        tied=False,
        change={"blk.1.ffn_up.weight": (np.zeros((160, 3 * 22), np.uint8), TYPES.Q5_0)},
    )
    found = look(capsys, tmp_path / "m.gguf")
    assert found["format"] == "gguf"
    assert found["dense"] == {
        "F16": {"tensors": 1, "bytes": 2 * 64 * 96},
        "Q5_0": {"tensors": 1, "bytes": 160 * 66},
        "F32": {"tensors": 6, "bytes": 4 * (64 * 96 + 5 * 96)},
    }
    assert found["dense_linears"] == 2
    assert found["scales"]["negative"] > 0


def test_a_float_checkpoint_shows_what_would_be_quantized(tmp_path, capsys):
    folder = tiny.save_checkpoint(tmp_path / "float")
    model = qzo.from_pretrained(folder, device="cpu", group_size=32, bits=8)
    found = look(capsys, folder, "--bits", 8)
    assert (found["format"], found["quantized"], found["scales"], found["bytes"]) == ("float", False, None, None)
    [kind] = found["layers"]
    assert kind == {
        "bits": 8,
        "group_size": "row",
        "zeros": "none",
        "table": False,
        "codebooks": 0,
        "layers": len(layers(model)),
        "scales": sum(m.out_features for m in layers(model).values()),
        "weights": sum(m.in_features * m.out_features for m in layers(model).values()),
    }
    [kind] = look(capsys, folder, "--group-size", 32)["layers"]
    assert (kind["bits"], kind["group_size"], kind["scales"]) == (4, 32, trained_count(model))


@pytest.mark.parametrize("quantized", [False, True])
def test_experts_are_counted(tmp_path, capsys, quantized):
    folder = test_experts.save("mixtral", tmp_path / "mixtral")
    if quantized:
        qzo.save_pretrained(test_experts.load(folder), tmp_path / "out")
        folder = tmp_path / "out"
    found = look(capsys, folder, "--group-size", 32)
    assert [kind["layers"] for kind in found["layers"]] == [2 * test_experts.LINEARS["mixtral"]]
    assert found["memory"]["total"] > 0


def test_what_cannot_be_predicted_is_said(tmp_path, capsys):
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    ).save_pretrained(tmp_path / "bert")
    assert command.main(["inspect", str(tmp_path / "bert")]) == 0
    assert "cannot be predicted: BertModel has no language-model head" in capsys.readouterr().out


def test_one_layer_is_held_at_a_time(tmp_path, monkeypatch, capsys):
    """Readers are followed tensor by tensor: what was yielded before is gone when the next one comes."""
    write_gguf(tmp_path / "m.gguf", layers=4)
    alive, most = [], []
    plain = gguf.weights

    def watched(*arguments):
        for name, value, where in plain(*arguments):
            if isinstance(value, PackedWeight):
                alive.append(weakref.ref(value))
            yield name, value, where
            del value
            most.append(sum(found() is not None for found in alive))

    monkeypatch.setattr(gguf, "weights", watched)
    look(capsys, tmp_path / "m.gguf")
    assert len(alive) == 28
    assert max(most) <= 1


def test_the_median_is_that_of_all_scales():
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 7, 1000):
        scales = (torch.randn(3, count, generator=generator) * 2.0**-12).half().float()
        scales[0, 0], survey = 0.0, inspect.ScaleSurvey()
        for row in scales:
            survey.add(row)
        size = scales[scales != 0].abs()
        report = survey.report()
        assert report["median"] == float(size.median())
        assert report["below_float16_normal"] == int((size < 2.0**-14).sum())
        assert (report["count"], report["zero"]) == (3 * count, int((scales == 0).sum()))
    assert inspect.ScaleSurvey().report() == {
        "count": 0,
        "smallest": None,
        "median": None,
        "largest": None,
        "negative": 0,
        "zero": 0,
        "below_float16_normal": 0,
    }


@pytest.fixture
def words(tmp_path):
    return tiny.save_checkpoint(tmp_path / "float")


def test_signal_is_measured_on_own_data_and_a_lost_one_is_named(words, tmp_path, capsys):
    data = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.RECORDS)
    found = look(capsys, words, "--signal", "--data", data, "--signal-directions", 4)["signal"]
    assert (found["eps"], found["directions"]) == (0.01, 4)
    assert found["float16"]["error"] < found["bfloat16"]["error"] < 0.5
    assert not capsys.readouterr().err
    arguments = ["inspect", str(words), "--signal", "--eps", "1e-5", "--signal-directions", "2"]
    assert command.main(arguments) == 0
    shown = capsys.readouterr()
    [line] = [line for line in shown.err.splitlines() if "bfloat16 activations eat the signal" in line]
    assert "with eps 1e-05" in line
    assert "raise --eps to about" in line
    assert "--dtype float16 or float32" in line
    assert "eps 1e-05, 2 directions" in shown.out


def test_signal_says_how_much_of_a_long_line_it_reads(words, tmp_path, capsys):
    data = tiny.write_jsonl(tmp_path / "data.jsonl", [{"text": "red green " * 150}, {"text": "blue sky"}])
    assert command.main(["inspect", str(words), "--signal", "--data", str(data), "--signal-directions", "1"]) == 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if "more than 256 tokens" in line]
    assert line.startswith(f"qzo: warning: 1 of 2 lines of {data} have more")
    assert "(all that --signal reads of a line)" in line


def test_the_table(words, capsys):
    assert command.main(["inspect", str(words), "--train-layers", "1"]) == 0
    shown = capsys.readouterr().out
    for text in (
        "what would be quantized on the way in",
        "14 of 4 bits, one group a row, zero points none",
        "7 of 14 layers of the top 1 blocks",
        "1 of 15 linear layers",
        "evaluations at once",
    ):
        assert text in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("nowhere", "no such file or folder"),
        ("{words} --bits 3", "bits=3"),
        ("{words} --train-layers 9", "has 2 blocks"),
        ("{words} --group-size 48", "group_size=48"),
        ("{words} --seq-len 1", "--seq-len 1: expected at least 2"),
        ("{words} --eps 0", "--eps 0"),
        ("{words} --signal --data nowhere", "no data at nowhere"),
    ],
)
def test_bad_input_is_one_line(words, capsys, arguments, said):
    assert command.main(["inspect", *arguments.format(words=words).split()]) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.count("\n") == 1
    assert not shown.out
