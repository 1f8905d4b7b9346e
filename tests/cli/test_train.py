"""`qzo train` from end to end on a tiny model: what a run writes, how it goes on, options and bad input."""

import functools
import json
import shlex
import signal

import pytest

import qzo
from qzo.cli.main import main, parse
from qzo.cli.train import merge_options
from qzo.training.task import Task
from tests.support import tiny
from tests.support.journals import read_whole


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    tiny.write_jsonl(folder / "train.jsonl", tiny.RECORDS)
    tiny.write_jsonl(folder / "valid.jsonl", tiny.RECORDS[::2])
    return folder


def arguments(base, corpus, out, *more):
    return [
        "train",
        "--model",
        str(base),
        "--data",
        str(corpus),
        "--output-dir",
        str(out),
        "--group-size",
        "32",
        "--device",
        "cpu",
        "--max-steps",
        "12",
        "--batch-size",
        "4",
        "--directions",
        "2",
        *more,
    ]


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_sequential_evaluations_learn_the_same(base, corpus, tmp_path, capsys):
    losses = {}
    for way in ([], ["--sequential"]):
        out = tmp_path / f"out{len(way)}"
        assert main(arguments(base, corpus, out, "--learning-rate", "0.02", "--train-layers", "1", *way)) == 0
        losses[len(way)] = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[1][0] != losses[1][-1]
    capsys.readouterr()
    assert main(arguments(base, corpus, out, "--learning-rate", "0.02", "--train-layers", "1", "--resume")) == 2
    assert "sequential" in capsys.readouterr().err


