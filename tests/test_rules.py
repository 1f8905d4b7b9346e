"""House rules: who may import whom, how long a file may be, what a wheel holds, that the README runs."""
import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import qzo

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = sorted([*ROOT.glob("kernels/*.py"), *ROOT.glob("bench/*.py"), *ROOT.glob("qzo/*.py"),
                  *ROOT.glob("qzo/formats/*.py")])
LAYERS = [   # a module may import its own layer's elders and everything above it
    {"kernels.noise", "kernels.codes", "kernels.tiles"},
    {"kernels.table", "kernels.vectors", "kernels.scales", "kernels.constants"}, {"kernels.forms"},
    {"kernels.operands"},
    {"kernels.qmm", "kernels.qmm_torch", "kernels.update"}, {"kernels.plan"},
    {"kernels.dequantize", "kernels.folded", "kernels.perturb"}, {"checks"},
    {"weights", "evaluations", "journal", "disk", "ops", "oom", "heap", "arena", "siblings", "experts", "formats",
     "buckets", "head"}, {"own_loss"}, {"quantize"},
    {"linear"}, {"layers"}, {"optim", "losses", "hf", "names", "fill", "save", "quantizer", "graph"},
    {"encode"}, {"data", "prefix", "packing", "signal", "compiled", "many_rows"}, {"task"}, {"train"}, {"demo"},
    {"__main__", "bench", "inspect", "quantize_folder"}]


def name_of(path):
    """kernels.qmm, formats, linear, ..."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        return ".".join(parts)
    return parts[0] if parts[0] == "bench" else parts[1]


def imports(path):
    """(name inside the package or None, full text) of each import."""
    package = ["qzo", *path.relative_to(ROOT).parts[:-1]] if path.parts[-2] in ("kernels", "bench") else list(
        path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[:len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names if len(base) < 2 or base[-1] == "kernels" else [None]:
                yield ".".join([*base, alias.name] if alias else base)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def level(name):
    return next(i for i, layer in enumerate(LAYERS) if name in layer)


@pytest.mark.parametrize("path", [p for p in PRODUCT if p.name != "__init__.py"],
                         ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_flow_one_way(path):
    mine = name_of(path)
    for found in imports(path):
        top, *rest = found.split(".")
        assert top not in ("kernels", "bench"), f"{found}: these two are imported as qzo.kernels and qzo.bench only"
        if mine == "journal":
            assert top in sys.stdlib_module_names
        if mine.startswith("kernels"):
            assert top in ("torch", "triton", "qzo") or top in sys.stdlib_module_names
            assert top != "qzo" or rest[0] == "kernels", f"kernels may not import {found}"
        if top == "qzo" and rest and rest[0] not in ("__version__", mine):
            other = ".".join(rest[:2]) if rest[0] == "kernels" else rest[0]
            assert level(other) <= level(mine), f"{mine} imports {other}, which is built on it"


def test_oracle_shares_nothing():
    found = {name.split(".")[0] for name in imports(ROOT / "tests/oracle.py")}
    assert found <= {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_short_and_clean(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert not re.search(r"TODO|FIXME|except:|except Exception|assert True", text)
    if path.parent.name != "bench":
        assert not re.search(r"os\.environ|getenv", text), "no environment variables"


def test_two_folders_have_no_init():
    """A regular package called kernels would hide Hugging Face's."""
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "bench/__init__.py").exists()


def test_public_names():
    named = {"Evaluations", "QZO", "QZOLinear", "backend", "evaluating", "export", "from_pretrained", "losses", "noise",
             "pair", "quantize_", "replay", "save_pretrained", "scale_index", "scales"}
    assert named <= set(qzo.__all__)
    for name in qzo.__all__:
        assert getattr(qzo, name).__doc__, f"qzo.{name} has no docstring"


def python(code, cwd, *path):
    """Run code in a fresh interpreter that finds modules in `path`, in that order."""
    code = f"import sys; sys.path[:0] = {[str(p) for p in path]!r}\n" + code
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300)


def test_importing_touches_no_device_and_no_transformers(tmp_path):
    done = python("import qzo, torch\nassert not torch.cuda.is_initialized()\nassert 'transformers' not in sys.modules",
                  tmp_path, ROOT)
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
    tree = {str(path.relative_to(ROOT)) for path in [*PRODUCT, *ROOT.glob("bench/configs/*.json")]}
    want = {name if name.startswith("qzo/") else f"qzo/{name}" for name in tree}
    assert files == want
    assert "qzo = qzo.__main__:main" in points


def test_the_wheel_works_and_leaves_hugging_faces_kernels_alone(wheel, tmp_path):
    """A regular package `kernels`, last on the path, is the one that others get."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    stub = tmp_path / "stub" / "kernels"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("here = True\n")
    check = (f"sys.path.append({str(stub.parent)!r})\nimport kernels\nassert kernels.here\n"
             "import qzo.kernels.qmm, qzo.bench.sass\nfrom transformers import LlamaForCausalLM\nprint(qzo.__file__)")
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
    assert [line.split()[-1] for line in lines] == ["demo", "loadfile"]
    for line in lines:
        assert line.index("torch==2.13.0") < line.index("install -q .") if "install -q ." in line else "-e" in line
