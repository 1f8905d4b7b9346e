"""Models from a config alone: which configs there are, shapes without values, random weights, a batch for them."""

import json
import types

import pytest
import torch
from torch import nn
from torch.nn import functional

import qzo
from qzo.kernels.table import NF4
from qzo.nn.layers import arena_of, layers
from qzo.nn.weights import PackedWeight
from qzo.reports import models
from qzo.reports.codes import CODES
from qzo.reports.models import Form

SMALL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 48,
    "tie_word_embeddings": True,
}


# ---------------------------------------------------------------------------------------------- configs


def test_an_image_models_config_is_sized_in_pixels():
    config = models.read_config("sd3.5-large")
    assert models.sized(config, None) == config
    assert models.sized(config, 512) == config | {"sample_size": 64}
    with pytest.raises(ValueError, match="--resolution 520: a token is 16 x 16 pixels; give 512"):
        models.sized(config, 520)
    with pytest.raises(ValueError, match="--resolution 512 is of image models, and this config is of llama"):
        models.sized(SMALL, 512)


def test_an_empty_model_like_one_that_is_loaded():
    """Of a diffusion transformer with latents of another size; of another class it is said that none is known."""
    pytest.importorskip("diffusers")
    from tests.support import pipelines

    empty = models.empty_like(pipelines.transformer(), latent=6)
    assert empty.config.sample_size == 6
    weights = [parameter for parameter in empty.parameters() if parameter.dim() > 1]  # diffusers fills norms' at once
    assert weights
    assert all(parameter.is_meta for parameter in weights)
    other = types.SimpleNamespace(config={}, dtype=torch.float32)
    with pytest.raises(ValueError, match="of diffusion transformers SD3Transformer2DModel is known"):
        models.empty_like(other)


def test_a_config_is_found_by_file_by_folder_and_by_part_of_its_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / "llama-2-7b").write_text(json.dumps(SMALL | {"vocab_size": 7}))
    assert models.read_config(tmp_path) == models.read_config(tmp_path / "config.json") == SMALL
    assert models.read_config(tmp_path / "llama-2-7b")["vocab_size"] == 7, "a file that is there goes before a name"
    assert models.read_config("Llama-2-13B")["hidden_size"] == 5120
    assert models.read_config("meta-llama-2-13b.json") == models.read_config("llama-2-13b")
    for name in models.shipped():
        assert {"model_type", "_class_name"} & set(models.read_config(name)), name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "no-such-model",
            "no-such-model is no file, and no config of that name comes with qzo; there are facebook-opt",
        ),
        ("llama", "llama is no file, and more than one config of that name"),
        (".json", "no config of that name"),
        ("{folder}/text.json", "text.json is not JSON: "),
        ("{folder}/bytes.json", "bytes.json is not JSON: "),
        ("{folder}/list.json", "list.json is no config: expected a model_type of transformers, or _class_name SD3Tra"),
        ("{folder}/other.json", "other.json is no config: "),
    ],
)
def test_what_is_no_config_is_said(tmp_path, name, message):
    (tmp_path / "text.json").write_text("model_type: llama")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "list.json").write_text('["model_type"]')
    (tmp_path / "other.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match=message):
        models.read_config(name.format(folder=tmp_path))


def test_a_config_that_cannot_become_a_model_is_said():
    with pytest.raises(ValueError, match="model_type 'no-such' is not known to the installed transformers"):
        models.empty_model({"model_type": "no-such"}, torch.float16)
    with pytest.raises(ValueError, match="the config of model_type 'llama'"):
        models.empty_model(SMALL | {"num_attention_heads": "two"}, torch.float16)


# ---------------------------------------------------------------------------------------------- without values


def small(**changes):
    return models.empty_model(SMALL | changes, torch.float16)


def test_an_empty_model_has_shapes_and_no_weights():
    model = small(quantization_config={"quant_method": "gptq", "bits": 4})
    assert all(parameter.is_meta for parameter in model.parameters() if parameter.dim() > 1)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert not any(buffer.is_meta for buffer in model.buffers()), "what is computed is there: no file holds it"
    assert not model.training
    assert not hasattr(model.config, "quantization_config"), "how others quantize it is not asked for"
    assert models.dimensions(model, 40) == (64, 2, 48, 40)
    assert (models.usual_tokens(model), models.is_diffusion(model)) == (64, False)
    assert models.body_of(model) is model.model


@pytest.mark.parametrize("cpu", [True, False])
def test_layers_take_the_forms_that_they_are_given(cpu):
    model = small()
    wanted = {
        "model.layers.0.mlp.up_proj": Form(32, torch.uint8),
        "model.layers.0.mlp.down_proj": Form(-1, None, 8),
        "model.layers.1.mlp.up_proj": Form(64, None, 4, NF4, ordered=True),
        "model.layers.1.mlp.gate_proj": Form(64, None, 8, books=2),
    }
    assert models.quantize_empty(model, wanted, cpu) is model
    found = layers(model)
    assert set(found) == set(wanted)
    for name, form in wanted.items():
        layer = found[name]
        assert models.form_of(layer) == Form(*{**vars(form), "group_size": layer.group_size}.values())
        assert layer.codes.is_meta
        assert (layer.codes.dtype == torch.uint8) == (cpu and not form.books)
    assert found["model.layers.0.mlp.down_proj"].group_size == 96
    assert len(arena_of(model).slots) == 4, "one arena for all"
    assert isinstance(model.model.layers[0].mlp.gate_proj, nn.Linear)


def test_the_form_of_a_real_weight():
    codes = torch.zeros(4, 64, dtype=torch.uint8)
    scales, zeros = torch.ones(2, 4), torch.full((2, 4), 2.5)
    packed = PackedWeight.from_codes(codes, scales, zeros, 8, torch.arange(64).flip(0))
    assert models.form_of(packed) == Form(32, torch.float32, 8, None, True)
    assert models.form_of(PackedWeight.from_codes(codes, scales, table=NF4)) == Form(32, None, 4, NF4)
    books = torch.zeros(2, 16, 8, dtype=torch.bfloat16)
    vectors = PackedWeight.from_vectors(torch.zeros(4, 8, 2, dtype=torch.uint8), torch.ones(4), books)
    assert models.form_of(vectors) == Form(64, None, 4, None, False, 2, torch.bfloat16)


# ---------------------------------------------------------------------------------------------- random weights


@pytest.mark.parametrize("codes", CODES)
def test_random_weights_keep_the_size_of_what_runs_through(codes):
    model = nn.Sequential(nn.Linear(512, 256, bias=False, device="meta"))
    kind = CODES[codes]
    form = Form(-1 if kind.books else 64, None, kind.bits, kind.table, books=kind.books)
    models.fill_random(models.quantize_empty(model, {"0": form}, cpu=True), "cpu")
    assert float(model(torch.randn(64, 512)).square().mean().sqrt()) == pytest.approx(1, rel=0.1)


def test_a_model_with_random_weights_runs_and_is_the_same_for_a_seed():
    def filled(seed):
        model = small(tie_word_embeddings=True)
        names = [name for name, module in model.named_modules() if name.endswith("_proj")]
        models.quantize_empty(model, dict.fromkeys(names, Form(32, torch.uint8)), cpu=True)
        return models.fill_random(model.float(), "cpu", seed)

    model = filled(0)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.model.norm.weight == 1).all()
    for scales in qzo.scales(model).values():
        assert ((scales / scales.median() - 1).abs() < 0.25).all()
    for layer in layers(model).values():
        assert layer.zeros is not None
        assert (layer.zeros == 8).all()
    batch = models.example_batch(model, 3, 10, 2, "cpu")
    losses = models.batch_losses(model, batch, 2)
    assert losses.shape == (2,)
    assert losses.isfinite().all()
    assert torch.equal(models.batch_losses(filled(0), batch, 2), losses)
    assert not torch.equal(models.batch_losses(filled(1), batch, 2), losses)


