"""House rules: who may import whom, how long files and functions may be, what a wheel holds, that the README runs."""

import ast
import graphlib
import re
import subprocess
import sys
import zipfile

import pytest

import qzo
from tests.support.paths import ROOT

FLOORS = (
    *("version", "kernels", "system", "nn", "loss", "optim", "checkpoints", "training", "diffusion", "trainer"),
    *("reports", "bench", "cli"),
)
PRODUCT = sorted(
    path
    for path in [*ROOT.glob("kernels/*.py"), *ROOT.glob("bench/**/*.py"), *ROOT.glob("qzo/**/*.py")]
    if path.relative_to(ROOT).parts[:2] not in (("qzo", "kernels"), ("qzo", "bench"))
)
OPTIONAL = {"diffusers", "gemlite", "torchao", "bitsandbytes", "gptqmodel", "hqq", "compressed_tensors", "pyarrow"}
POSTPONED = {"gpu_check", "gpu_parts", "gpu_warm"}  # of bench: they start before torch may see the device


def name_of(path):
    """qzo.kernels.noise, qzo.nn.linear, qzo.bench.run, ... of a file, and whether it is a package's own."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "qzo" else ("qzo", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts), parts[-1] == "__init__"


MODULES = {name_of(path)[0]: path for path in PRODUCT}


def imports(tree, module="qzo", package=False):
    """(full name of what is imported, whether inside a function) of each import; of our own, the module that has it."""
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    home = module.split(".") if package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base, id(node) in inside
        elif isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in inside) for alias in node.names)


def floor_of(module):
    return module.split(".")[1] if "." in module else ""


def problems(trees):
    """What is wrong with the imports of {module: (tree, whether a package's own file)}: lines of text."""
    arrows = {}
    for module, (tree, package) in trees.items():
        if module in ("qzo", "qzo.__main__", "qzo.bench.__main__"):  # public names, each from its home; two ways in
            continue
        mine, found = floor_of(module), set()
        for name, lazy in imports(tree, module, package):
            top = name.split(".")[0]
            if top in ("kernels", "bench"):
                yield f"{module} imports {name}: these two are imported as qzo.kernels and qzo.bench only"
            if lazy and top not in OPTIONAL and module.rpartition(".")[2] not in POSTPONED:
                yield f"{module} imports {name} inside a function"
            if mine == "kernels" and top not in {"torch", "triton", "qzo", *sys.stdlib_module_names}:
                yield f"{module} imports {name}: a kernel needs torch and triton only"
            if name == "qzo" and mine not in ("bench", "cli"):
                yield f"{module} imports qzo's public names, which are built on it"
            if top != "qzo" or name == "qzo":
                continue
            if name not in MODULES:
                yield f"{module} imports {name}, which is no module"
                continue
            found.add(name)
            if FLOORS.index(floor_of(name)) > FLOORS.index(mine):
                yield f"{module} imports {name}, which is built on it"
            if floor_of(name) == "bench" and mine not in ("bench", "cli"):
                yield f"{module} imports the benchmark"
        arrows[module] = found - {module}
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        yield f"circle: {' -> '.join(error.args[1])}"


def parsed():
    return {module: (ast.parse(path.read_text()), path.name == "__init__.py") for module, path in MODULES.items()}


def test_imports_flow_down_and_never_in_a_circle():
    assert list(problems(parsed())) == []


@pytest.mark.parametrize(
    ("module", "line", "told"),
    [
        ("qzo.nn.arena", "from ..optim import journal", "built on it"),
        ("qzo.optim.journal", "from . import optimizer", "circle"),
        ("qzo.loss.head", "def f():\n    from ..nn import arena", "inside a function"),
        ("qzo.reports.memory", "from ..bench import cases", "benchmark"),
        ("qzo.kernels.noise", "import numpy", "torch and triton only"),
    ],
)
def test_a_planted_import_is_seen(module, line, told):
    trees = parsed()
    trees[module] = ast.parse(MODULES[module].read_text() + "\n" + line), False
    assert any(told in text for text in problems(trees)), line


def test_oracle_shares_nothing():
    found = {name.split(".")[0] for name, _ in imports(ast.parse((ROOT / "tests/oracle.py").read_text()))}
    assert found <= {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_short_and_clean(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert not re.search(r"TODO|FIXME|except:|except Exception|assert True", text)
    if name_of(path)[0].split(".")[1:2] != ["bench"]:
        assert not re.search(r"os\.environ|getenv", text), "no environment variables"


# (file, function) over 60 lines or 8 parameters: what the public surface fixes, and the operator's flat schema
FIXED = {
    ("optim/optimizer.py", "__init__"),
    ("checkpoints/load.py", "from_pretrained"),
    ("checkpoints/quantize_folder.py", "quantize_folder"),
    ("trainer/mixin.py", "__init__"),
}
LEFT = {
    ("ops.py", "qmm_op"),
    ("ops.py", "_"),
    ("footprint.py", "_qmm_scratch"),  # counts what the operator takes, argument for argument
}


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_are_short(path):
    """At most 60 lines and 8 parameters; kernels' own signatures excepted."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef) or any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
            continue
        if any(str(path).endswith(file) and node.name == name for file, name in FIXED | LEFT):
            continue
        count = len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
        assert node.end_lineno is not None
        lines = node.end_lineno - node.lineno + 1
        assert lines <= 60, f"{node.name} has {lines} lines"
        assert count <= 8, f"{node.name} has {count} parameters"


# modules of the product without a test file of their name, and the reason
SCRIPT = "measures once, for a page; nothing stands on it"
PART = "a part of gpu_check.py that needs a GPU; test_gpu_check.py runs it at small sizes without"
UNTESTED = {
    "bench/__main__.py": "two lines around command.py",
    "bench/cpu_step.py": SCRIPT,
    "bench/gpu_diffusion.py": PART,
    "bench/gpu_parts.py": PART,
    "bench/gpu_steps.py": PART,
    "bench/gpu_warm.py": PART,
    "bench/packing.py": SCRIPT,
    "bench/peers.py": "kernels of other projects, which need a GPU and their packages",
    "bench/fuzz/__main__.py": "two lines around runs.py",
    "bench/study/__main__.py": "two lines around runs.py",
    "bench/study/runs.py": "test_methods.py makes its runs",
    "bench/small.py": "three of the kinds of cases that test_run.py runs",
    "bench/test_speed.py": "a file of tests itself, for pytest-benchmark",
    "qzo/__main__.py": "two lines, which tests/cli runs",
    "qzo/version.py": "one number",
    "qzo/optim/defaults.py": "four constants; test_options.py finds them alike in options and in Settings",
}


def mirrored(path):
    """Where the tests of a module are."""
    inside = path.relative_to(ROOT / "qzo") if path.is_relative_to(ROOT / "qzo") else path.relative_to(ROOT)
    return ROOT / "tests" / inside.parent / f"test_{path.stem.strip('_')}.py"


def untested(paths):
    """Names of the modules among these that have no test file of their name."""
    return {str(p.relative_to(ROOT)) for p in paths if p.name != "__init__.py" and not mirrored(p).exists()}


def test_every_module_has_tests_of_its_name():
    """Who changes a module knows which tests to run, and finds what it promises."""
    missing = untested(PRODUCT)
    assert sorted(missing - UNTESTED.keys()) == [], "write tests/<folder>/test_<module>.py"
    assert sorted(UNTESTED.keys() - missing) == [], "these have tests by now: take them out of UNTESTED"


def test_a_module_without_tests_is_seen():
    assert untested([ROOT / "kernels/noise.py", ROOT / "qzo/optim/nosuch.py"]) == {"qzo/optim/nosuch.py"}


def test_two_folders_have_no_init():
    """A regular package called kernels would hide Hugging Face's."""
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "bench/__init__.py").exists()


def test_public_names():
    named = {
        "Evaluations",
        "QZO",
        "QZOLinear",
        "backend",
        "evaluating",
        "export",
        "from_pretrained",
        "losses",
        "noise",
        "pair",
        "quantize_",
        "replay",
        "save_pretrained",
        "scale_index",
        "scales",
    }
    assert named <= set(qzo.__all__)
    for name in qzo.__all__:
        assert getattr(qzo, name).__doc__, f"qzo.{name} has no docstring"


def test_public_names_have_their_homes():
    """The types that a checker sees, the table that Python uses and __all__ are one list."""
    tree = ast.parse((ROOT / "qzo/__init__.py").read_text())
    [typed] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == qzo._HOME_OF
    assert sorted(seen) == sorted(qzo.__all__)
    with pytest.raises(AttributeError, match="no attribute 'stub'"):
        qzo.stub  # noqa: B018


def python(code, cwd, *path):
    """Run code in a fresh interpreter that finds modules in `path`, in that order."""
    code = f"import sys; sys.path[:0] = {[str(p) for p in path]!r}\n" + code
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300)


def test_importing_touches_no_device_and_no_transformers(tmp_path):
    done = python(
        "import qzo\nassert 'torch' not in sys.modules\nimport torch\nqzo.QZOLinear, qzo.QZO, qzo.quantize_\n"
        "assert not torch.cuda.is_initialized()\nassert not {'transformers', 'accelerate'} & set(sys.modules)",
        tmp_path,
        ROOT,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        target = tree / name
        if not (ROOT / name).exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to((ROOT / name).readlink())
        elif not name.startswith("tests/"):
            target.write_bytes((ROOT / name).read_bytes())
    build = "import setuptools.build_meta as b; print(b.build_wheel('..'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True, check=True)
    return folder / done.stdout.splitlines()[-1]


def test_the_wheel_is_the_tree_under_one_name(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        points = next(archive.read(n).decode() for n in archive.namelist() if n.endswith("entry_points.txt"))
    tree = {
        str(path.relative_to(ROOT))
        for path in [*PRODUCT, ROOT / "qzo/py.typed", *ROOT.glob("qzo/reports/configs/*.json")]
    }
    want = {name if name.startswith("qzo/") else f"qzo/{name}" for name in tree}
    assert files == want
    assert "qzo = qzo.cli.main:main" in points


def test_the_wheel_works_and_leaves_hugging_faces_kernels_alone(wheel, tmp_path):
    """A regular package `kernels`, last on the path, is the one that others get."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    stub = tmp_path / "stub" / "kernels"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("here = True\n")
    check = (
        f"sys.path.append({str(stub.parent)!r})\nimport kernels\nassert kernels.here\n"
        "import qzo.kernels.qmm, qzo.bench.codegen.sass\nfrom transformers import LlamaForCausalLM\n"
        "print(qzo.__file__)"
    )
    for path in (tmp_path / "site", ROOT):
        done = python(check, tmp_path, path)
        assert done.returncode == 0, done.stderr
        assert str(path) in done.stdout


def test_the_readme_runs():
    text = (ROOT / "README.md").read_text()
    [block] = re.findall(r"```python\n(.*?)```", text, re.S)
    done = python(block, ROOT, ROOT)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 20
    lines = [line for line in text.splitlines() if line.startswith("python3 -m venv")]
    assert [line.split(".venv/bin/")[-1].split(" -q")[0] for line in lines] == ["qzo demo", "python -m pytest"]
    for line in lines:
        assert line.index("torch==2.13.0") < line.index("install -q .") if "install -q ." in line else "-e" in line
