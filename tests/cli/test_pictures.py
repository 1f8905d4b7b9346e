"""`qzo generate` of a pipeline: pictures, by a run too, and what is refused."""

import json

import pytest

from qzo.cli.main import main
from tests.support import pipelines

pytest.importorskip("diffusers")
SMALL = "--resolution 16 --group-size 32"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """p, a pipeline; run, two steps on it."""
    folder = tmp_path_factory.mktemp("files")
    pipelines.save_pipeline(folder / "p")
    pipelines.save_pictures(folder / "d")
    line = f"train-diffusion {folder}/p --data {folder}/d --output-dir {folder}/run {SMALL} --prompt-tokens 12"
    assert main([*line.split(), "--max-steps", "2", "--batch-size", "4", "--learning-rate", "5"]) == 0
    return folder


def generate(files, out, more=""):
    line = f"generate {files}/p --output-dir {files}/{out} {SMALL} --sampling-steps 2 {more}"
    return main([*line.split(), "--prompt", "a red cat"])


def test_pictures_of_seeds_and_of_a_run(files, capsys):
    assert generate(files, "one", "--images 2 --seed 5") == 0
    assert capsys.readouterr().out.splitlines() == [f"{files}/one/seed-{seed}.png" for seed in (5, 6)]
    assert generate(files, "two", f"--seed 6 --json --journal {files}/run/journal.qzo") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["steps"], told["prompt"]) == (2, "a red cat")
    assert (files / "two/seed-6.png").read_bytes() != (files / "one/seed-6.png").read_bytes()
    saved = f"generate {files}/run/model --output-dir {files}/three --resolution 16 --sampling-steps 2 --seed 6"
    assert main([*saved.split(), "--prompt", "a red cat"]) == 0
    assert (files / "three/seed-6.png").read_bytes() == (files / "two/seed-6.png").read_bytes()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("--images 0", "--images 0: expected a number >= 1"),
        ("--guidance-scale -1", "--guidance-scale -1.0: expected a finite number >= 0"),
        ("--sampling-steps 0", "--sampling-steps 0: expected a number >= 1"),
        ("--until 3", "--until 3 is a step of a run"),
        ("--resolution 18", "--resolution 18: a token of"),
    ],
)
def test_bad_input_is_one_line(more, told, files, capsys):
    assert generate(files, "no", more) == 2
    assert told in capsys.readouterr().err
    assert not (files / "no").exists()


def test_what_only_texts_have_is_refused(files, capsys):
    assert main(["generate", f"{files}/p", "--chat", "hello", "--output-dir", f"{files}/no"]) == 2
    assert "--chat is of models that write text" in capsys.readouterr().err
    assert main(["generate", f"{files}/p", "--prompt", "hello"]) == 2
    assert "pictures are written to a folder: give --output-dir" in capsys.readouterr().err