def test_train_writes_the_whole_folder_and_replay_rebuilds_it(base, corpus, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(base, corpus, out, "--json", "--learning-rate", "0.02")) == 0
    printed = capsys.readouterr()
    results = json.loads(printed.out)
    assert results["tuned"]["loss"] < results["before"]["loss"]
    assert {"journal.qzo", "metrics.jsonl", "curve.png", "model", "run.json"} <= {p.name for p in out.iterdir()}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(12))
    assert (out / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((out / "run.json").read_text())["settings"]["max_steps"] == 12
    assert "step 12/12: loss" in printed.err
    again = ["replay", str(base), str(out / "journal.qzo"), "--output-dir", str(tmp_path / "again"), "--group-size"]
    assert main([*again, "64"]) == 2
    assert "another model" in capsys.readouterr().err
    assert main([*again, "32"]) == 0
    assert files(tmp_path / "again") == files(out / "model")


def test_controls_that_a_run_of_texts_has_not_are_null(base, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for split in ("train", "valid"):
        tiny.write_jsonl(tmp_path / f"data/{split}.jsonl", [{"text": record["prompt"]} for record in tiny.RECORDS])
    options = ["--data", tmp_path / "data", "--output-dir", tmp_path / "out", "--group-size", 32, "--max-steps", 1]
    capsys.readouterr()
    assert main([*map(str, ["train", base, *options, "--json"])]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["control"], found["linear_probe"]) == (None, None)
    assert list(found["splits"]["valid"]) == ["before", "tuned"]


def test_replay_rebuilds_the_same_bytes(base, corpus, tmp_path, capsys):
    """From a 4-bit base, which a run's own output is."""
    four_bit = tmp_path / "four-bit"
    qzo.save_pretrained(qzo.from_pretrained(base, group_size=32, device="cpu"), four_bit)
    out = tmp_path / "out"
    assert main(arguments(four_bit, corpus, out)) == 0
    assert main(["replay", str(four_bit), str(out / "journal.qzo"), "--output-dir", str(tmp_path / "again")]) == 0
    assert files(tmp_path / "again") == files(out / "model")
    assert files(tmp_path / "again") != files(four_bit)


def test_the_same_seed_gives_the_same_bits_and_resume_goes_on(base, corpus, tmp_path):
    def journal(name, *more):
        assert main(arguments(base, corpus, tmp_path / name, *more)) == 0
        return (tmp_path / name / "journal.qzo").read_bytes()

    whole = journal("a")
    assert journal("b") == whole
    assert journal("c", "--seed", "1") != whole
    path = tmp_path / "b" / "journal.qzo"
    path.write_bytes(whole[: -4 * 64 - 7])  # four steps and a torn record short: it goes on inside the second pass
    assert journal("b", "--resume") == whole
    metrics = (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == list(range(12))
    assert files(tmp_path / "a" / "model") == files(tmp_path / "b" / "model")


def biases_in(folder):
    return json.loads((folder / "generation_config.json").read_text()).get("sequence_bias")


def test_label_biases_are_fitted_when_a_run_has_ended(base, corpus, tmp_path, capsys):
    """They are part of the model that is saved: what is told of it is what others find."""
    out = tmp_path / "out"
    assert main(arguments(base, corpus, out, "--json")) == 0
    results = json.loads(capsys.readouterr().out)
    assert [token for token, _ in results["label_bias"]] == [18, 19], "warm and cold, of the tokenizer"
    assert results["label_bias"][0][1] == pytest.approx(-results["label_bias"][1][1], abs=1e-6) != 0
    assert biases_in(out / "model") == [[[token], bias] for token, bias in results["label_bias"]]
    evaluated = ["eval", "--data", str(corpus), "--device", "cpu", "--json", "--group-size", "32"]
    for model in ([str(out / "model")], [str(base), "--journal", str(out / "journal.qzo")]):
        assert main([*evaluated, *model]) == 0
        found = json.loads(capsys.readouterr().out)["splits"]["valid"]
        assert found == pytest.approx(results["tuned"], rel=1e-3), "rounding of the saved scales apart"
    until = ["replay", str(base), str(out / "journal.qzo"), "--output-dir", str(tmp_path / "five"), "--until", "5"]
    assert main([*until, "--group-size", "32"]) == 0
    assert "are those of step 12: the model of step 5 has none" in capsys.readouterr().err
    assert biases_in(tmp_path / "five") is None


def test_without_label_biases_the_scales_learn_all(base, corpus, tmp_path):
    for name, more in (("fit", []), ("none", ["--label-bias", "none"])):
        assert main(arguments(base, corpus, tmp_path / name, *more)) == 0
    header, steps, _ = read_whole(tmp_path / "none" / "journal.qzo")
    assert "label_bias" not in header["recipe"], "as in journals from before there were any"
    assert read_whole(tmp_path / "fit" / "journal.qzo")[0]["recipe"]["label_bias"] == "fit"
    assert biases_in(tmp_path / "none" / "model") is None
    assert json.loads((tmp_path / "none" / "run.json").read_text())["label_bias"] == []
    centred = read_whole(tmp_path / "fit" / "journal.qzo")[1]
    assert steps[0][0].applied != centred[0][0].applied
    assert steps[0][0].loss_plus == centred[0][0].loss_plus, "the first evaluation is where the push is measured"


def test_yaml_and_the_paper_recipe(base, corpus, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {base}\ndata: {corpus}\noutput-dir: {tmp_path / 'y'}\ngroup_size: 32\nmax-steps: 99\n"
        "recipe: paper\ndevice: cpu\n"
    )
    assert main(["train", "--config", str(config), "--max-steps", "2", "--batch-size", "4"]) == 0
    header = read_whole(tmp_path / "y" / "journal.qzo")[0]
    assert (header["noise"], header["relative"], header["eps"], header["clip"], header["floor"]) == (
        "gaussian",
        False,
        1e-3,
        100.0,
        0.0,
    )
    assert header["recipe"]["learning_rate"] == 1e-7
    assert header["recipe"]["max_steps"] == 2


@pytest.mark.parametrize(
    ("given", "line", "want"),
    [
        ([], "", (None, False)),
        (["--cuda-graph"], "", (True, False)),
        (["--no-cuda-graph"], "", (False, False)),
        (["--compile"], "", (None, True)),
        ([], "cuda-graph: false\ncompile: true\n", (False, True)),
        (["--cuda-graph"], "cuda_graph: false\n", (True, False)),
    ],
)
def test_graph_and_compile_options(base, corpus, tmp_path, given, line, want):
    config = tmp_path / "run.yaml"
    config.write_text(line)
    options = parse([*arguments(base, corpus, tmp_path), "--config", str(config), *given])
    settings, _ = merge_options(options)
    assert (settings.cuda_graph, settings.compile) == want


def test_a_graph_that_is_asked_for_without_a_gpu_is_one_line(base, corpus, tmp_path, capsys):
    assert main(arguments(base, corpus, tmp_path / "out", "--cuda-graph", "--max-steps", "2")) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "graph" in line]
    assert len(said) == 1
    assert said[0].startswith("qzo: warning: cuda_graph=True: the scales are on 'cpu'")
    assert main(arguments(base, corpus, tmp_path / "plain", "--no-cuda-graph", "--max-steps", "2")) == 0
    assert "warning" not in capsys.readouterr().err
    assert (tmp_path / "out" / "journal.qzo").read_bytes() == (tmp_path / "plain" / "journal.qzo").read_bytes()


def test_a_value_of_cuda_graph_that_cannot_be_is_one_line(base, corpus, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("cuda_graph: auto\n")
    assert main(arguments(base, corpus, tmp_path / "out", "--config", str(config))) == 2
    assert "cuda_graph='auto': expected true or false, or null" in one_line(capsys)


def one_line(capsys):
    text = capsys.readouterr().err.strip().splitlines()
    assert text, "nothing was said"
    return text[-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--model", "no/such/model.gguf"], "no such file"),
        (["--data", "nowhere.jsonl"], "no data at nowhere.jsonl"),
        (["--group-size", "96"], "group_size=96: use one of 32, 64, 128, or -1"),
        (["--batch-size", "400"], "batch_size=400, but there are 24"),
        (["--max-steps", "0"], "max_steps=0"),
        (["--eps", "-1"], "eps=-1.0"),
        (["--train-layers", "9"], "has 2 blocks"),
        (["--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_bad_input_is_one_line_and_status_2(base, corpus, tmp_path, capsys, change, said):
    assert main(arguments(base, corpus, tmp_path / "out", *change)) == 2
    assert said in one_line(capsys)
    assert not (tmp_path / "out" / "journal.qzo").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{not json", "line 2: not JSON"),
        ("[1]", "line 2: expected a JSON object"),
        ('{"question": "x"}', r"line 2: has the keys ['question']"),
        ('{"prompt": "x", "options": ["a", "b"], "label": "c"}', "line 2: label 'c' is not among the options"),
        ('{"prompt": "x", "options": ["a", "b"], "label": 2}', "line 2: label 2 is not among the options"),
        ('{"prompt": "x", "completion": 3}', "line 2: 'completion' must be a string"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "line 2: 'messages' must end with the assistant's"),
    ],
)
def test_a_bad_line_is_named(base, tmp_path, capsys, line, said):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text": "red green"}\n' + line + "\n")
    assert main(arguments(base, path, tmp_path / "out")) == 2
    assert said in one_line(capsys)


def test_existing_and_foreign_journals(base, corpus, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(base, corpus, out, "--max-steps", "1")) == 0
    assert main(arguments(base, corpus, out, "--max-steps", "1")) == 2
    assert "holds a journal of 1 step already" in one_line(capsys)
    assert main(arguments(base, corpus, out, "--max-steps", "1", "--resume", "--group-size", "64")) == 2
    assert "belongs to another model, or this model is already tuned: " in one_line(capsys)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 0)], ids=lambda n: str(n)
)
def test_a_signal_stops_the_run_and_its_own_line_goes_on(
    base, corpus, tmp_path, capsys, monkeypatch, request, number, status
):
    real = Task.batch
    calls: list[int] = []  # the batches of steps: those of a measure have one evaluation

    def batch(self, indices, count):
        if len(calls) == 3:
            signal.raise_signal(number)
        calls.extend([count] * (count > 1))
        return real(self, indices, count)

    request.addfinalizer(functools.partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without
    with monkeypatch.context() as patch:
        patch.setattr(Task, "batch", batch)
        assert main(arguments(base, corpus, tmp_path / "out")) == status
    said = one_line(capsys)
    assert "stopped after 3 steps, all of them saved; go on with: qzo train " in said
    assert main(shlex.split(said.partition("go on with: qzo ")[2])) == 0
    assert main(arguments(base, corpus, tmp_path / "whole")) == 0
    assert (tmp_path / "out" / "journal.qzo").read_bytes() == (tmp_path / "whole" / "journal.qzo").read_bytes()
