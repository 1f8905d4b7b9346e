"""`qzo train-diffusion` from end to end on a tiny pipeline, and what it refuses."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from qzo.cli import train_diffusion
from qzo.cli.main import main
from qzo.diffusion.pictures import assemble
from qzo.diffusion.pipeline import open_pipeline
from qzo.diffusion.task import DiffusionTask
from qzo.diffusion.transformer import load_transformer
from qzo.nn.layers import arena_of
from qzo.optim.journal import RECORD_BYTES
from qzo.optim.replay import replay
from tests.support import pipelines, sd3_gguf

pytest.importorskip("diffusers")
SMALL = "--resolution 16 --prompt-tokens 12 --group-size 32 --batch-size 4 --directions 1"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """p, a pipeline; d, pictures in train and valid; run, two of four steps on them."""
    folder = tmp_path_factory.mktemp("files")
    pipelines.save_pipeline(folder / "p")
    pipelines.save_pictures(folder / "d" / "train")
    pipelines.save_pictures(folder / "d" / "valid", 3, 18)
    assert main(line(folder, "p", "run", "--max-steps 4")) == 0
    return folder


def line(folder, pipeline, out, more=""):
    text = f"train-diffusion {folder}/{pipeline} --data {folder}/d --output-dir {folder}/{out} {SMALL} {more}"
    return text.split()


def test_a_run_leaves_a_pipeline_and_what_it_measured(files):
    """The tuned transformer is the base with the journal's steps, and loads again with these scales."""
    results = json.loads((files / "run" / "run.json").read_text())
    [valid] = results["splits"].values()
    assert results["steps"] == 4
    assert valid["pictures"] == 3
    assert len(valid["by_time"]) == 8
    assert valid["difference"] == pytest.approx(valid["tuned"]["loss"] - valid["before"]["loss"], abs=1e-5)
    assert valid["error"] > 0
    assert results["objective"]["shift"] == 3.0
    cpu = torch.device("cpu")
    base, _ = load_transformer(open_pipeline(files / "p"), cpu, torch.float32, 32)
    replay(base, files / "run" / "journal.qzo")
    saved, origin = load_transformer(open_pipeline(files / "run" / "model"), cpu, torch.float32)
    assert origin.method == "bitsandbytes"
    assert torch.equal(arena_of(saved).data, arena_of(base).data)
    assert {f.name for f in (files / "run").iterdir()} == {
        *("cache", "journal.qzo", "metrics.jsonl", "curve.png", "run.json", "model"),
    }


def test_a_replay_gives_the_same_pipeline(files, capsys):
    """All steps, byte for byte; two of them, another transformer."""
    for name, more in (("again", ""), ("half", "--until 2")):
        line = f"replay {files}/p {files}/run/journal.qzo --output-dir {files}/{name} --group-size 32 --json {more}"
        assert main(line.split()) == 0
    assert [json.loads(said)["steps"] for said in capsys.readouterr().out.splitlines()] == [4, 2]
    weights = "transformer/diffusion_pytorch_model.safetensors"
    tuned = (files / "run/model" / weights).read_bytes()
    assert (files / "again" / weights).read_bytes() == tuned
    assert (files / "half" / weights).read_bytes() != tuned
    assert (files / "again/model_index.json").is_file()


def test_it_goes_on_where_it_was_stopped(files, monkeypatch, capsys):
    """Ctrl-C after two steps, --resume: the journal has the bits of the unbroken run's; the cache is used again."""
    steps: list[int] = []
    real = DiffusionTask.batch

    def stopping(*given):
        if len(steps) == 2:
            raise KeyboardInterrupt
        steps.append(0)
        return real(*given)

    monkeypatch.setattr(DiffusionTask, "batch", stopping)
    assert main(line(files, "p", "broken", "--max-steps 4")) == 130
    assert "stopped after 2 steps" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr("qzo.diffusion.cache.vae_encoder", None)
    assert main(line(files, "p", "broken", "--max-steps 4 --resume")) == 0
    assert (files / "broken/journal.qzo").read_bytes() == (files / "run/journal.qzo").read_bytes()


