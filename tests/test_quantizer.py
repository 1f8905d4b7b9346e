"""transformers' own from_pretrained, pipelines and save_pretrained around QZOLinear."""
import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    conversion_mapping,
    pipeline,
)
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers import auto
from transformers.trainer_utils import validate_quantization_for_training

import qzo
from qzo.formats import GATHERED
from qzo.linear import QZOLinear, arena_of, layers
from qzo.quantizer import HELD_ELEMENT_BYTES, QZOQuantizer
from tests.checkpoints import TYPES, scale_randomly, write_gguf
from tests.gptq_checkpoints import write_gptq

FIXTURES = Path(__file__).parent / "fixtures"
FOLDERS = sorted(path.name for path in FIXTURES.iterdir() if (path / "config.json").exists() and json.loads(
    (path / "config.json").read_text()).get("quantization_config", {}).get("quant_method") in GATHERED)
GPTQ = FIXTURES / "gptqmodel-gptq-sym-g128"
IDS = torch.arange(24).view(2, 12)
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 64}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**TINY, tie_word_embeddings=False)),
    "llama-tied": (LlamaForCausalLM, LlamaConfig(**TINY, tie_word_embeddings=True)),
    "qwen2-bias": (Qwen2ForCausalLM, Qwen2Config(**TINY)),
}


def make(name, folder, dtype=torch.bfloat16):
    """A folder of a float model with random weights and biases."""
    cls, config = MODELS[name]
    torch.manual_seed(0)
    model = cls(copy.deepcopy(config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.to(dtype).save_pretrained(folder)
    return folder


def load(path, **options):
    with qzo.loading():
        return AutoModelForCausalLM.from_pretrained(path, **options)


def quantize(path, group_size=32, cls=AutoModelForCausalLM, dtype="auto", **options):
    return cls.from_pretrained(path, dtype=dtype, quantization_config=qzo.QZOConfig(group_size=group_size, **options))


def logits(model):
    with torch.no_grad():
        return model(IDS)[0]


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def tensors_of(folder):
    found = {}
    for file in folder.glob("model*.safetensors"):
        found |= load_file(file)
    return found


def same(got, want):
    """Names, dtypes and bytes."""
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def same_layers(got, want):
    """Every bit of every QZOLinear, the same names."""
    got, want = layers(got, trainable=None), layers(want, trainable=None)
    assert set(got) == set(want)
    for name, layer in want.items():
        assert torch.equal(got[name].codes, layer.codes), name
        assert torch.equal(got[name].read_scales(), layer.read_scales()), name
        assert (got[name].zeros is None) == (layer.zeros is None), name
        assert layer.zeros is None or torch.equal(got[name].zeros, layer.zeros), name


# ------------------------------------------------------------------------------------- float checkpoints

@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"bits": 8}, {"group_size": -1}])
@pytest.mark.parametrize("name", MODELS)
def test_a_float_checkpoint_is_quantized_as_qzo_does(tmp_path, name, options):
    folder = make(name, tmp_path)
    model = quantize(folder, **options)
    want = qzo.from_pretrained(folder, device="cpu", dtype=torch.bfloat16, **{"group_size": 32} | options)
    assert len(layers(model)) == 14
    same_layers(model, want)
    assert torch.equal(logits(model), logits(want))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_the_model_dtype_does_not_touch_the_codes(tmp_path, dtype, stored):
    """1e-6 is no float16 number with more than four bits: weights cast to it first would get other codes."""
    folder = make("llama", tmp_path, stored)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t * 1e-6 if "_proj" in name else t for name, t in tensors.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})
    model = quantize(folder, dtype=dtype)
    assert model.lm_head.weight.dtype == dtype
    same_layers(model, qzo.from_pretrained(folder, device="cpu", dtype=dtype, group_size=32))
    assert model._keep_in_fp32_modules_strict == LlamaForCausalLM(MODELS["llama"][1])._keep_in_fp32_modules_strict


