"""`qzo.export` and `qzo export`: the same weights in another format, or a reason why not."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import qzo
from qzo.checkpoints.formats import awq, gptq
from tests.support.checkpoints import TYPES, decode_compressed, quantized, scale_randomly, write_compressed, write_gguf
from tests.support.close import assert_same_bits
from tests.support.gptq_checkpoints import awq_layer, decode_folder, write_awq, write_gptq
from tests.support.paths import FIXTURES

SYM, V2, DESC, THREE = (
    FIXTURES / f"gptqmodel-gptq-{name}" for name in ("sym-g128", "asym-g32-v2", "sym-g64-desc", "3bit-sym-g64")
)
AUTO_ROUND, AWQ = FIXTURES / "autoround-ar-sym-g128", FIXTURES / "autoround-awq-zp-g128"
TIED, ROWS = FIXTURES / "ct-w4a16-sym-g64-bias-tied", FIXTURES / "ct-w4a16-sym-g128-gptq"
LAYER = "model.layers.0.mlp.up_proj"
IDS = torch.arange(24).view(2, 12)


def load(path, **options):
    return qzo.from_pretrained(path, device="cpu", **options)


def forward(model):
    with torch.no_grad():
        return model(IDS).logits


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def decode(folder, form):
    if form == "compressed-tensors":
        return decode_compressed(folder / "model.safetensors")
    return decode_folder(folder)


# ------------------------------------------------------------------------------------- the same weights


@pytest.mark.parametrize(
    ("source", "form"),
    [
        (SYM, "awq"),
        (SYM, "compressed-tensors"),
        (V2, "awq"),
        (V2, "compressed-tensors"),
        (THREE, "awq"),
        (THREE, "compressed-tensors"),
        (AUTO_ROUND, "gptq"),
        (AUTO_ROUND, "awq"),
        (AWQ, "gptq"),
        (AWQ, "compressed-tensors"),
        (TIED, "gptq"),
        (ROWS, "awq"),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_folders(source, form, tmp_path):
    """Weights, dense tensors and logits are the source's, bit for bit, and another decoder says so too."""
    model, out = load(source), tmp_path / "out"
    qzo.export(model, out, form)
    exported, decoded = load(out), decode(out, form)
    assert set(quantized(exported)) == set(quantized(model)) == set(decoded)
    for name, layer in quantized(exported).items():
        want = quantized(model)[name].dequantize()
        assert_same_bits(layer.dequantize(), want)
        assert torch.equal(decoded[name], want), name
    assert_same_bits(forward(exported), forward(model))
    old, new = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    dense = [name for name in old if name.endswith((".bias", "norm.weight", "embed_tokens.weight", "lm_head.weight"))]
    assert len(dense) >= 4
    for name in dense:
        assert_same_bits(new[name], old[name])
    assert {name: value for name, value in config_of(out).items() if name != "quantization_config"} == {
        name: value for name, value in config_of(source).items() if name != "quantization_config"
    }
    assert not (out / "quantization_config.json").exists()


