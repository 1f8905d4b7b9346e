"""Every code block of README and docs/ runs, and so does every file of examples/."""

import ast
import importlib.util
import re

import pytest

from qzo.cli.main import main
from tests.support import forks, tiny
from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
EXAMPLES = {  # file: (arguments, what its last lines say)
    "tune_a_module.py": ((), r"error 0\.01\d+ -> 0\.00\d+ by 288 scales"),
    "an_objective_without_gradient.py": ((), r"wrong predictions: 4\d\.\d% -> [12]\d\.\d%"),
    "train_on_a_reward.py": (("llama-w4",), r"reward: 0\.[0-2]\d -> (0\.[6-9]|1\.0)"),
    "train_on_exact_match.py": (("llama-w4",), r"exact matches: [01] of 6 -> [3-6] of 6"),
    "tune_a_language_model.py": (("llama-w4", "spoken"), r"step 9: loss \d"),
    "replay_a_journal.py": (("llama-w4", "run/journal.qzo", "2"), r"2 steps applied; .* moved by \d"),
    "through_transformers.py": (("llama", "through"), r"14 layers of 4 bits\nHeadline : red"),
    "trl_sft.py": (("llama-w4", "sft-example"), r"loss on held-out rows: \d\.\d+ -> \d\.\d+"),
}
OPTIONAL = {"trainer.md": ("accelerate", "trl"), "trl_sft.py": ("accelerate", "trl")}  # packages that these need


def blocks(page):
    """(language, text) of the fenced blocks of a page."""
    return BLOCK.findall(page.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where blocks run: llama, a tiny float model; llama-w4, the same in 4 bits; data; run, a run of four steps."""
    folder = tmp_path_factory.mktemp("docs")
    tiny.save_checkpoint(folder / "llama")
    (folder / "data").mkdir()
    for split in ("train", "valid", "test"):
        tiny.write_jsonl(folder / "data" / f"{split}.jsonl", tiny.RECORDS)
    [yaml] = [text for language, text in blocks(ROOT / "docs/settings.md") if language == "yaml"]
    (folder / "run.yaml").write_text(yaml)
    model = str(folder / "llama-w4")
    assert main(["quantize", str(folder / "llama"), "--output-dir", model]) == 0
    arguments = ["--data", str(folder / "data"), "--output-dir", str(folder / "run"), "--max-steps", "4"]
    assert main(["train", model, *arguments]) == 0
    return folder


def program(page):
    """Python that runs the page's blocks in order: commands in one process, so that torch is imported once."""
    lines = ["import shlex", "from qzo.cli.main import main"]
    for language, text in blocks(page):
        if language == "python":
            lines.append(f"exec(compile({text!r}, {page.name!r}, 'exec'), {{'__name__': 'block'}})")
        elif language == "sh":
            commands = [line for line in text.splitlines() if line.strip()]
            known = [line for line in commands if line.startswith("qzo ")]
            others = [line for line in commands if line not in known]
            assert all(line.startswith("python3 -m venv") for line in others), f"{page.name}: {others}"
            lines += [f"assert main(shlex.split({line!r})[1:]) == 0, {line!r}" for line in known]
    return "\n".join(lines)


RUNNABLE = [page for page in PAGES if "main(" in program(page) or "exec(" in program(page)]


def lacking(name):
    """The packages that a page or an example needs and that are not installed."""
    return [package for package in OPTIONAL.get(name, ()) if importlib.util.find_spec(package) is None]


def skip_without_packages(name):
    if lacking(name):
        pytest.skip(f"{name} needs {' and '.join(lacking(name))}: pip install 'qzo[trl]'")


@pytest.fixture(scope="module")
def said(folder):
    """name of a page or example -> (0 if it ended well, what it printed, what it said on standard error)."""
    wanted: list[tuple[str, str, tuple[str, ...]]]
    wanted = [(page.name, program(page), ()) for page in RUNNABLE if not lacking(page.name)]
    wanted += [
        (name, (ROOT / "examples" / name).read_text(), arguments)
        for name, (arguments, _) in EXAMPLES.items()
        if not lacking(name)
    ]
    return forks.run(folder, wanted)


def test_blocks_have_a_language_that_is_known():
    for page in PAGES:
        assert {language for language, _ in blocks(page)} <= {"python", "sh", "text", "yaml", "mermaid"}, page.name
    assert sum(language in ("python", "sh") for page in PAGES for language, _ in blocks(page)) >= 12


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_a_pages_blocks_run(page, said):
    skip_without_packages(page.name)
    status, _, errors = said[page.name]
    assert status == 0, errors[-3000:]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, said):
    skip_without_packages(name)
    assert len((ROOT / "examples" / name).read_text().splitlines()) < 60
    status, printed, errors = said[name]
    assert status == 0, errors[-3000:]
    assert re.search(EXAMPLES[name][1], printed)


def test_every_example_is_run():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


def test_links_lead_somewhere():
    """Relative links of README, docs and the other pages, and files of the repository that they name."""
    pages = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
    for page in pages:
        text = page.read_text()
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
        for named in re.findall(r"`((?:qzo|kernels|bench|tests|docs|examples)/[\w./-]+?\.(?:py|jsonl|md|sh))`", text):
            assert (ROOT / named).exists(), f"{page.name}: {named}"


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    assert sorted(re.findall(r": ([\w-]+\.md)$", text, re.M)) == sorted(page.name for page in PAGES[1:])


def test_modules_and_glossary_name_each_other():
    """A module that the glossary names says so in its docstring, with the terms."""
    for paragraph in (ROOT / "docs/glossary.md").read_text().split("\n\n"):
        term = re.match(r"\*\*([^*,]+)", paragraph)
        if term is None:
            continue
        for named in re.findall(r"`((?:qzo|kernels)/[\w/]+\.py)`", paragraph):
            said = ast.get_docstring(ast.parse((ROOT / named).read_text())) or ""
            assert re.search(rf"Terms \(.*{re.escape(term[1])}.*\): docs/glossary.md", said), f"{named}: {term[1]}"
