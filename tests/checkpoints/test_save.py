"""Models back to disk: in their own format or another, whole or not at all, never over their source."""

import copy
import errno
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import qzo
from qzo.checkpoints import save
from qzo.checkpoints.formats import files
from qzo.loss.label_bias import biases_of, set_biases_
from tests.support.checkpoints import TYPES, scale_randomly, write_gguf
from tests.support.float_models import LLAMA, make
from tests.support.paths import FIXTURES

CT = FIXTURES / "ct-w4a16-sym-g64-bias-tied"
IDS = torch.arange(24).view(2, 12)


def load(path, device="cpu", group_size=32, **options):
    return qzo.from_pretrained(path, device=device, group_size=group_size, **options)


def forward(model):
    with torch.no_grad():
        return model(IDS)[0]


@pytest.fixture
def llama(tmp_path):
    """A folder with a float Llama, random weights."""
    return make("llama-tied", tmp_path / "float")


def test_dense_tensors_keep_the_sources_dtype_and_files_travel_along(tmp_path):
    folder = make("llama-tied", tmp_path / "float", torch.bfloat16)
    for name in ("tokenizer.json", "LICENSE", "chat_template.jinja"):
        (folder / name).write_text(name)
    qzo.save_pretrained(load(folder), tmp_path / "out")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    dense = [name for name in after if ".weight_" not in name]
    assert {name for name in before if "norm" in name or "embed" in name} == set(dense)
    for name in dense:
        assert torch.equal(after[name], before[name]), name
        assert after[name].dtype == torch.bfloat16
    assert after["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.float16
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in folder.iterdir()}
    assert (tmp_path / "out" / "LICENSE").read_text() == "LICENSE"


def test_export_of_a_gguf(tmp_path):
    write_gguf(tmp_path / "m.gguf", TYPES.Q4_0, tied=False)
    model = load(tmp_path / "m.gguf")
    scale_randomly(model)
    qzo.export(model, tmp_path / "named.gguf", format="gguf")
    qzo.export(model, tmp_path / "ct")
    as_gguf, as_ct = load(tmp_path / "named.gguf"), load(tmp_path / "ct")
    for name, scales in qzo.scales(as_gguf).items():
        assert torch.equal(scales, qzo.scales(as_ct)[name]), name
    assert torch.equal(forward(as_ct), forward(as_gguf))


def test_same_format_export_equals_save(tmp_path):
    model = load(CT)
    scale_randomly(model)
    qzo.export(model, tmp_path / "a", format="compressed-tensors")
    qzo.save_pretrained(model, tmp_path / "b")
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_refused_exports(tmp_path, llama):
    write_gguf(tmp_path / "m.gguf", TYPES.Q4_1)
    gguf_model, float_model = load(tmp_path / "m.gguf"), load(llama)
    for model, form, message in (
        (gguf_model, "compressed-tensors", "has a float minimum"),
        (float_model, "gguf", "loaded from a GGUF file"),
        (
            float_model,
            "exl2",
            "export to 'exl2' is not supported; supported are 'awq', 'bitsandbytes', "
            "'compressed-tensors', 'gptq', 'gguf'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            qzo.export(model, tmp_path / "out", format=form)
    assert not (tmp_path / "out").exists()


def test_failed_write_leaves_everything_as_it_was(tmp_path, monkeypatch):
    out, model = tmp_path / "deep" / "out", load(CT)
    qzo.save_pretrained(model, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    scale_randomly(model)

    def full(path, chunks):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "patch", full)
    for folder in (out, tmp_path / "new" / "out"):
        with pytest.raises(OSError, match="No space left"):
            qzo.save_pretrained(model, folder)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_source_is_never_overwritten(tmp_path, llama):
    write_gguf(tmp_path / "m.gguf")
    shutil.copytree(CT, tmp_path / "ct")
    for source, out in ((tmp_path / "m.gguf", tmp_path), (tmp_path / "ct", tmp_path / "ct"), (llama, llama)):
        model = load(source)
        with pytest.raises(ValueError, match="the source is never overwritten"):
            qzo.save_pretrained(model, out)


def test_model_of_unknown_origin(tmp_path):
    model = qzo.quantize_(LlamaForCausalLM(copy.deepcopy(LLAMA)), group_size=32)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM was not loaded by qzo\.from_pretrained"):
        qzo.save_pretrained(model, tmp_path / "out")


def test_formats_that_there_are_to_export_to():
    for form in ("awq", "bitsandbytes", "compressed-tensors", "gptq", "gguf"):
        save.check_format(form)
    with pytest.raises(
        ValueError, match="export to 'float' is not supported; supported are 'awq', 'bitsandbytes', 'comp"
    ):
        save.check_format("float")


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_label_biases_are_saved_and_loaded(tmp_path, kind):
    """In generation_config.json, which a GGUF file has beside it: nothing but biases is taken from there then."""
    source = CT
    if kind == "gguf":
        source = write_gguf(tmp_path / "m.gguf", TYPES.Q4_0, tied=False) or tmp_path / "m.gguf"
    model = load(source)
    qzo.save_pretrained(model, tmp_path / "without")
    set_biases_(model, [(7, 0.5), (9, -0.5)])
    qzo.save_pretrained(model, tmp_path / "with")
    saved = tmp_path / "with" / ("m.gguf" if kind == "gguf" else "")
    again = load(saved)
    assert biases_of(again) == {7: 0.5, 9: -0.5}
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id
    for path in sorted(tmp_path.glob("without/*")):
        changed = path.name == "generation_config.json"
        assert changed or path.read_bytes() == (tmp_path / "with" / path.name).read_bytes()
    qzo.save_pretrained(again, tmp_path / "again")
    copied = [tmp_path / name / "generation_config.json" for name in ("with", "again")]
    assert copied[0].read_bytes() == copied[1].read_bytes()
