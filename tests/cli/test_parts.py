"""`qzo train --parallel tensor` on two ranks: near one process's run, which replays it, or goes on; what stops it."""

import functools
import json
import os
import shutil
import signal

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

import qzo.cli.train  # noqa: F401  # once, not on each rank
from qzo.cli import parts
from qzo.cli.main import main
from qzo.optim.optimizer import QZO
from qzo.training.compiled import Compiled
from qzo.training.task import Task
from tests.support import ranks, tiny
from tests.support.checkpoints import VOCAB, write_gguf
from tests.support.gguf_tokens import CONTROL, NORMAL, UNKNOWN
from tests.support.journals import read_whole

STEPS, DIRECTIONS = 4, 2
HEADS = {"attention.head_count": 6, "attention.head_count_kv": 2, "rope.dimension_count": 16}
GATHERED = {f"model.layers.*.mlp.{name}_proj": "colwise_gather_output" for name in ("gate", "up", "down")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose heads two ranks divide, its data, and what a run of one process makes of them."""
    folder = tmp_path_factory.mktemp("parts")
    tiny.save_checkpoint(folder / "llama", key_heads=2)
    tiny.write_jsonl(folder / "train.jsonl", tiny.RECORDS)
    tiny.write_jsonl(folder / "valid.jsonl", tiny.RECORDS)
    assert main(line(folder, folder / "one")) == 0
    return folder


def line(folder, out, *more, data=""):
    """A classification that is best in its middle, the rate measured, label biases fitted."""
    steps = ["--max-steps", str(STEPS), "--directions", str(DIRECTIONS), "--batch-size", "6", "--decay", "1"]
    kept = ["--eval-every", "1", "--keep", "best", "--seed", "1", "--group-size", "32", "--device", "cpu", "--json"]
    return ["train", "--data", str(folder / data), "--output-dir", str(out), *steps, *kept, *more] + (
        [] if "--model" in more else ["--model", str(folder / "llama")]
    )


def in_parts(folder, out, *more, before=lambda rank: None, **data):
    return ranks.commands(
        out.with_name(out.name + "-said"), 2, [*line(folder, out, *more, **data), "--parallel", "tensor"], before
    )


@pytest.fixture(scope="module")
def two(folder):
    """What the first rank has printed of the run in parts; the other says nothing."""
    [(status, printed, said), other] = in_parts(folder, folder / "two")
    assert status == 0, said
    assert other == (0, "", "")
    assert "14 of 14 layers in 2 parts" in said
    assert said.count("loading ") == 1
    return json.loads(printed)


def results_of(out):
    return json.loads((out / "run.json").read_text())


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def losses(path):
    return [[r.loss_plus for r in records] for records in read_whole(path)[1]]


def test_a_run_in_parts_is_near_that_of_one_process(folder, two):
    """Its journal is one process's in all but the last digits of losses; so are the rate, the biases, validation."""
    one = results_of(folder / "one")
    assert read_whole(folder / "two/journal.qzo")[0] == read_whole(folder / "one/journal.qzo")[0]
    for mine, theirs in zip(losses(folder / "two/journal.qzo"), losses(folder / "one/journal.qzo"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert two["best"]["step"] == two["model_step"] == one["model_step"] < STEPS == two["steps"]
    for scores in ("before", "control", "linear_probe", "tuned"):
        assert two[scores] == pytest.approx(one[scores], rel=1e-4)
    assert dict(two["label_bias"]) == pytest.approx(dict(one["label_bias"]), rel=1e-3)
    lines = [json.loads(text) for text in (folder / "two/metrics.jsonl").read_text().splitlines()]
    assert [text["step"] for text in lines] == [*range(STEPS)]
    assert all(text["valid"]["loss"] for text in lines)


def test_one_process_replays_its_journal_to_the_same_files(folder, two):
    replayed = ["--output-dir", str(folder / "again"), "--until", str(two["model_step"]), "--group-size", "32"]
    assert main(["replay", str(folder / "llama"), str(folder / "two/journal.qzo"), *replayed]) == 0
    assert files(folder / "again") == files(folder / "two/model")


def cut(out, whole, steps):
    """A run that ended after so many steps."""
    out.mkdir()
    _, held, _ = read_whole(whole / "journal.qzo")
    size = (whole / "journal.qzo").stat().st_size
    (out / "journal.qzo").write_bytes(
        (whole / "journal.qzo").read_bytes()[: size - 32 * DIRECTIONS * (len(held) - steps)]
    )
    kept = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)[: steps - 1]
    (out / "metrics.jsonl").write_text("".join(kept))  # the last step's line, and measurement, are not there yet


def test_it_goes_on_from_its_journal(folder, two, tmp_path):
    """In parts, to the same bits; the second rank has no journal to read."""
    cut(tmp_path / "out", folder / "two", 2)

    def elsewhere(rank):
        os.chdir(tmp_path / ("" if rank == 0 else "elsewhere"))

    (tmp_path / "elsewhere").mkdir()
    said = ranks.commands(
        tmp_path / "said", 2, [*line(folder, "out"), "--parallel", "tensor", "--auto-resume"], elsewhere
    )
    assert [status for status, _, _ in said] == [0, 0], said
    assert json.loads(said[0][1])["resumed_from"] == 2
    for name in ("journal.qzo", "model/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / "two" / name).read_bytes()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_one_process_goes_on_with_it(folder, two, tmp_path):
    cut(tmp_path / "out", folder / "two", 2)
    assert main([*line(folder, tmp_path / "out"), "--resume"]) == 0
    mine, theirs = losses(tmp_path / "out/journal.qzo"), losses(folder / "two/journal.qzo")
    assert mine[:2] == theirs[:2]
    assert mine[2:] == [pytest.approx(step, rel=1e-4) for step in theirs[2:]]


def test_outputs_alone_in_parts_have_the_bits_of_one_process(folder, tmp_path):
    def by_outputs(rank):
        parts.shard_ = functools.partial(parts.shard_, plan=GATHERED)

    [(status, _, said), _] = in_parts(folder, tmp_path / "out", before=by_outputs)
    assert status == 0, said
    assert "6 of 14 layers in 2 parts" in said
    for name in ("journal.qzo", "model/model.safetensors", "model/generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / "one" / name).read_bytes()


def test_what_is_traced_between_parts_has_the_bits_of_plain_code(folder, two, tmp_path):
    """--compile, with what dynamo has traced run as it is; the layers, which wait for each other, stay calls."""
    traced = tmp_path / "traced"

    def as_traced(rank):
        def run(module, _):
            (tmp_path / f"traced-{rank}").touch()
            return module.forward

        Compiled.__init__.__defaults__ = (run,)

    said = in_parts(folder, traced, "--compile", "--check-every", "1", before=as_traced)
    assert [status for status, _, _ in said] == [0, 0], said
    assert "uncompiled" not in said[0][2]
    assert (tmp_path / "traced-0").exists()
    assert (tmp_path / "traced-1").exists()
    assert losses(traced / "journal.qzo") == losses(folder / "two/journal.qzo")
    assert (traced / "model/model.safetensors").read_bytes() == (folder / "two/model/model.safetensors").read_bytes()


def test_texts_above_a_frozen_prefix_until_patience_ends(tmp_path):
    """Evaluations in turn, of a GGUF, whose own format is written."""
    letters = [chr(ord("A") + i) for i in range(VOCAB - 2)]
    words = {
        "tokenizer_model": "llama",
        "token_list": ["<unk>", "<s>", *letters],
        "token_types": [UNKNOWN, CONTROL, *[NORMAL] * len(letters)],
        "token_scores": [0.0] * VOCAB,
    }
    write_gguf(tmp_path / "m.gguf", metadata=HEADS, tokenizer=words)
    for split in ("train", "valid"):
        texts = [{"text": "".join(letters[i : i + 2 + i % 5])} for i in range(12)]
        tiny.write_jsonl(tmp_path / f"{split}.jsonl", texts)
    more = ["--model", str(tmp_path / "m.gguf"), "--train-layers", "1", "--sequential", "--patience", "1"]
    more += ["--learning-rate", "1", "--batch-size", "4"]
    assert main(line(tmp_path, tmp_path / "one", *more)) == 0
    [(status, printed, said), _] = in_parts(tmp_path, tmp_path / "two", *more)
    assert status == 0, said
    one, two = results_of(tmp_path / "one"), json.loads(printed)
    assert one["steps"] == two["steps"] < STEPS
    assert two["tuned"]["loss"] == pytest.approx(one["tuned"]["loss"], rel=1e-4)
    assert read_whole(tmp_path / "one/journal.qzo")[0] == read_whole(tmp_path / "two/journal.qzo")[0]
    replayed = ["--output-dir", str(tmp_path / "again"), "--until", str(two["model_step"])]
    assert main(["replay", str(tmp_path / "m.gguf"), str(tmp_path / "two/journal.qzo"), *replayed]) == 0
    assert files(tmp_path / "again") == files(tmp_path / "two/model")


# ---------------------------------------------------------------------------------------------- what stops it


def killing(number, method, at):
    """What makes a rank, or all (None), stop itself when a method is called for the at-th time; others go on."""

    def before(rank):
        owner, name = method
        plain, calls = getattr(owner, name), []

        def stops(self, *arguments, **options):
            calls.append(1)
            if len(calls) == at and number in (rank, None):
                os.kill(os.getpid(), signal.SIGTERM)
            return plain(self, *arguments, **options)

        setattr(owner, name, stops)

    return before


@pytest.mark.parametrize("number", [0, 1, None])
def test_a_rank_that_is_stopped_keeps_no_other_waiting(number, folder, two, tmp_path):
    """In a step; what is in the journal is the unbroken run's."""
    found = in_parts(folder, tmp_path / "out", before=killing(number, (QZO, "_finish"), 3))
    statuses = [status for status, _, _ in found]
    assert statuses == {0: [143, 1], 1: [1, 143], None: [143, 143]}[number], found
    assert ("another rank has ended" in found[0][2]) == (number == 1)
    held = (tmp_path / "out/journal.qzo").read_bytes()
    assert (folder / "two/journal.qzo").read_bytes().startswith(held)
    assert len(losses(tmp_path / "out/journal.qzo")) in (2, 3)


def test_nor_does_one_that_is_stopped_behind_the_last_step(folder, two, tmp_path):
    """Where biases are fitted, which all ranks compute together; nothing is saved, and --resume has only that to do."""
    found = in_parts(folder, tmp_path / "out", before=killing(0, (Task, "fit_biases_"), 1))
    assert [status for status, _, _ in found] == [143, 1]
    assert "stopped outside the training steps" in found[0][2]
    assert not (tmp_path / "out/model").exists()
    [(status, _, said), _] = in_parts(folder, tmp_path / "out", "--resume")
    assert status == 0, said
    assert files(tmp_path / "out/model") == files(folder / "two/model")


REFUSED = {
    ("--offload", "cpu"): "--offload with --parallel tensor: the codes of a block that streams to the device",
    ("--staleness", "2"): "staleness=2 with parallel='tensor': all ranks work on each layer together",
    (): "--parallel tensor divides layers among ranks, and this process was not started as one",
}


@pytest.mark.parametrize("more", REFUSED)
def test_what_does_not_go_with_it_is_said_before_anything_is_loaded(more, folder, tmp_path, capsys):
    assert main([*line(folder, tmp_path / "out", *more), "--parallel", "tensor"]) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert REFUSED[more] in said
    assert not (tmp_path / "out").exists()


def refused(folder, out, *more, **options):
    """The last line that each of two ranks says; all of them refuse."""
    found = in_parts(folder, out, *more, **options)
    assert all(status in (1, 2) for status, _, _ in found), found
    assert not out.exists()
    return [(said.splitlines() or [""])[-1] for _, _, said in found]


def test_a_model_that_cannot_be_cut_is_refused_on_all_ranks(folder, tmp_path):
    """Without a plan before it is read; by the layer that cannot be divided; with the noise that parts do not have."""
    tiny.save_checkpoint(tmp_path / "one-head")
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=30)).save_pretrained(tmp_path / "gpt2")
    instead = "divide the steps (--parallel data or directions)"
    for more, text, end in (
        (("--model", str(tmp_path / "gpt2")), "and GPT2LMHeadModel has none: ", instead),
        (("--model", str(tmp_path / "one-head")), "k_proj: 1 heads of 32 cannot be divided over 2 ranks", instead),
        (("--sharing", "row"), "sharing='row' has one z for each output row", "(parallel='data')"),
    ):
        first, second = refused(folder, tmp_path / "out", *more)
        assert first == second
        assert text in first
        assert first.endswith(end)


def test_ranks_that_differ_are_refused_before_a_forward_waits(folder, tmp_path):
    """Other data, whose rows have another length."""
    (tmp_path / "other").mkdir()
    tiny.write_jsonl(tmp_path / "other/train.jsonl", [{**r, "prompt": r["prompt"] + " up"} for r in tiny.RECORDS])
    (tmp_path / "same").mkdir()
    tiny.write_jsonl(tmp_path / "same/train.jsonl", tiny.RECORDS)

    def in_its_own(rank):
        os.chdir(tmp_path / ("other" if rank else "same"))

    command = line(folder, tmp_path / "out", "--parallel", "tensor")
    command[command.index("--data") + 1] = "train.jsonl"
    command[command.index("--keep") :][:2] = []
    [(status, _, said), (silent, *_)] = ranks.commands(tmp_path / "said", 2, command, in_its_own)
    assert (status, silent) == (2, 1)
    assert 'rank 1: its data is "sha256:' in said
    assert not (tmp_path / "out").exists()


def test_ranks_with_other_tokenizers_are_refused_before_a_forward_waits(folder, tmp_path):
    """Of as many tokens: two words have each other's."""
    shutil.copytree(folder / "llama", tmp_path / "other/llama")
    (tmp_path / "same").mkdir()
    (tmp_path / "same/llama").symlink_to(folder / "llama")
    file = tmp_path / "other/llama/tokenizer.json"
    words = json.loads(file.read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["one"], vocabulary["two"] = vocabulary["two"], vocabulary["one"]
    file.write_text(json.dumps(words))

    def in_its_own(rank):
        os.chdir(tmp_path / ("other" if rank else "same"))

    command = [*line(folder, tmp_path / "out", "--model", "llama"), "--parallel", "tensor"]
    [(status, _, said), (silent, *_)] = ranks.commands(tmp_path / "said", 2, command, in_its_own)
    assert (status, silent) == (2, 1)
    assert 'rank 1: its tokenizer is "sha256:' in said
    assert not (tmp_path / "out").exists()


def test_one_rank_keeps_the_model_whole(folder, tmp_path):
    short = line(folder, tmp_path / "out", "--parallel", "tensor", "--max-steps", "1")
    [(status, _, said)] = ranks.commands(tmp_path / "said", 1, short)
    assert status == 0, said
    assert "in 1 parts" not in said
    assert losses(tmp_path / "out/journal.qzo") == losses(folder / "one/journal.qzo")[:1]