def test_a_stopped_build_of_the_cache_goes_on_without_resume(files, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("qzo.diffusion.cache.vae_encoder", stopped)
    assert main(line(files, "p", "early", "--max-steps 1")) == 130
    assert "stopped outside the training steps" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(line(files, "p", "early", "--max-steps 1 --json --keep best --eval-every 1")) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 1


def test_a_gguf_file_goes_in_and_out(files):
    """Beside a pipeline that holds other weights; OUT/model is such a file."""
    torch.manual_seed(8)
    path = sd3_gguf.write(files / "m.gguf", pipelines.transformer())
    assert main(line(files, "p", "gguf", f"--max-steps 1 --transformer {path} --cache {files}/run/cache")) == 0
    tuned = files / "gguf/model/m.gguf"
    assert tuned.stat().st_size == path.stat().st_size
    assert tuned.read_bytes() != path.read_bytes()


REFUSED = {
    "--resolution 18": "--resolution 18: a token of",
    "--weighting sigma_sqrt": "weighting 'sigma_sqrt' multiplies a row's loss by s^-2",
    "--draws 0": "draws=0: expected an int >= 1",
    "--shift 0": "shift=0.0: expected a finite number > 0",
    "--caption-dropout 1": "dropout=1.0: expected a share",
    "--batch-size 9": "batch_size=9, but there are 8 training examples",
    "--eps 2": "eps=2.0: expected a number > 0 and <= 1",
    "--transformer gone.gguf": "--transformer gone.gguf: there is no such file; give a GGUF file",
    "--prompt-tokens 8": "is a cache made by another length of prompts (12, not 8)",
    "--device cuda:9": "--device cuda:9 cannot be used",
}


@pytest.mark.parametrize("option", REFUSED)
def test_bad_input_is_one_line(option, files, capsys):
    if "cuda" in option and torch.cuda.device_count() > 9:
        pytest.skip("there is such a device")
    assert main(line(files, "p", "no", f"--max-steps 1 --cache {files}/run/cache {option}")) == 2
    said = capsys.readouterr().err
    assert REFUSED[option] in said.splitlines()[-1]
    assert not (files / "no" / "journal.qzo").exists()


def test_data_and_pipelines_that_cannot_be_used_are_refused(files, capsys):
    shutil.copytree(files / "p", files / "ddpm")
    path = files / "ddpm" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "DDPMScheduler"}))
    assert main(line(files, "ddpm", "no")) == 2
    assert "DDPMScheduler is no scheduler of a flow model" in capsys.readouterr().err
    assert main(line(files, "gone", "no")) == 2
    assert "holds no model_index.json" in capsys.readouterr().err
    pipelines.save_pictures(files / "bare" / "d", captions=None)
    shutil.copytree(files / "p", files / "bare" / "p")
    assert main(line(files / "bare", "p", "no")) == 2
    assert "8 of 8 pictures have no caption" in capsys.readouterr().err
    assert main(line(files, "p", "run")) == 2
    assert "holds a journal of 4 steps already" in capsys.readouterr().err


def test_held_out_losses_are_compared_in_pairs():
    before = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    after = before + torch.tensor([[0.0, 1.0], [1.0, 2.0]])
    found = train_diffusion.compared(before, after)["splits"]["valid"]
    assert (found["difference"], found["pictures"], found["by_time"]) == (1.0, 2, [0.5, 1.5])
    assert found["error"] == pytest.approx(0.5)
    assert train_diffusion.compared(None, None)["splits"] == {}
    one = train_diffusion.compared(before[:1], after[:1])
    assert one["splits"]["valid"]["error"] is None
    text = train_diffusion.as_text({"splits": one["splits"], "model": "m"})
    assert text.splitlines()[0] == (
        "valid: loss 2.00000 before, 2.50000 after, difference +0.50000; 1 pictures at 8 times each"
    )