def test_tokenizers_come_along_and_the_sources_own_configs_do_not(tmp_path):
    qzo.export(load(SYM), tmp_path / "out", "awq")
    kept = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "expected.safetensors"} & {
        path.name for path in SYM.iterdir()
    } - {"expected.safetensors"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == kept | {"config.json", "model.safetensors"}
    for name in kept:
        assert (tmp_path / "out" / name).read_bytes() == (SYM / name).read_bytes()


@pytest.mark.parametrize("form", ["gptq", "awq", "compressed-tensors"])
def test_a_gguf(form, tmp_path):
    """Q4_0, whose scales have both signs; dense tensors that float16 does not hold stay float32."""
    write_gguf(tmp_path / "m.gguf", TYPES.Q4_0, tied=False)
    model = load(tmp_path / "m.gguf")
    qzo.export(model, tmp_path / "out", form)
    exported = load(tmp_path / "out")
    for name, layer in quantized(exported).items():
        assert_same_bits(layer.dequantize(), quantized(model)[name].dequantize())
    assert_same_bits(forward(exported), forward(model))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.float16
    assert tensors["lm_head.weight"].dtype == tensors["model.norm.weight"].dtype == torch.float32


@pytest.mark.parametrize("form", ["gptq", "awq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_float_model(form, symmetric, tmp_path):
    save_llama(tmp_path / "float")
    model = load(tmp_path / "float", group_size=32, symmetric=symmetric)
    qzo.export(model, tmp_path / "out", form)
    exported = load(tmp_path / "out")
    for name, layer in quantized(exported).items():
        assert_same_bits(layer.dequantize(), quantized(model)[name].dequantize())
    assert_same_bits(forward(exported), forward(model))


def save_llama(folder, **config):
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            **{
                "hidden_size": 96,
                "intermediate_size": 160,
                "num_hidden_layers": 1,
                "num_attention_heads": 3,
                "num_key_value_heads": 1,
                "vocab_size": 64,
                "tie_word_embeddings": False,
                **config,
            }
        )
    ).save_pretrained(folder)


def test_tuned_scales_are_rounded_as_save_pretrained_rounds_them(tmp_path):
    model = load(AWQ)
    scale_randomly(model)
    qzo.save_pretrained(model, tmp_path / "own")
    for form in ("gptq", "awq", "compressed-tensors"):
        qzo.export(model, tmp_path / form, form)
        for name, scales in qzo.scales(load(tmp_path / form)).items():
            assert_same_bits(scales, qzo.scales(load(tmp_path / "own"))[name])
    assert (tmp_path / "awq" / "model.safetensors").read_bytes() == (
        tmp_path / "own" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_keep_the_sources_dtype(dtype, tmp_path):
    """1e-7 is no float16, but a bfloat16 and a float32."""

    def change(tensors):
        for name in [n for n in tensors if n.endswith(".scales")]:
            tensors[name] = (tensors[name].float() * 1e-7).to(dtype)

    model = load(write_gptq(tmp_path / "in", change=change))
    for form in ("awq", "compressed-tensors"):
        qzo.export(model, tmp_path / form, form)
        for name, layer in quantized(load(tmp_path / form)).items():
            assert_same_bits(layer.dequantize(), quantized(model)[name].dequantize())


# ------------------------------------------------------------------------------------- a GPTQ folder of our own


def test_a_symmetric_gptq_folder(tmp_path):
    qzo.export(load(AUTO_ROUND), tmp_path / "out", "gptq")
    config = config_of(tmp_path / "out")["quantization_config"]
    assert config == {
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": ["qzo"]},
    }
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == config
    old, new = (load_file(folder / "model.safetensors") for folder in (AUTO_ROUND, tmp_path / "out"))
    for part in ("qweight", "qzeros", "scales"):
        assert_same_bits(new[f"{LAYER}.{part}"], old[f"{LAYER}.{part}"])
    assert torch.equal(new[f"{LAYER}.qzeros"], torch.full_like(new[f"{LAYER}.qzeros"], 0x77777777))
    assert torch.equal(new[f"{LAYER}.g_idx"], torch.arange(256).int() // 128)


@pytest.mark.parametrize("zero", [0, 1, 15])
def test_an_asymmetric_gptq_folder(zero, tmp_path):
    """In version 1 a zero point of 0 means one thing to GPTQModel and another to everyone else: version 2."""

    def plain(codes, zeros, scales, bits):
        return awq_layer(codes, torch.full_like(zeros, zero), scales, bits)

    source = write_awq(tmp_path / "in", layer=plain)
    qzo.export(load(source), tmp_path / "out", "gptq")
    config = config_of(tmp_path / "out")["quantization_config"]
    assert (config["checkpoint_format"], config["sym"]) == ("gptq_v2", False)
    words = load_file(tmp_path / "out" / "model.safetensors")[f"{LAYER}.qzeros"]
    assert set(words.flatten().tolist()) == {{0: 0, 1: 0x11111111, 15: -1}[zero]}
    want = decode_folder(source)
    for name, layer in quantized(load(tmp_path / "out")).items():
        assert torch.equal(layer.dequantize(), want[name]), name


def mixed(folder):
    """compressed-tensors with 8 bits in up_proj and whole rows in down_proj."""
    groups = {}
    schemes = {"": (4, 32, False), "up_proj": (8, 32, False), "down_proj": (4, None, False)}
    for i, (leaf, (bits, size, symmetric)) in enumerate(schemes.items()):
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": symmetric,
            "strategy": "group" if size else "channel",
            "group_size": size,
        }
        groups[f"group_{i}"] = {"targets": [f"re:.*{leaf}"] if leaf else ["Linear"], "weights": weights}
    write_compressed(folder, schemes, groups)
    return folder


def test_bits_and_group_sizes_of_single_layers(tmp_path):
    model = load(mixed(tmp_path / "in"))
    qzo.export(model, tmp_path / "out", "gptq")
    config = config_of(tmp_path / "out")["quantization_config"]
    assert (config["bits"], config["group_size"]) == (4, 32)
    assert config["dynamic"] == {
        rf"+:^model\.layers\.{i}\.mlp\.{leaf}_proj$": kind
        for i in range(2)
        for leaf, kind in (("down", {"bits": 4, "group_size": -1}), ("up", {"bits": 8, "group_size": 32}))
    }
    decoded = decode_folder(tmp_path / "out")
    for name, layer in quantized(load(tmp_path / "out")).items():
        want = quantized(model)[name].dequantize()
        assert torch.equal(layer.dequantize(), want), name
        assert torch.equal(decoded[name], want), name


def test_act_order_stays_in_gptq(tmp_path):
    """From old compressed-tensors files, which had it too."""
    groups = {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
        }
    }
    write_compressed(tmp_path / "in", {"": (4, 32, True)}, groups, order=("up_proj",))
    model = load(tmp_path / "in")
    assert quantized(model)[LAYER].perm is not None
    qzo.export(model, tmp_path / "out", "gptq")
    assert config_of(tmp_path / "out")["quantization_config"]["desc_act"] is True
    g_idx, old = (
        load_file(tmp_path / folder / "model.safetensors")[f"{LAYER}.{part}"]
        for folder, part in (("out", "g_idx"), ("in", "weight_g_idx"))
    )
    assert torch.equal(g_idx, old)
    decoded = decode_folder(tmp_path / "out")
    for name, layer in quantized(load(tmp_path / "out")).items():
        want = quantized(model)[name].dequantize()
        assert_same_bits(layer.dequantize(), want)
        assert torch.equal(decoded[name], want), name


def test_a_linear_that_is_not_quantized_is_named(tmp_path):
    """A reader that goes by the config and not by the tensors has to know."""

    def dense(tensors):
        for part in ("qweight", "qzeros", "scales"):
            tensors.pop(f"{LAYER}.{part}")
        tensors[f"{LAYER}.weight"] = torch.randn(160, 96).half()

    model = load(write_awq(tmp_path / "in", change=dense))
    qzo.export(model, tmp_path / "gptq", "gptq")
    assert config_of(tmp_path / "gptq")["quantization_config"]["dynamic"] == {r"-:^model\.layers\.0\.mlp\.up_proj$": {}}
    qzo.export(model, tmp_path / "ct", "compressed-tensors")
    assert config_of(tmp_path / "ct")["quantization_config"]["ignore"] == [LAYER, "lm_head"]
    for form in ("gptq", "ct"):
        assert_same_bits(forward(load(tmp_path / form)), forward(model))


def test_a_quantized_head(tmp_path):
    model = load(write_awq(tmp_path / "in", head=True))
    qzo.export(model, tmp_path / "out", "gptq")
    assert config_of(tmp_path / "out")["quantization_config"]["lm_head"] is True
    assert_same_bits(forward(load(tmp_path / "out")), forward(model))
    with pytest.raises(ValueError, match="lm_head is quantized, and awq keeps it dense; save it as gptq or compress"):
        qzo.export(load(write_gptq(tmp_path / "gptq", head=True)), tmp_path / "awq", "awq")


def test_biases_of_zeros_that_the_model_lacks_stay_behind(tmp_path):
    def biases(tensors):
        tensors |= {
            f"{n.removesuffix('.scales')}.bias": torch.zeros(t.shape[1]).half()
            for n, t in list(tensors.items())
            if n.endswith(".scales")
        }

    model = load(write_gptq(tmp_path / "in", change=biases))
    qzo.export(model, tmp_path / "out", "awq")
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if name.endswith(".bias")]
    assert_same_bits(forward(load(tmp_path / "out")), forward(model))


