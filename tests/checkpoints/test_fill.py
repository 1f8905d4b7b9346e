"""A model on the meta device is filled by the entries of a file: each in its place, none missing, none left."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qzo.checkpoints.empty import build_empty
from qzo.checkpoints.fill import fill, needless_of
from qzo.nn.linear import QZOLinear
from qzo.nn.quantize import quantize_weight
from qzo.nn.weights import PackedWeight
from tests.support.close import assert_same_bits
from tests.support.float_models import ONE_BLOCK

FOLDER, CPU = Path("a/folder"), torch.device("cpu")
UP = "model.layers.0.mlp.up_proj.weight"


def config(**more):
    return LlamaConfig(**ONE_BLOCK, **more)


@pytest.fixture(scope="module")
def tensors():
    """What a file has for this model: layer 0's up_proj in codes."""
    torch.manual_seed(0)
    found = dict(LlamaForCausalLM(config()).state_dict())
    return found | {UP: quantize_weight(found[UP], 32, symmetric=True, bits=4)}


def filled(tensors, **more):
    """(the model, its Names)."""
    model = build_empty(config(**more), torch.float32)
    return model, fill(model, [(name, value, f"{name} in f") for name, value in tensors.items()], FOLDER, CPU)


def test_every_entry_is_in_its_place(tensors):
    model, names = filled(tensors)
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, QZOLinear)
    assert torch.equal(layer.packed().unpacked(), tensors[UP].unpacked())
    for name, value in tensors.items():
        if isinstance(value, torch.Tensor):
            assert_same_bits(model.get_parameter(name).data, value)
    assert not any(p.requires_grad for name, p in model.named_parameters())
    assert names.changed == {}


def test_an_entry_is_cast_to_the_models_type(tensors):
    model, _ = filled(tensors | {"model.norm.weight": torch.full((32,), 1.5).half()})
    assert_same_bits(model.model.norm.weight.data, torch.full((32,), 1.5))


def test_a_tied_head_is_the_embedding(tensors):
    model, _ = filled(
        {name: value for name, value in tensors.items() if "lm_head" not in name}, tie_word_embeddings=True
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("bias", [True, False])
def test_a_bias_of_a_layer_in_codes_is_filled_by_its_own_entry(tensors, bias):
    """Before the codes or after them; one of zeros for a layer without any is left out."""
    name = UP.replace("weight", "bias")
    value = torch.arange(64.0) if bias else torch.zeros(64)
    biases = {n.replace("weight", "bias"): torch.ones(len(t)) for n, t in plain(tensors).items() if ".mlp." in n}
    more = biases | {name: value} if bias else {name: value}
    for entries in (tensors | more, more | tensors):
        model, _ = filled(entries, mlp_bias=bias)
        found = model.model.layers[0].mlp.up_proj.bias
        assert (found is None) == (not bias)
        if bias:
            assert_same_bits(found.data, value)


def plain(tensors):
    return {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.norm.weight": None},
            r"^a/folder: 1 tensors are missing, the first is model\.norm\.weight; the checkpoint",
        ),
        ({UP: None, "lm_head.weight": None}, r"^a/folder: 2 tensors are missing, the first is lm_head\.weight"),
        (
            {"x.weight": torch.ones(1)},
            r"^x\.weight in f: LlamaForCausalLM has no tensor x\.weight; the file is of another",
        ),
        ({UP.replace("weight", "bias"): torch.ones(64)}, r"has no tensor model\.layers\.0\.mlp\.up_proj\.bias"),
        (
            {"model.norm.weight": torch.ones(4)},
            r"^model\.norm\.weight in f: has shape \[4\], model\.norm\.weight .*\[32\]$",
        ),
        (
            {"model.norm.weight": torch.ones(32).int()},
            r"model\.norm\.weight in f: int32 for model\.norm\.weight, which holds floats: it is quantized in a way",
        ),
        (
            {UP: PackedWeight.from_codes(torch.zeros(64, 64, dtype=torch.uint8), torch.ones(1, 64))},
            r"up_proj\.weight in f: has shape \[64, 64\], model\.layers\.0\.mlp\.up_proj of this model needs",
        ),
        (
            {"model.norm.weight": PackedWeight.from_codes(torch.zeros(1, 32, dtype=torch.uint8), torch.ones(1, 1))},
            r"norm\.weight in f: 4-bit weights for model\.norm, which is a LlamaRMSNorm; only nn\.Linear and tr",
        ),
    ],
)
def test_what_does_not_fit_is_named(tensors, change, message):
    entries = {name: value for name, value in (tensors | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        filled(entries)


def test_an_entry_that_comes_twice_is_of_two_checkpoints(tensors):
    model = build_empty(config(), torch.float32)
    entries = [("model.norm.weight", tensors["model.norm.weight"], f"norm in {file}") for file in "ab"]
    with pytest.raises(
        ValueError, match=r"^norm in b: model\.norm\.weight is there already, from norm in a; the files"
    ):
        fill(model, entries, FOLDER, CPU)


def test_codes_of_a_tied_head_are_refused(tensors):
    head = quantize_weight(torch.randn(16, 32), 32, symmetric=True, bits=4)
    with pytest.raises(
        ValueError, match=r"lm_head is quantized, but the config ties it to model\.embed_tokens\.weight; if"
    ):
        filled(tensors | {"lm_head.weight": head}, tie_word_embeddings=True)


def test_what_a_model_computes_needs_no_place(tensors):
    """Angles of older files, where the model has them as a buffer; anywhere else they are unknown."""
    angles = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    filled(tensors | angles)
    needless = needless_of(build_empty(config(), torch.float32))
    assert needless("model.rotary_emb.inv_freq")
    assert not needless("model.layers.0.self_attn.inv_freq")
    assert not needless("model.embeddings.position_ids")  # BERT's, which a Llama has none of
