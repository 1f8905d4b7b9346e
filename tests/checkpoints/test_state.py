"""The tensors that transformers' save_pretrained writes: those of the checkpoint that saving here writes."""

import shutil

import pytest
from safetensors.torch import load_file

import qzo
from qzo.checkpoints import state
from tests.support import tiny
from tests.support.checkpoints import scale_randomly, write_gguf
from tests.support.close import assert_same_bits
from tests.support.paths import FIXTURES

CT = FIXTURES / "ct-w4a16-sym-g64-bias-tied"


def test_unchanged_a_source_has_its_own_bytes_and_its_tied_head_one_tensor():
    model, stored = qzo.from_pretrained(CT, device="cpu"), load_file(CT / "model.safetensors")
    found = state.tensors(model)
    assert found.keys() == stored.keys() | {"lm_head.weight"}
    assert found["lm_head.weight"] is found["model.embed_tokens.weight"]  # transformers writes it once
    for name, tensor in stored.items():
        assert_same_bits(found[name], tensor)


def test_scales_and_dense_tensors_that_changed_are_the_models():
    model, stored = qzo.from_pretrained(CT, device="cpu"), load_file(CT / "model.safetensors")
    new = scale_randomly(model)
    model.model.norm.weight.data *= 1.5
    found = state.tensors(model)
    for name, tensor in stored.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight_scale":
            assert_same_bits(found[name], new[layer].T.to(tensor.dtype).contiguous())
        elif name == "model.norm.weight":
            assert_same_bits(found[name], model.model.norm.weight.detach())
        else:
            assert_same_bits(found[name], tensor)


@pytest.mark.parametrize("from_files", [True, False])
def test_a_float_source_or_none_gives_what_save_pretrained_writes(tmp_path, from_files):
    source = tiny.save_checkpoint(tmp_path / "float")
    model = qzo.from_pretrained(source, device="cpu", group_size=32)
    qzo.save_pretrained(model, tmp_path / "out")
    stored = load_file(tmp_path / "out/model.safetensors")
    if not from_files:
        del model._qzo_source
    found = state.tensors(model)
    assert found.keys() == stored.keys()
    for name, tensor in stored.items():
        assert_same_bits(found[name].contiguous(), tensor)


@pytest.mark.parametrize(("name", "method"), [("m.gguf", "gguf"), ("hqq-own-g64", "hqq"), ("bnb-nf4", "bitsandbytes")])
def test_formats_that_transformers_does_not_write(tmp_path, name, method):
    write_gguf(tmp_path / "m.gguf")
    model = qzo.from_pretrained(tmp_path / name if method == "gguf" else FIXTURES / name, device="cpu")
    with pytest.raises(ValueError, match=rf"{name} \({method}\), which transformers' save_pretrained cannot write"):
        model.save_pretrained(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("gone", [True, False])
def test_a_source_that_changed_or_is_gone(tmp_path, gone):
    shutil.copytree(CT, tmp_path / "copy")
    model, file = qzo.from_pretrained(tmp_path / "copy", device="cpu"), tmp_path / "copy/model.safetensors"
    error: type[Exception]
    if gone:
        file.unlink()
        error, message = FileNotFoundError, r"model\.safetensors, which this model was loaded from, is gone"
    else:
        file.write_bytes(file.read_bytes() + b" ")
        error, message = ValueError, r"model\.safetensors had \d+ bytes when this model was loaded"
    with pytest.raises(error, match=message):
        state.tensors(model)