# ------------------------------------------------------------------------------------- refused


def refused(model, out, form, message):
    with pytest.raises(ValueError, match=message) as caught:
        qzo.export(model, out, form)
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_what_a_format_cannot_hold(tmp_path):
    out = tmp_path / "out"
    write_gguf(tmp_path / "m.gguf", TYPES.Q4_1)
    for form in ("gptq", "awq", "compressed-tensors"):
        refused(load(tmp_path / "m.gguf"), out, form, r"_proj has a float minimum \(GGUF Q4_1\) or float zero points")
        if form != "gptq":
            refused(load(DESC), out, form, rf"_proj has its columns sorted by group \(act-order\), which {form} does")
    refused(load(mixed(tmp_path / "mixed")), out, "awq", "up_proj has 8 bits, and awq holds 4; save it as gptq or comp")
    sizes = write_gptq(tmp_path / "sizes", by_layer={"up_proj": (4, -1)}, dynamic={".*up_proj": {"group_size": -1}})
    refused(load(sizes), out, "awq", r"the layers have group sizes \[-1, 32\] \(-1: the whole row\), and awq holds one")
    refused(load(SYM), out, "gguf", "needs a model that was loaded from a GGUF file, .*this one is gptq; use 'awq', 'b")
    refused(load(SYM), out, "exl2", "export to 'exl2' is not supported; supported are 'awq', 'bitsandbytes', 'comp")
    refused(torch.nn.Linear(2, 2), out, "gptq", r"was not loaded by qzo\.from_pretrained")