def test_ready_to_train(tmp_path):
    for model in (quantize(make("llama", tmp_path)), load(GPTQ)):
        assert len({id(layer.arena) for layer in layers(model).values()}) == 1
        assert set(arena_of(model, exact=True).slots) == set(layers(model))
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(parameter.is_meta for parameter in model.parameters())
        assert type(model.lm_head) is torch.nn.Linear
        assert not model.training
        validate_quantization_for_training(model)


def test_a_step_moves_scales_only(tmp_path):
    model = load(GPTQ, dtype=torch.float32)
    before, scales = copy.deepcopy(model), qzo.scales(model)
    optimizer = qzo.QZO(model, lr=1e-2, directions=2, seed=3)
    optimizer.step(lambda: qzo.losses(model, {"input_ids": IDS, "labels": IDS}, 4))
    for name, layer in layers(model).items():
        assert torch.equal(layer.codes, layers(before)[name].codes)
        assert not torch.equal(layer.read_scales(), scales[name])
    again = qzo.from_pretrained(GPTQ, device="cpu")
    optimizer = qzo.QZO(again, lr=1e-2, directions=2, seed=3)
    optimizer.step(lambda: qzo.losses(again, {"input_ids": IDS, "labels": IDS}, 4))
    same_layers(model, again)


def test_skipped_layers_stay_dense(tmp_path):
    model = quantize(make("llama", tmp_path), skip=("lm_head", "k_proj", r"model\.layers\.1\.mlp"))
    dense = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert dense == {"lm_head", "model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj",
                     *(f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down"))}


def test_what_a_plan_of_memory_is_told(tmp_path):
    model = quantize(make("llama", tmp_path / "float"))
    quantizer, linear = model.hf_quantizer, torch.nn.Linear(64, 64, device="meta", dtype=torch.bfloat16)
    quantizer.quantization_config = qzo.QZOConfig(group_size=32)
    quantizer.pre_quantized, quantizer._linears = False, {"a": linear}
    assert quantizer.param_element_size(model, "a.weight", linear.weight) == 0.5 + 4 / 32
    assert quantizer.param_element_size(model, "a.bias", linear.bias) == 2
    assert quantizer.param_element_size(model, "b.weight", linear.weight) == 2
    quantizer.pre_quantized = True
    assert quantizer.param_element_size(model, "a.weight", linear.weight) == HELD_ELEMENT_BYTES


def test_tensor_by_tensor(tmp_path):
    """What torch allocates above the result at its highest: less than two layers in float32, of six."""
    config = LlamaConfig(hidden_size=512, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=4,
                         vocab_size=64, max_position_embeddings=64)
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)       # what is float32 lies in the mapped file
    layer = 4 * (3 * 512 * 4096 + 4 * 512 * 512)
    kept = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept.append(quantize(tmp_path, group_size=128))
    events, held = list(record.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events += event.children
        if hasattr(event.extra_fields, "alloc_size"):                    # the allocator's own count: no mapped files
            held.append((event.start_time_ns, event.extra_fields.total_allocated))
    result = arena_of(kept[0]).data.nbytes + sum(module.codes.nbytes for module in layers(kept[0]).values())
    assert max(held)[1] - min(held)[1] >= result, "the model itself has to be among what is recorded"
    assert max(total for _, total in held) - min(held)[1] < result + 2 * layer


# ------------------------------------------------------------------------------------- 4-bit folders

@pytest.mark.parametrize("dtype", ["auto", torch.float32])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_loads_as_qzo_loads_it(name, dtype):
    model = load(FIXTURES / name, dtype=dtype)
    want = qzo.from_pretrained(FIXTURES / name, device="cpu", dtype=model.dtype)
    same_layers(model, want)
    assert torch.equal(logits(model), logits(want))
    assert dict(model.config.quantization_config.to_dict()) == config_of(FIXTURES / name)["quantization_config"]


def test_other_models_of_the_same_files(tmp_path):
    """transformers drops or adds a prefix, a head is left out or new: the layers and what is saved follow."""
    want = qzo.from_pretrained(GPTQ, device="cpu", dtype=torch.float16)
    with qzo.loading():
        base = AutoModel.from_pretrained(GPTQ)
        classifier = AutoModelForSequenceClassification.from_pretrained(GPTQ)
    same_layers(base, want.model)
    same_layers(classifier, want)
    with torch.no_grad():
        assert torch.equal(base(IDS)[0], want.model(IDS)[0])
    scales = scale_randomly(base)
    for save in (qzo.save_pretrained, lambda model, out: model.save_pretrained(out)):
        out = tmp_path / str(save)
        save(base, out)
        with qzo.loading():
            again = AutoModel.from_pretrained(out)
        for layer, new in scales.items():
            assert torch.equal(qzo.scales(again)[layer], new.half().float())
    classifier.save_pretrained(tmp_path / "classifier")
    assert "score.weight" in tensors_of(tmp_path / "classifier")
    same_layers(load(tmp_path / "classifier"), want)


def test_layers_by_name_keep_the_names_of_the_file(tmp_path):
    """`dynamic` is written for model.layers..., a base model has layers...."""
    dynamic = {r"+:model\.layers\.0\.mlp\.up_proj": {"bits": 8}}
    write_gptq(tmp_path / "in", by_layer={"up_proj": (8, 32)}, dynamic=dynamic, head=True)
    with qzo.loading():
        model = AutoModel.from_pretrained(tmp_path / "in")
    assert (model.layers[0].mlp.up_proj.bits, model.layers[0].mlp.gate_proj.bits) == (8, 4)
    scale_randomly(model)
    qzo.save_pretrained(model, tmp_path / "out")                         # the head that the model lacks stays
    got, source = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "in")
    changed = {name for name, tensor in source.items() if not torch.equal(got[name], tensor)}
    assert changed == {f"model.{name}.scales" for name in layers(model)}


def test_a_pipeline():
    with qzo.loading():
        generate = pipeline("text-generation", model=str(GPTQ), device="cpu")
    assert type(generate.model.model.layers[0].mlp.up_proj) is QZOLinear
    [made] = generate("a b", max_new_tokens=4, do_sample=False, return_full_text=False)
    ids = generate.tokenizer("a b", return_tensors="pt")
    want = qzo.from_pretrained(GPTQ, device="cpu", dtype=generate.model.dtype).generate(
        **ids, max_new_tokens=4, do_sample=False)
    new = want[0, ids["input_ids"].shape[1]:]
    assert len(made["generated_text"]) > 4
    assert made["generated_text"] == generate.tokenizer.decode(new, skip_special_tokens=True)


def test_transformers_own_quantizers_are_back():
    configs, quantizers = dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING), dict(auto.AUTO_QUANTIZER_MAPPING)

    @qzo.loading()
    def fail():
        raise FileNotFoundError

    with pytest.raises(FileNotFoundError):
        fail()
    assert configs == auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    with qzo.loading():
        with qzo.loading():
            pass
        assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["awq"] is qzo.QZOConfig
    assert configs == auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    assert quantizers == auto.AUTO_QUANTIZER_MAPPING
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] is not qzo.QZOConfig


