"""Every format has what protocol.py says, with the signatures that it says, and nobody asks a format for its name."""

import dataclasses
import importlib
import inspect
import re
import types

import pytest
import torch

from qzo.checkpoints.formats import COPIED, FOLDERS, FORMATS, GATHERED, TARGETS, folder, gptq, protocol, told
from qzo.checkpoints.source import Source, open_checkpoint
from qzo.nn.weights import PackedWeight
from tests.support import tiny
from tests.support.checkpoints import write_gguf
from tests.support.paths import FIXTURES, ROOT

GATHERING = {"auto-round", "awq", "compressed-tensors", "gptq"}
HERE = ROOT / "qzo/checkpoints/formats"


def members(wanted):
    """name -> function or property of a Protocol and of those that it is built on."""
    of = [vars(cls) for cls in reversed(wanted.__mro__) if getattr(cls, "_is_protocol", False)]
    return {
        name: value
        for names in of
        for name, value in names.items()
        if not name.startswith("_") and isinstance(value, types.FunctionType | property)
    }


def lacks(form, wanted):
    """What an object lacks of a Protocol: members, and parameters of those that are called."""
    for name, value in members(wanted).items():
        if not hasattr(form, name):
            yield f"no {name}"
        elif isinstance(value, types.FunctionType):
            given = list(inspect.signature(value).parameters.values())[1:]  # without self
            assert all(p.kind is p.POSITIONAL_ONLY for p in given), f"{name}: its names are not those of all formats"
            try:
                inspect.signature(getattr(form, name)).bind(*given)
            except TypeError as error:
                yield f"{name}: {error}"


@pytest.mark.parametrize("method", FORMATS)
def test_a_format_has_all_that_its_protocols_say(method):
    form = FORMATS[method]
    assert form.method == method
    for wanted, listed in ((protocol.Format, FORMATS), (protocol.Copied, COPIED), (protocol.Gathered, GATHERED)):
        assert not (listed.get(method) and list(lacks(form, wanted)))
    assert form.quantized == (method in COPIED)
    assert not any(hasattr(form, name) for name in ("parts", "packer") if method not in GATHERED)
    assert all(isinstance(part, str) for part in getattr(form, "parts", ()))


def test_members_are_those_of_the_documents():
    attributes = {"method", "quantized", "scales"}
    assert set(members(protocol.Format)) == attributes | {"open", "for_servers", "take_along", "new_config"}
    assert set(members(protocol.Copied)) - set(members(protocol.Format)) == {"save", "saved_scales"}
    assert set(members(protocol.Gathered)) - set(members(protocol.Copied)) == {"parts", "packer", "changed_scales"}


@dataclasses.dataclass
class Planted:
    """A format with a fault."""

    method: str = "planted"
    quantized: bool = True
    scales: None = None

    def open(self, path, quantization, trust_remote_code): ...

    def for_servers(self, name): ...

    def take_along(self, path): ...  # one parameter too few

    def save(self, path, target, find, more): ...  # one that nobody gives


def test_planted_faults_are_seen():
    assert list(lacks(Planted(), protocol.Format)) == ["take_along: too many positional arguments", "no new_config"]
    [_, _, save, saved_scales] = lacks(Planted(), protocol.Copied)
    assert (save, saved_scales) == ("save: missing a required argument: 'more'", "no saved_scales")


def test_who_can_what():
    assert set(COPIED) == set(FORMATS) - {"float"}
    assert set(GATHERED) == GATHERING
    assert set(FOLDERS) == set(COPIED) - {"gguf"}
    assert set(TARGETS) == {"awq", "bitsandbytes", "compressed-tensors", "gptq"}
    assert all(target.method == method for method, target in TARGETS.items())
    assert {gptq.CONFIG, told.AWQ_CONFIG} <= set(folder.CONFIGS)


def test_every_module_with_a_format_is_listed():
    found = {}
    for path in HERE.glob("*.py"):
        module = importlib.import_module(f"qzo.checkpoints.formats.{path.stem}")
        if hasattr(module, "FORMAT"):
            found[module.METHOD] = module.FORMAT
        if hasattr(module, "TARGET"):
            assert TARGETS[module.METHOD] is module.TARGET
    assert found == FORMATS


# ---------------------------------------------------------------------------------------------- one way to open


@pytest.mark.parametrize("method", FORMATS)
def test_a_checkpoint_of_each_format_is_opened(method, tmp_path):
    places = {
        "aqlm": FIXTURES / "aqlm-2x8-g8",
        "auto-round": FIXTURES / "autoround-ar-sym-g128",
        "awq": FIXTURES / "autoround-awq-zp-g128",  # it exports AWQ's own, too
        "bitsandbytes": FIXTURES / "bnb-nf4",
        "compressed-tensors": FIXTURES / "ct-w4a16-sym-g64-bias-tied",
        "gptq": FIXTURES / "gptqmodel-gptq-sym-g128",
        "hqq": FIXTURES / "hqq-own-g64",
    }
    if method == "gguf":
        write_gguf(tmp_path / "m.gguf")
        places[method] = tmp_path / "m.gguf"
    elif method == "float":
        places[method] = tiny.save_checkpoint(tmp_path / "float")
    found = open_checkpoint(places[method])
    assert found.format is FORMATS[method]
    assert found.quantized == any(isinstance(value, PackedWeight) for _, value, _ in found.read(None))
    for name, value, where in found.read(torch.float16):
        assert name
        assert where
        assert isinstance(value, PackedWeight) or value.dtype == torch.float16
    assert all(file.stat().st_size == size for file, size in found.files)
    assert not hasattr(found.config, "quantization_config")
    source = Source.of(found)
    assert source.format is found.format
    assert source.copied is COPIED.get(method)
    source.check()


# ---------------------------------------------------------------------------------------------- what formats are for

ASKED = r"""\.(kind|method)\s*(==|!=|(not )?in\b)\s*["'({\[]|\.(kind|method)\s*(==|!=)\s*\w+\.METHOD|_qzo_source"""


def questions(text):
    """Lines of code that ask a source or a format for its name, or reach for the model's attribute."""
    return [line.strip() for line in text.splitlines() if re.search(ASKED, line)]


def test_nobody_asks_a_format_for_its_name():
    found = {
        str(path.relative_to(ROOT)): questions(path.read_text())
        for path in [*ROOT.glob("qzo/checkpoints/**/*.py"), *ROOT.glob("qzo/reports/*.py")]
    }
    [line] = found.pop("qzo/checkpoints/source.py")
    assert line.startswith("_ATTRIBUTE = ")
    assert not [lines for lines in found.values() if lines]


@pytest.mark.parametrize(
    "line",
    [
        'if source.kind == "float":',
        'if source.kind != "gguf":',
        'home = a if source.method in ("gguf", "float") else b',
        "if checkpoint.format.method == floats.METHOD:",
        "source = model._qzo_source",
    ],
)
def test_a_planted_question_is_seen(line):
    assert questions(f"x = 1\n{line}\n") == [line]
