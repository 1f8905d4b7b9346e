"""What mypy sees: faults planted in copies of our files turn it red, the files as they are do not."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

FAULT = 'x: int = "text" + 3'
ARENA, CODES = "qzo/nn/arena.py", "qzo/reports/codes.py"
TRUE = ("qzo/nn/arena.py", "qzo/nn/layers.py", "qzo/reports/codes.py", "qzo/cli/errors.py", "tests/oracle.py")


def with_fault(path):
    """The file's text with FAULT as the first statement of its last function."""
    lines = (ROOT / path).read_text().splitlines(keepends=True)
    start = max(number for number, line in enumerate(lines) if re.match(r" *def ", line))
    body = start + next(i for i, line in enumerate(lines[start:]) if line.endswith(":\n")) + 1
    indent = " " * (len(lines[body]) - len(lines[body].lstrip()))
    return "".join([*lines[:body], f"{indent}{FAULT}\n", *lines[body:]])


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """path -> what mypy says of it with the project's settings: of true files, and of planted ones beside them.

    Imports are not followed: reading torch takes a minute, and no fault here needs it.
    """
    pytest.importorskip("mypy", reason="mypy is of the extra 'dev'")
    tree = tmp_path_factory.mktemp("tree")
    bare = "\n\ndef bare(x):\n    return x\n"
    texts = {path: (ROOT / path).read_text() for path in TRUE}
    texts |= {
        "qzo/nn/planted.py": with_fault(ARENA),
        "qzo/nn/bare.py": texts[ARENA] + bare,
        "qzo/reports/planted.py": with_fault(CODES),
        "qzo/reports/bare.py": texts[CODES] + bare,
        "bench/planted.py": f"def bare():\n    {FAULT}\n",
        "tests/planted.py": f"def bare():\n    {FAULT}\n",
    }
    for path, text in texts.items():
        target = tree / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        for folder in target.relative_to(tree).parents:
            if folder.name and folder.name != "bench":
                (tree / folder / "__init__.py").touch()
    (tree / "qzo/bench").symlink_to("../bench")
    shutil.copy(ROOT / "pyproject.toml", tree)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--follow-imports=skip",
        "--cache-dir",
        str(tree / "cache"),
        "qzo",
        "tests",
    ]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found: dict[str, list[str]] = {path: [] for path in texts}
    for line in filter(re.compile(r"[^:]+:\d+: error: ").match, done.stdout.splitlines()):
        path, _, text = line.partition(":")
        found["bench/planted.py" if path == "qzo/bench/planted.py" else path].append(text)
    return found


@pytest.mark.parametrize("path", TRUE)
def test_files_as_they_are_are_green(told, path):
    assert told[path] == []


@pytest.mark.parametrize("path", [f"{folder}/planted.py" for folder in ("qzo/nn", "qzo/reports", "bench", "tests")])
def test_a_planted_fault_is_red(told, path):
    """Also in functions without annotations, which mypy passes over by default."""
    [text] = told[path]
    assert text.endswith("[operator]")


@pytest.mark.parametrize("path", ["qzo/nn/bare.py", "qzo/reports/bare.py"])
def test_annotations_are_wanted(told, path):
    [text] = told[path]
    assert text.endswith("[no-untyped-def]")


def test_ci_runs_mypy_and_waits_for_it():
    lines = [line.partition("#")[0].strip() for line in (ROOT / ".ci/run").read_text().splitlines()]
    assert lines.index(".venv/bin/mypy qzo tests & types=$!") < lines.index('wait "$types"')
    assert lines[1:].count("set -euo pipefail") == 1