def test_a_quantized_folder_keeps_its_own_settings():
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = load(GPTQ, quantization_config=qzo.QZOConfig(bits=8, group_size=32))
    same_layers(model, qzo.from_pretrained(GPTQ, device="cpu"))


# ------------------------------------------------------------------------------------- saving

@pytest.mark.parametrize("with_qzo", [False, True])
@pytest.mark.parametrize("name", FOLDERS)
def test_saving_writes_the_sources_bytes_and_new_scales(tmp_path, name, with_qzo):
    source = FIXTURES / name
    model = qzo.from_pretrained(source, device="cpu") if with_qzo else load(source)
    model.save_pretrained(tmp_path / "same")
    same(tensors_of(tmp_path / "same"), tensors_of(source))
    assert config_of(tmp_path / "same")["quantization_config"] == config_of(source)["quantization_config"]
    scale_randomly(model, keep=0.5)
    model.save_pretrained(tmp_path / "tuned")
    qzo.save_pretrained(model, tmp_path / "by-qzo")
    got = tensors_of(tmp_path / "tuned")
    same(got, tensors_of(tmp_path / "by-qzo"))
    changed = {name for name, tensor in tensors_of(source).items() if not torch.equal(got[name], tensor)}
    assert {name.rpartition(".")[2] for name in changed} <= {"scales", "weight_scale"}
    assert len(changed) == len(layers(model))