def steps_of(folder):
    """The four steps of a run, as its journal has them."""
    return (folder / "journal.qzo").read_bytes()[-4 * RECORD_BYTES :]


def test_a_file_of_options_is_read_and_the_command_line_wins(files, capsys):
    (files / "options.yaml").write_text(
        f"data: {files}/d\noutput-dir: {files}/by-file\nresolution: 16\nprompt_tokens: 12\ngroup-size: 32\n"
        f"batch-size: 4\ndirections: 1\nmax-steps: 9\ncache: {files}/run/cache\nstratified: true\n"
    )
    command = ["train-diffusion", f"{files}/p", "--config", f"{files}/options.yaml"]
    assert main([*command, "--max-steps", "4"]) == 0
    assert steps_of(files / "by-file") == steps_of(files / "run")
    (files / "options.yaml").write_text("lr: 1\npipeline: x\n")
    assert main(command) == 2
    assert "options.yaml: unknown keys lr, pipeline; known are " in capsys.readouterr().err
    (files / "options.yaml").write_text("resolution: 16\n")
    assert main(command) == 2
    assert (
        capsys.readouterr().err
        == "qzo train-diffusion: missing --data, --output-dir (on the command line or in --config)\n"
    )


def test_pictures_are_drawn_while_it_trains_and_change_no_bit(files, monkeypatch):
    """Of the first captions of valid, the i-th with the seed i; the base before, the tuned transformer at the end."""
    drawing = "--max-steps 4 --sample-every 2 --samples 3 --sampling-steps 2 --guidance-scale 2"
    assert main(line(files, "p", "drawn", f"{drawing} --cache {files}/run/cache")) == 0
    folder = files / "drawn" / "samples"
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{n:06}.png" for n in (0, 2, 4)]
    assert steps_of(files / "drawn") == steps_of(files / "run")
    sheets = [np.array(Image.open(path)) for path in sorted(folder.iterdir())]
    assert all(sheet.shape == (32, 32, 3) for sheet in sheets)
    assert (sheets[0] != sheets[2]).any()
    captions = [(files / "d" / "valid" / f"p{i}.txt").read_text().strip() for i in range(3)]
    for sheet, folder in ((sheets[0], "p"), (sheets[2], "drawn/model")):
        pipeline = open_pipeline(files / folder)
        model, _ = load_transformer(pipeline, torch.device("cpu"), torch.float32, 32)
        pipe = assemble(pipeline, model)
        for i, caption in enumerate(captions):
            picture = pipe(
                caption,
                height=16,
                width=16,
                num_inference_steps=2,
                guidance_scale=2.0,
                generator=torch.Generator().manual_seed(i),
                max_sequence_length=12,  # as the cache was made with
            ).images[0]
            at = np.s_[16 * (i // 2) : 16 * (i // 2) + 16, 16 * (i % 2) : 16 * (i % 2) + 16]
            assert np.abs(np.array(picture).astype(int) - sheet[at]).max() <= 2, (folder, i)
    before = {path: path.stat().st_mtime_ns for path in (files / "drawn" / "samples").iterdir()}
    assert (
        main(
            line(files, "p", "drawn", f"{drawing} --cache {files}/run/cache --resume".replace("steps 4", "steps 5", 1))
        )
        == 0
    )
    assert {path: path.stat().st_mtime_ns for path in (files / "drawn" / "samples").iterdir()} == before


@pytest.mark.parametrize("option", ["--sample-every 0", "--samples 0", "--sampling-steps -1", "--guidance-scale nan"])
def test_samples_out_of_range_are_refused(files, capsys, option):
    assert main(line(files, "p", "no", f"--sample-every 1 {option}")) == 2
    assert f"{option.split()[0]} " in capsys.readouterr().err
    assert not (files / "no" / "journal.qzo").exists()
