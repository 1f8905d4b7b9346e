"""transformers' own from_pretrained and pipelines around QZOLinear."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    pipeline,
)
from transformers.quantizers import auto
from transformers.trainer_utils import validate_quantization_for_training

import qzo
from qzo.checkpoints.quantizer import HELD_ELEMENT_BYTES, QZOQuantizer
from qzo.nn.choice import Chosen
from qzo.nn.layers import arena_of, layers
from qzo.nn.linear import QZOLinear
from tests.support.checkpoints import scale_randomly
from tests.support.front_door import (
    FOLDERS,
    GPTQ,
    IDS,
    MODELS,
    TINY,
    config_of,
    load,
    logits,
    make,
    quantize,
    same,
    same_layers,
    tensors_of,
)
from tests.support.gptq_checkpoints import write_gptq
from tests.support.paths import FIXTURES, ROOT

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
    save_file(
        {name: t * 1e-6 if "_proj" in name else t for name, t in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
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
    assert dense == {
        "lm_head",
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.self_attn.k_proj",
        *(f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")),
    }


def test_what_a_plan_of_memory_is_told(tmp_path):
    model = quantize(make("llama", tmp_path / "float"))
    quantizer, linear = model.hf_quantizer, torch.nn.Linear(64, 64, device="meta", dtype=torch.bfloat16)
    quantizer.quantization_config = qzo.QZOConfig(group_size=32)
    quantizer.pre_quantized, quantizer._chosen = False, {"a": Chosen(linear, 64, 64, 32)}
    assert quantizer.param_element_size(model, "a.weight", linear.weight) == 0.5 + 4 / 32
    assert quantizer.param_element_size(model, "a.bias", linear.bias) == 2
    assert quantizer.param_element_size(model, "b.weight", linear.weight) == 2
    quantizer.pre_quantized = True
    assert quantizer.param_element_size(model, "a.weight", linear.weight) == HELD_ELEMENT_BYTES


def test_tensor_by_tensor(tmp_path):
    """What torch allocates above the result at its highest: less than two layers in float32, of six."""
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=4,
        vocab_size=64,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)  # what is float32 lies in the mapped file
    layer = 4 * (3 * 512 * 4096 + 4 * 512 * 512)
    kept = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept.append(quantize(tmp_path, group_size=128))
    events, held = list(record.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events += event.children
        if hasattr(event.extra_fields, "alloc_size"):  # the allocator's own count: no mapped files
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
    qzo.save_pretrained(model, tmp_path / "out")  # the head that the model lacks stays
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
        **ids, max_new_tokens=4, do_sample=False
    )
    new = want[0, ids["input_ids"].shape[1] :]
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


# ------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": 5}, ValueError, "bits=5: codes have 2, 4, 8 bits here"),
        ({"group_size": 96}, ValueError, "group_size=96: use one of 32, 64, 128, or -1 for the whole row"),
        ({"skip": "lm_head"}, TypeError, r"skip='lm_head': expected a list of names"),
    ],
)
def test_settings_that_cannot_be(options, error, message):
    with pytest.raises(error, match=message):
        qzo.QZOConfig(**options)


def test_settings_that_the_model_refuses_before_a_weight_is_read(tmp_path, monkeypatch):
    folder = make("llama", tmp_path)
    monkeypatch.setattr("transformers.modeling_utils.safe_open", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=r"layers\.0\.\S+: group_size=128 does not divide in_features=\d+; use 32"):
        quantize(folder, group_size=128, strict=True)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no nn\.Linear to quantize \(skip: .*'proj'\)"):
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
        ("wide", r"has shape \[\d+, \d+\], model\.layers\.0\.mlp\.\w+ of this model needs"),
    ):
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
    assert (
        again.to_dict()
        == config.to_dict()
        == {"quant_method": "qzo", "bits": 8, "group_size": 64, "symmetric": False, "skip": ["a"], "strict": False}
    )
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
    root = ROOT
    done = subprocess.run([sys.executable, "-c", check], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
