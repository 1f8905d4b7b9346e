"""Encoder-decoder models: loaded, trained and saved like others; losses are transformers' own."""
import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

import qzo
from tests.close import assert_same_bits

MODELS = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(
        vocab_size=64, d_model=64, d_kv=32, d_ff=128, num_layers=1, num_heads=2, decoder_start_token_id=0)),
    "flan": lambda: T5ForConditionalGeneration(T5Config(
        vocab_size=64, d_model=64, d_kv=32, d_ff=128, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, decoder_start_token_id=0)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(
        vocab_size=64, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=64)),
}
LABELS = torch.tensor([[5, 6, 7, 1, -100], [9, 8, 1, -100, -100]])
BATCH = {"input_ids": torch.arange(2, 14).view(2, 6), "labels": LABELS}


@pytest.fixture(params=MODELS)
def model(request, tmp_path):
    MODELS[request.param]().save_pretrained(tmp_path / "float")
    return qzo.from_pretrained(tmp_path / "float", device="cpu", group_size=32)


def test_losses_are_transformers_own(model):
    want = model(input_ids=BATCH["input_ids"], labels=LABELS).loss
    torch.testing.assert_close(qzo.losses(model, BATCH, 1), want[None], rtol=1e-5, atol=1e-6)


def test_a_pair_has_the_losses_of_single_evaluations(model):
    with qzo.evaluating(model, qzo.Evaluations([3, 3], [0.05, -0.05])):
        both = qzo.losses(model, BATCH, 2)
    alone = []
    for coef in (0.05, -0.05):
        with qzo.evaluating(model, qzo.Evaluations([3], [coef])):
            alone.append(qzo.losses(model, BATCH, 1))
    assert both[0] != both[1]
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-6, atol=0)


def test_it_learns_and_is_saved(model, tmp_path):
    optimizer = qzo.QZO(model, lr=2e-2, directions=4)
    stacked = qzo.pair(BATCH, 8)
    first = float(qzo.losses(model, BATCH, 1))
    for _ in range(12):
        optimizer.step(lambda: qzo.losses(model, stacked, 8))
    assert float(qzo.losses(model, BATCH, 1)) < first
    report = qzo.save_pretrained(model, tmp_path / "out", BATCH)
    again = qzo.from_pretrained(tmp_path / "out", device="cpu")
    assert float(qzo.losses(again, BATCH, 1)) == pytest.approx(report["loss_after"], rel=1e-6)


def test_a_weight_tells_shape_and_dtype_and_nothing_else():
    layer = qzo.QZOLinear(64, 8, group_size=32)
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.device.type) == ((8, 64), torch.float32, "cpu")
    assert isinstance(layer.weight, torch.Tensor)
    assert "no values" in repr(layer.weight)
    assert qzo.QZOLinear(64, 8, group_size=32, dtype=torch.float16).weight.dtype == torch.float16
    for compute in (lambda w: torch.ones(1, 64) @ w.T, lambda w: torch.nn.functional.linear(torch.ones(1, 64), w),
                    lambda w: w * 2, lambda w: w.to(torch.float16), lambda w: w[0], lambda w: w.tolist()):
        with pytest.raises(RuntimeError, match="QZOLinear"):
            compute(layer.weight)
    assert "weight" not in layer.state_dict()
    assert_same_bits(layer.dequantize(), layer.packed().dequantize())


@pytest.mark.parametrize(("change", "message"), [
    ({"option_ids": torch.tensor([[3, 4], [3, 4]]), "label": torch.tensor([0, 1])}, "has an encoder: options"),
    ({"targets": LABELS}, "packed rows are for decoder-only models")])
def test_what_only_decoders_can_is_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        qzo.losses(model, BATCH | change, 1)
