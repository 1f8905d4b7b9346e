import copy
import errno
import json
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

import qzo
from qzo.checkpoints import load as hf
from qzo.checkpoints.formats import files
from tests.support.checkpoints import TYPES, quantized, relative_error, scale_randomly, write_gguf
from tests.support.paths import FIXTURES, ROOT

CT = FIXTURES / "ct-w4a16-sym-g64-bias-tied"
IDS = torch.arange(24).view(2, 12)

TINY = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
# no K of the Llama is a multiple of 128
LLAMA = LlamaConfig(
    **TINY | {"num_attention_heads": 3},
    hidden_size=96,
    intermediate_size=160,
    num_key_value_heads=1,
    tie_word_embeddings=True,
)
QWEN2 = Qwen2Config(**TINY, hidden_size=128, intermediate_size=256, num_key_value_heads=1)
OPT = OPTConfig(**TINY, hidden_size=64, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=64)
BERT = BertConfig(**TINY, hidden_size=64, intermediate_size=128)
MODELS = {
    "llama-tied": (LlamaForCausalLM, LLAMA, 14),
    "qwen2-bias": (Qwen2ForCausalLM, QWEN2, 14),
    "opt-bias": (OPTForCausalLM, OPT, 12),
    "bert": (BertModel, BERT, 13),
}


def load(path, **options):
    given: dict[str, Any] = {"device": "cpu", "group_size": 32} | options
    return qzo.from_pretrained(path, **given)


def forward(model, ids=IDS):
    with torch.no_grad():
        return model(ids)[0]


@pytest.fixture
def llama(tmp_path):
    """A folder with a float Llama, random weights."""
    return make("llama-tied", tmp_path / "float")


def make(name, folder, dtype=torch.float32):
    cls, config, _ = MODELS[name]
    torch.manual_seed(0)
    model = cls(copy.deepcopy(config)).to(dtype)
    for parameter in model.parameters():  # transformers starts biases at zero: one lost would not show
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------- float sources


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_float_model_quantized_saved_and_loaded_again(tmp_path, name, symmetric):
    folder = make(name, tmp_path / "float")
    model = load(folder, symmetric=symmetric)
    assert type(model) is MODELS[name][0]
    assert len(quantized(model)) == MODELS[name][2]
    float_model = MODELS[name][0].from_pretrained(folder).eval()
    expected = copy.deepcopy(float_model)
    for layer_name, layer in quantized(model).items():
        expected.get_submodule(layer_name).weight.data = layer.dequantize()
    assert relative_error(forward(model), forward(expected)) < 2e-5  # float32 sums in another order
    assert relative_error(forward(model), forward(float_model)) < 0.35  # what 4 bits cost random weights
    scale_randomly(model)
    qzo.save_pretrained(model, tmp_path / "out")
    again = load(tmp_path / "out")
    assert type(again) is type(model)
    for layer in quantized(model).values():
        layer.arena.write(layer.arena_name, layer.read_scales().half().float())
    assert torch.equal(forward(again), forward(model))


@pytest.mark.parametrize(("group_size", "strategy", "stored"), [(32, "group", 32), (-1, "channel", None)])
def test_written_config(llama, tmp_path, group_size, strategy, stored):
    qzo.save_pretrained(load(llama, group_size=group_size, symmetric=False), tmp_path / "out")
    written, source = (json.loads((p / "config.json").read_text()) for p in (tmp_path / "out", llama))
    quantization = written.pop("quantization_config")
    assert written == source
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["format"] == "pack-quantized"
    assert quantization["quantization_status"] == "compressed"
    assert quantization["ignore"] == ["lm_head"]
    group = quantization["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    expected = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": strategy, "group_size": stored}
    assert {key: group["weights"][key] for key in expected} == expected


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


def test_dtype_of_the_model(llama):
    model = load(llama, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert forward(model).dtype == torch.bfloat16
    assert qzo.scales(model)["model.layers.0.mlp.up_proj"].dtype == torch.float32


def test_ready_to_train_and_copied_with_its_source(llama, tmp_path):
    for model in (load(llama), load(CT)):
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        assert len({id(layer.arena) for layer in quantized(model).values()}) == 1
        assert model.lm_head.weight is model.model.embed_tokens.weight
        reference = copy.deepcopy(model)
        scale_randomly(reference)
        qzo.save_pretrained(reference, tmp_path / "out")
        name = "model.layers.1.mlp.down_proj"
        assert torch.equal(qzo.scales(load(tmp_path / "out"))[name], qzo.scales(reference)[name].half().float())


def test_layers_never_exist_in_float(monkeypatch):
    fill, buffers = hf.fill, {}
    empty: set[str] = set()

    def record(model, *rest):
        empty.update(name for name, parameter in model.named_parameters() if parameter.is_meta)
        buffers.update({name: buffer.clone() for name, buffer in model.named_buffers()})
        return fill(model, *rest)

    monkeypatch.setattr(hf, "fill", record)
    model = load(CT)
    assert {name + ".weight" for name in quantized(model)} < empty
    assert buffers["model.rotary_emb.inv_freq"][0] == 1  # computed, not merely allocated


def test_generation_settings_come_along(tmp_path):
    shutil.copytree(CT, tmp_path / "ct")
    (tmp_path / "ct" / "generation_config.json").write_text('{"max_new_tokens": 7, "eos_token_id": 9}')
    model = load(tmp_path / "ct")
    assert model.generation_config.max_new_tokens == 7
    assert model.generate(IDS[:, :3], do_sample=False, max_new_tokens=2, pad_token_id=0).shape == (2, 5)


# ------------------------------------------------------------------------------------- export


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


# ------------------------------------------------------------------------------------- the way to disk


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


def test_foreign_files_stay_and_own_ones_are_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "config.json").write_text("old")
    qzo.save_pretrained(load(CT), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "config.json").read_bytes() == (CT / "config.json").read_bytes()
    assert not any(p.name.startswith(".") for p in tmp_path.iterdir())


