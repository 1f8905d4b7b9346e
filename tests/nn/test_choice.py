"""Which layers are quantized, and in which groups."""

import warnings

import pytest
import torch
import transformers as t
from torch import nn

import qzo
from qzo import QZOLinear
from qzo.nn import choice
from qzo.nn.choice import HEADS, choose, fitting_group, group_for, quantizable, text_parts
from qzo.nn.layers import layers
from tests.support.close import assert_same_bits
from tests.support.vision_models import MODELS, TEXT, build

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 96}


# ---------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize(
    ("asked", "inputs", "table", "size"),
    [
        (128, 256, None, 128),
        (128, 192, None, 64),
        (128, 96, None, 32),
        (64, 256, None, 64),
        (32, 48, None, 48),
        (128, 4, None, 4),
        (-1, 96, None, 96),
        (48, 48, None, 48),
        (64, 96, (0.0,) * 16, 32),
        (64, 48, (0.0,) * 16, 0),
        (-1, 48, (0.0,) * 16, 48),
    ],
)
def test_the_largest_group_that_fits(asked, inputs, table, size):
    assert fitting_group(asked, inputs, table) == size


class Widths(nn.Module):
    """Layers of these inputs, one after another."""

    def __init__(self, *widths):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(k, n) for k, n in zip(widths, [*widths[1:], 8], strict=True))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_that_the_group_size_does_not_fit_take_others_in_one_warning():
    model = Widths(256, 192, 96, 4, 64)
    with pytest.warns(UserWarning, match="does not divide") as caught:
        qzo.quantize_(model, group_size=128)
    assert [str(w.message) for w in caught] == [
        "group_size=128 does not divide the inputs of 4 of 5 layers: 2 take groups of 64 (the first: layers.1, 192 "
        "inputs), 1 take groups of 32 (the first: layers.2, 96 inputs), 1 take their whole row (the first: layers.3, "
        "4 inputs); strict=True refuses such a model"
    ]
    assert [layer.group_size for layer in layers(model).values()] == [128, 64, 32, 4, 64]


def test_what_no_file_of_a_table_can_hold_stays_dense():
    model = Widths(64, 48, 64)
    with pytest.warns(UserWarning, match=r"1 of 3 layers: 1 stay dense and frozen \(the first: layers.1, 48 inputs\)"):
        qzo.quantize_(model, group_size=64, table="nf4")
    assert sorted(layers(model)) == ["layers.0", "layers.2"]


def test_no_warning_where_the_group_size_fits():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qzo.quantize_(Widths(64, 128, 64), group_size=64)
        qzo.quantize_(Widths(64, 5, 48), group_size=-1)


@pytest.mark.parametrize("widths", [(4, 64), (5, 33), (48, 100)])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_whole_rows_of_any_width_compute_what_they_hold(widths, backend):
    model = Widths(*widths)
    with pytest.warns(UserWarning, match="whole row"):
        qzo.quantize_(model)
    layer, x = layers(model)["layers.0"], torch.randn(4, widths[0])
    assert layer.bias is not None
    with qzo.backend(backend), qzo.evaluating(model, qzo.Evaluations([3, 4], [0.0, 0.0])):
        torch.testing.assert_close(layer(x), x @ layer.dequantize().T + layer.bias, rtol=1e-3, atol=1e-3)


def test_the_group_size_that_fits_all_but_those_that_none_fits():
    assert group_for(Widths(128, 64, 4)) == 64
    assert group_for(Widths(128, 256)) == 128
    assert group_for(Widths(128, 96, 64), 128) == 128
    assert group_for(Widths(4, 5)) == 128


# ---------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize(
    ("cls", "config", "heads"),
    [
        (t.LlamaForSequenceClassification, t.LlamaConfig(**SMALL), ["score"]),
        (t.LlamaForQuestionAnswering, t.LlamaConfig(**SMALL), ["qa_outputs"]),
        (t.BertForSequenceClassification, t.BertConfig(**SMALL), ["classifier"]),
        (t.RobertaForSequenceClassification, t.RobertaConfig(**SMALL), ["classifier.dense", "classifier.out_proj"]),
        (t.BertForMaskedLM, t.BertConfig(**SMALL), ["cls.predictions.decoder"]),
    ],
)
def test_heads_stay_dense(cls, config, heads):
    model = cls(config)
    linears = {name for name, m in model.named_modules() if type(m) is nn.Linear}
    assert sorted(linears - set(quantizable(model))) == heads
    assert sorted(linears - set(choose(model, 32, skip=("pooler",)))) != heads
    everything = qzo.quantize_(model, group_size=32, skip=())
    assert set(layers(everything)) == linears