@pytest.mark.parametrize(
    ("form", "size", "message"),
    [
        (
            "gptq",
            100,
            "down_proj has in_features=100, and gptq packs 8 codes of 4 bits into a word; save it as compressed",
        ),
        ("awq", 100, "gate_proj has out_features=100, and awq packs 8 codes of 4 bits into a word"),
        ("compressed-tensors", 100, None),
    ],
)
def test_odd_sizes(form, size, message, tmp_path):
    save_llama(tmp_path / "float", intermediate_size=size)
    model = load(tmp_path / "float", group_size=-1)
    if message is not None:
        refused(model, tmp_path / "out", form, message)
        return
    qzo.export(model, tmp_path / "out", form)
    assert_same_bits(forward(load(tmp_path / "out")), forward(model))


def test_odd_inputs(tmp_path):
    """AWQ packs along the outputs, so that inputs may be of any number; GPTQ packs along both."""
    packed = {"a": qzo.QZOLinear(100, 64, group_size=-1).packed()}
    assert awq.quantization_config(packed, [])["group_size"] == -1
    with pytest.raises(ValueError, match="a has in_features=100, and gptq packs 8 codes of 4 bits into a word"):
        gptq.quantization_config(packed, [])
    for bits, size, fits in ((2, 16, True), (2, 24, False), (8, 4, True), (8, 6, False)):
        packed = {"a": qzo.QZOLinear(32, size, group_size=-1, bits=bits).packed()}
        if fits:
            assert gptq.quantization_config(packed, [])["bits"] == bits
        else:
            with pytest.raises(ValueError, match=f"a has out_features={size}, and gptq packs {32 // bits} codes"):
                gptq.quantization_config(packed, [])