@pytest.mark.parametrize("name", MODELS)
def test_a_float_source_is_saved_as_compressed_tensors(tmp_path, name):
    folder = make(name, tmp_path / "float")
    model = quantize(folder, symmetric=name != "qwen2-bias")
    scale_randomly(model)
    model.save_pretrained(tmp_path / "out")
    assert config_of(tmp_path / "out")["quantization_config"]["quant_method"] == "compressed-tensors"
    want = qzo.from_pretrained(folder, device="cpu", group_size=32, symmetric=name != "qwen2-bias")
    scale_randomly(want)
    for save, out in ((qzo.save_pretrained, "by-qzo"), (type(want).save_pretrained, "want")):
        save(want, tmp_path / out)
        same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / out))
        assert config_of(tmp_path / "out")["quantization_config"] == config_of(tmp_path / out)["quantization_config"]
    qzo.save_pretrained(model, tmp_path / "model-by-qzo")
    same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "model-by-qzo"))
    for layer in layers(model).values():
        layer.arena.write(layer.arena_name, layer.read_scales().half().float())
    again = qzo.from_pretrained(tmp_path / "out", device="cpu", dtype=torch.bfloat16)
    same_layers(again, model)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_a_float_source_on_a_table_is_saved_as_bitsandbytes(tmp_path):
    model = qzo.from_pretrained(make("llama", tmp_path / "float"), device="cpu", group_size=32, table="nf4")
    scale_randomly(model)
    model.save_pretrained(tmp_path / "out")
    qzo.save_pretrained(model, tmp_path / "by-qzo")
    same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "by-qzo"))
    assert config_of(tmp_path / "out")["quantization_config"]["quant_method"] == "bitsandbytes"


def test_a_config_in_a_file_of_its_own_is_written_to_config_json(tmp_path):
    """AutoGPTQ's first folders have it in quantize_config.json only, where transformers does not look."""
    write_gptq(tmp_path / "in")
    config = config_of(tmp_path / "in")
    quantization = config.pop("quantization_config")
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    (tmp_path / "in" / "quantize_config.json").write_text(json.dumps(quantization))
    model = qzo.from_pretrained(tmp_path / "in", device="cpu", dtype=torch.float16)
    model.save_pretrained(tmp_path / "out")
    same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "in"))
    assert config_of(tmp_path / "out")["quantization_config"] == quantization
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))
    with pytest.raises(ValueError, match="the checkpoint holds no 4-bit linear layer of this model"):
        quantize(tmp_path / "in")


def test_transformers_reads_what_is_saved(tmp_path):
    pytest.importorskip("compressed_tensors")
    model = quantize(make("llama", tmp_path / "float"), dtype=torch.float32)
    model.save_pretrained(tmp_path / "out")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert not layers(other, trainable=None)
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-4)


def test_shards_and_copies(tmp_path):
    model = copy.deepcopy(load(GPTQ))
    scale_randomly(model)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    model.save_pretrained(tmp_path / "one")
    same(tensors_of(tmp_path / "shards"), tensors_of(tmp_path / "one"))
    again = load(tmp_path / "shards")
    assert torch.equal(logits(again), logits(load(tmp_path / "one")))
    again.save_pretrained(tmp_path / "again")
    same(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "one"))