def test_parameters_on_meta_are_filled_by_what_they_are():
    norm, filled, there = nn.LayerNorm(8, device="meta"), nn.Linear(8, 600, device="meta"), nn.Linear(8, 2)
    owner = nn.Sequential(norm, filled, there)
    kept = there.weight.clone()
    assert models.fill_parameters(owner, "cpu", torch.Generator().manual_seed(0)) is owner
    assert (norm.weight == 1).all()
    assert not norm.bias.any()
    assert not filled.bias.any()
    assert float(filled.weight.std()) == pytest.approx(0.02, rel=0.1)
    assert torch.equal(there.weight, kept), "what has values keeps them"


# ---------------------------------------------------------------------------------------------- a batch


def test_a_batch_has_its_labels_at_the_end_and_half_a_row_of_padding():
    batch = models.example_batch(small(), 3, 10, 4, "cpu")
    assert {name: tensor.shape for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (3, 10)
    )
    assert (batch["labels"][:, -4:] == batch["input_ids"][:, -4:]).all()
    assert (batch["labels"][:, :-4] == -100).all()
    assert batch["attention_mask"].sum(1).tolist() == [5, 10, 10]
    assert models.example_batch(small(), 1, 10, 4, "cpu")["attention_mask"].all(), "one row has no padding"
    assert int(batch["input_ids"].max()) < 48


@pytest.mark.parametrize("labels", [0, 10, 11])
def test_labels_are_fewer_than_tokens(labels):
    with pytest.raises(
        ValueError, match=rf"{labels} labelled positions .* in rows of 10 tokens .*: between 1 and 9 can be"
    ):
        models.example_batch(small(), 1, 10, labels, "cpu")


def test_an_image_model_is_measured_by_what_it_predicts():
    """A stand-in of the diffusion transformer's class name: diffusers need not be there."""

    class SD3Transformer2DModel(nn.Module):
        config = types.SimpleNamespace(
            in_channels=4,
            sample_size=8,
            patch_size=2,
            joint_attention_dim=6,
            pooled_projection_dim=5,
            num_layers=3,
            num_attention_heads=2,
            attention_head_dim=16,
        )
        dtype = torch.float32

        def forward(self, hidden_states, encoder_hidden_states, pooled_projections, timestep, return_dict):
            return (hidden_states * 2,)

    model = SD3Transformer2DModel()
    assert models.is_diffusion(model)
    assert models.body_of(model) is model
    assert (models.usual_tokens(model), models.dimensions(model, 7)) == (333, (32, 3, 0, 7 + 16))
    batch = models.example_batch(model, 2, 7, 1, "cpu")
    assert batch["encoder_hidden_states"].shape == (2, 7, 6)
    want = functional.mse_loss(batch["hidden_states"] * 2, batch["target"])
    torch.testing.assert_close(models.batch_losses(model, batch, 3), want.expand(3))