def test_target_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        qzo.save_pretrained(load(CT), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_source_is_never_overwritten(tmp_path, llama):
    write_gguf(tmp_path / "m.gguf")
    shutil.copytree(CT, tmp_path / "ct")
    for source, out in ((tmp_path / "m.gguf", tmp_path), (tmp_path / "ct", tmp_path / "ct"), (llama, llama)):
        model = load(source)
        with pytest.raises(ValueError, match="the source is never overwritten"):
            qzo.save_pretrained(model, out)


@pytest.mark.parametrize("name", ["m.gguf", "ct/model.safetensors", "ct/config.json"])
def test_source_changed_or_gone(tmp_path, name):
    write_gguf(tmp_path / "m.gguf")
    shutil.copytree(CT, tmp_path / "ct")
    model, file = load(tmp_path / name.split("/")[0]), tmp_path / name
    with open(file, "ab") as handle:
        handle.write(b" ")
    with pytest.raises(ValueError, match=rf"{file.name} had \d+ bytes when this model was loaded"):
        qzo.save_pretrained(model, tmp_path / "out")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{file.name}, which this model was loaded from, is gone"):
        qzo.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_model_of_unknown_origin(tmp_path):
    model = qzo.quantize_(LlamaForCausalLM(copy.deepcopy(LLAMA)), group_size=32)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM was not loaded by qzo\.from_pretrained"):
        qzo.save_pretrained(model, tmp_path / "out")


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", ["./nothing", "/no/such/model", "nothing.gguf", "nothing", "a/b/c"])
def test_no_such_path(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no such file or folder: {name}; give a checkpoint folder, a .gguf"):
        qzo.from_pretrained(name)


def test_folders_without_one_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"neither config\.json with weights nor a \.gguf file"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        load(tmp_path)
    write_gguf(tmp_path / "a.gguf")
    assert len(quantized(load(tmp_path))) == 14
    shutil.copy(tmp_path / "a.gguf", tmp_path / "b.gguf")
    with pytest.raises(ValueError, match=r"holds 2 GGUF files \(a\.gguf, b\.gguf\); give the path of one"):
        load(tmp_path)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"a\.txt is a file but no \.gguf"):
        load(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("content", "message"), [("{", r"config\.json is not JSON"), ('{"model_type": "llamb"}', "llamb")]
)
def test_bad_config(tmp_path, content, message):
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_options_that_do_not_fit(llama):
    with pytest.raises(ValueError, match=r"group_size=128 does not divide in_features=96; use 32, -1"):
        load(llama, group_size=128, strict=True)
    with pytest.raises(ValueError, match="bits=3: codes have 2, 4, 8 bits here"):
        load(llama, bits=3)


def test_model_without_linears(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"^ResNetForImageClassification has no nn\.Linear to quantize \(skip: 'lm_head', 'score', 'classifier', "
        r"'qa_outputs'\), nor a Conv1D of transformers: its matrices are in Conv2d, Linear; leave out of skip what is",
    ):
        load(tmp_path)


# ------------------------------------------------------------------------------------- tokenizers, imports


def test_tokenizer_of_a_folder_and_of_a_gguf_without(tmp_path):
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="b").save_pretrained(tmp_path / "folder")
    shutil.copytree(CT, tmp_path / "folder", dirs_exist_ok=True)
    assert qzo.load_tokenizer(tmp_path / "folder").eos_token_id == 1
    write_gguf(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=r"m\.gguf holds no tokenizer"):
        qzo.load_tokenizer(tmp_path / "m.gguf")


def test_import_is_light():
    check = """
import sys, qzo, torch
heavy = {"transformers", "tokenizers", "gguf", "huggingface_hub"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else "touched a device" if torch.cuda.is_initialized() else 0)
"""
    root = ROOT
    result = subprocess.run([sys.executable, "-c", check], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