def test_a_tied_weight_stays_dense():
    model = t.LlamaForCausalLM(t.LlamaConfig(**SMALL))
    weight = "model.layers.0.mlp.up_proj.weight"
    model.all_tied_weights_keys = {weight: "model.layers.0.mlp.gate_proj.weight"}
    left = set(quantizable(model))
    assert left == {f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"} | {"model.layers.0.mlp.down_proj"}


def test_a_weight_that_its_owner_multiplies_by_stays_dense():
    """Mamba's dt_proj is no call: self.dt_proj.weight @ ..."""
    model = t.MambaForCausalLM(t.MambaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=96, time_step_rank=32))
    ids = torch.arange(3, 15)[None]
    want = model(ids).logits
    qzo.quantize_(model, bits=8, group_size=32)
    assert sorted(name.rpartition(".")[2] for name in layers(model)) == ["in_proj", "out_proj", "x_proj"]
    torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=0.03 * float(want.detach().abs().max()))


def test_a_class_without_source_is_taken_as_it_is():
    owner = type("Owner", (nn.Module,), {})
    owner.__module__ = "nowhere"
    assert not choice._is_read(owner, "proj")


# ---------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("name", [name for name in MODELS if name != "Llama4"])
def test_of_a_vision_language_model_the_text_part_is_quantized(name):
    model = build(name, False)
    parts = text_parts(model) or ()
    [part] = {part for part in parts if not any(part.startswith(f"{o}.") for o in parts)}
    assert part in ("model.language_model", "model.text_model")
    got = set(quantizable(model))
    assert got == {n for n, m in model.named_modules() if type(m) is nn.Linear and n.startswith(f"{part}.")}


def test_a_model_with_one_config_is_one_part():
    whisper = t.WhisperForConditionalGeneration(
        t.WhisperConfig(
            d_model=64,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            vocab_size=96,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            num_mel_bins=8,
            max_source_positions=16,
        )
    )
    for model in (whisper, t.LlamaForCausalLM(t.LlamaConfig(**SMALL)), Widths(64, 64)):
        assert text_parts(model) is None
    assert {name.split(".")[1] for name in quantizable(whisper)} == {"encoder", "decoder"}


def test_an_audio_models_tower_and_projector_stay_dense():
    audio = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "num_mel_bins": 8}
    config = t.Qwen2AudioConfig(text_config=TEXT | {"model_type": "qwen2"}, audio_config=audio, audio_token_index=90)
    names = quantizable(t.Qwen2AudioForConditionalGeneration(config))
    assert len(names) == 14
    assert all(name.startswith("model.language_model.layers.") for name in names)


def test_two_text_models_with_configs_of_their_own_are_both_text():
    bert = t.BertConfig(**SMALL)
    config = t.EncoderDecoderConfig.from_encoder_decoder_configs(bert, t.BertConfig(**SMALL))
    names = quantizable(t.EncoderDecoderModel(config))
    assert {name.split(".")[0] for name in names} == {"encoder", "decoder"}


def test_a_tower_is_quantized_by_a_call_of_its_own():
    model = build("Llava", False)
    qzo.quantize_(model, group_size=32)
    tower = qzo.quantize_(model.model.vision_tower, group_size=32)
    assert layers(tower)
    assert set(layers(model)) > {f"model.vision_tower.{name}" for name in layers(tower)}


# ---------------------------------------------------------------------------------------------- Conv1D


def gpt2(**options):
    torch.manual_seed(0)
    return t.GPT2LMHeadModel(t.GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=96, **options)).eval()


def test_a_conv1d_is_quantized_as_the_linear_of_its_transposed_weight():
    model = gpt2()
    old = model.transformer.h[1].mlp.c_fc
    with torch.no_grad():
        nn.init.normal_(old.bias)
    linear = nn.Linear(old.nx, old.nf)
    with torch.no_grad():
        linear.weight.copy_(old.weight.T)
        linear.bias.copy_(old.bias)
    square = model.transformer.h[0].attn.c_proj.weight.T.clone()
    qzo.quantize_(model, group_size=32)
    error = model.transformer.h[0].attn.c_proj.dequantize() - square
    assert float(error.detach().norm()) < 0.15 * float(square.detach().norm())
    layer, want, x = model.transformer.h[1].mlp.c_fc, QZOLinear.from_linear(linear, group_size=32), torch.randn(3, 64)
    assert len(layers(model)) == 8
    assert_same_bits(layer.dequantize(), want.dequantize())
    assert_same_bits(layer(x), want(x))


def test_conv1d_of_another_package_is_not_touched():
    class Conv1D(nn.Module):
        nf = nx = 64

    with pytest.raises(
        ValueError, match=r"has no nn\.Linear to quantize \(skip: none\), nor a Conv1D of transformers: "
    ):
        qzo.quantize_(nn.Sequential(Conv1D()), skip=())


def test_a_skip_said_twice_is_told_once():
    with pytest.raises(ValueError, match=r"\(skip: 'lm_head'\), .* its matrices are in Embedding; leave out of skip"):
        qzo.quantize_(nn.Sequential(nn.Embedding(3, 4)), skip=("lm_head", "lm_head"))
    assert HEADS == ("lm_head", "score", "classifier", "qa_outputs")