def test_a_changed_dense_tensor_is_saved_and_tied_ones_once(tmp_path):
    model = qzo.from_pretrained(FIXTURES / "ct-w4a16-sym-g64-bias-tied", device="cpu")
    model.model.norm.weight.data *= 2
    bias = next(name for name in model.state_dict() if name.endswith("proj.bias"))
    model.get_parameter(bias).data += 1
    model.save_pretrained(tmp_path)
    got, source = tensors_of(tmp_path), tensors_of(FIXTURES / "ct-w4a16-sym-g64-bias-tied")
    assert set(got) == set(source)
    for name in ("model.norm.weight", bias):
        assert torch.equal(got.pop(name), model.get_parameter(name))
        del source[name]
    same(got, source)


def test_names_of_a_model_that_qzo_loaded_are_the_files(tmp_path, monkeypatch):
    """transformers would give some architectures' tensors the names of older files."""
    model = qzo.from_pretrained(GPTQ, device="cpu")
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping",
                        lambda *_, **__: [WeightRenaming("old_norm", "model.norm")])
    model.save_pretrained(tmp_path)
    same(tensors_of(tmp_path), tensors_of(GPTQ))


def test_biases_of_zeros_that_the_model_lacks_come_along(tmp_path):
    def add_biases(tensors):
        tensors |= {name.replace("scales", "bias"): torch.zeros(t.shape[1], dtype=torch.float16)
                    for name, t in tensors.items() if name.endswith("scales")}

    write_gptq(tmp_path / "in", change=add_biases)
    qzo.from_pretrained(tmp_path / "in", device="cpu").save_pretrained(tmp_path / "out")
    same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "in"))


def test_formats_that_transformers_does_not_write(tmp_path):
    write_gguf(tmp_path / "m.gguf", TYPES.Q4_0)
    for source in (tmp_path / "m.gguf", FIXTURES / "hqq-own-g64", FIXTURES / "bnb-nf4"):
        with pytest.raises(ValueError, match=r"save_pretrained cannot write; use qzo\.save_pretrained\(model"):
            qzo.from_pretrained(source, device="cpu").save_pretrained(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_source_that_changed(tmp_path):
    shutil.copytree(GPTQ, tmp_path / "in")
    model = load(tmp_path / "in")
    with open(tmp_path / "in" / "model.safetensors", "ab") as file:
        file.write(b" ")
    with pytest.raises(ValueError, match=r"model.safetensors had \d+ bytes when this model was loaded"):
        model.save_pretrained(tmp_path / "out")


# ------------------------------------------------------------------------------------- what is refused

@pytest.mark.parametrize(("options", "error", "message"), [
    ({"bits": 5}, ValueError, "bits=5: codes have 2, 4, 8 bits here"),
    ({"group_size": 96}, ValueError, "group_size=96: use one of 32, 64, 128, or -1 for the whole row"),
    ({"skip": "lm_head"}, TypeError, r"skip='lm_head': a list of names is wanted")])
def test_settings_that_cannot_be(options, error, message):
    with pytest.raises(error, match=message):
        qzo.QZOConfig(**options)


def test_settings_that_the_model_refuses_before_a_weight_is_read(tmp_path, monkeypatch):
    folder = make("llama", tmp_path)
    monkeypatch.setattr("transformers.modeling_utils.safe_open", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=r"layers\.0\.\S+: group_size=128 does not divide in_features=\d+; use 32"):
        quantize(folder, group_size=128)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no nn\.Linear to quantize \(skip=\['proj'\]\)"):
        quantize(folder, skip=("proj",))
    quantizer = QZOQuantizer(qzo.QZOConfig(), pre_quantized=False)
    with pytest.raises(ValueError, match=r"device_map spreads the model over 0, cpu: all that trains must be on"):
        quantizer.validate_environment(device_map={"model": 0, "lm_head": "cpu"})


def test_folders_that_cannot_be_read(tmp_path):
    write_gptq(tmp_path / "marlin", checkpoint_format="marlin")
    write_gptq(tmp_path / "cut", change=lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.scales"))
    write_gptq(tmp_path / "codes", change=lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.qweight"))
    write_gptq(tmp_path / "nan", change=lambda tensors: tensors["model.layers.0.mlp.up_proj.scales"].fill_(torch.nan))
    write_gptq(tmp_path / "unknown", quant_method="qzo")
    write_gptq(tmp_path / "own")
    config = config_of(tmp_path / "own") | {"quantization_config": qzo.QZOConfig().to_dict()}
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    write_gptq(tmp_path / "pickle")
    (tmp_path / "pickle" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pickle" / "pytorch_model.bin")
    write_gptq(tmp_path / "wide")
    config = config_of(tmp_path / "wide")
    (tmp_path / "wide" / "config.json").write_text(json.dumps(config | {"intermediate_size": 999}))
    for name, message in (
            ("marlin", r"config\.json: GPTQ weights in checkpoint_format 'marlin'"),
            ("cut", r"model\.layers\.0\.mlp\.up_proj\.qweight: no model\.layers\.0\.mlp\.up_proj\.scales beside it"),
            ("codes", r"up_proj\.qweight: not beside qzeros and scales: the checkpoint is incomplete"),
            ("nan", r"up_proj\.qweight: scales hold NaN or infinity"),
            ("unknown", r"desc_act, sym: no settings of QZOConfig, which has bits, group_size, symmetric, skip"),
            ("own", r"quant_method 'qzo' is no format of weights"),
            ("pickle", r"pytorch_model\.bin: 4-bit weights are read from safetensors files only"),
            ("wide", r"has shape \[\d+, \d+\], model\.layers\.0\.mlp\.\w+ of this model needs")):
        with pytest.raises(ValueError, match=message) as error:
            load(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.fixture
def mixtral(tmp_path):
    """A folder of a float Mixtral, whose files have a tensor for each expert and other names than the model."""
    torch.manual_seed(0)
    config = MixtralConfig(**TINY | {"intermediate_size": 64}, num_local_experts=2)
    MixtralForCausalLM(config).half().save_pretrained(tmp_path / "mixtral")
    return tmp_path / "mixtral"


def test_experts_in_one_tensor_are_refused_not_left_random(mixtral, tmp_path):
    with pytest.raises(ValueError, match=r"MixtralForCausalLM keeps its experts in one tensor.*qzo\.from_pretrained"):
        quantize(mixtral)
    qzo.save_pretrained(qzo.from_pretrained(mixtral, device="cpu", group_size=32), tmp_path / "out")
    with pytest.raises(ValueError, match=r"experts of MixtralForCausalLM is a MixtralExperts, which has no nn\.Linear"):
        load(tmp_path / "out")


def test_experts_that_qzo_loaded_are_saved_by_the_names_of_the_files(mixtral, tmp_path):
    model = qzo.from_pretrained(mixtral, device="cpu", group_size=32)
    for step in ("float", "compressed"):
        scale_randomly(model)
        qzo.save_pretrained(model, tmp_path / f"{step}-qzo")
        model.save_pretrained(tmp_path / step)
        same(tensors_of(tmp_path / step), tensors_of(tmp_path / f"{step}-qzo"))
        model = qzo.from_pretrained(tmp_path / step, device="cpu")
    assert sum(".experts." in name for name in layers(model)) == 2 * 2 * 3


# ------------------------------------------------------------------------------------- the configuration

def test_the_configuration_as_a_dictionary():
    config = qzo.QZOConfig(bits=8, group_size=64, symmetric=False, skip=["a"])
    again = qzo.QZOConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict() == {"quant_method": "qzo", "bits": 8, "group_size": 64,
                                                   "symmetric": False, "skip": ["a"]}
    source = config_of(GPTQ)["quantization_config"]
    stored, rest = qzo.QZOConfig.from_dict(source, return_unused_kwargs=True, other=1)
    assert rest == {"other": 1}
    assert stored.to_dict() == source
    stored.to_dict()["meta"].clear()
    assert stored.to_dict() == source


def test_registered_when_first_used_and_not_before():
    check = """
import sys, qzo
assert "transformers" not in sys.modules and "QZOConfig" in qzo.__all__
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as configs
assert "qzo" not in configs
assert qzo.QZOConfig is configs["qzo"]
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", check], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
