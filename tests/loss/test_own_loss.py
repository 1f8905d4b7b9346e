"""What a model's loss is compared with before it is trained, and what is done where it differs."""

import warnings

import pytest
import torch
import transformers
from torch.nn import functional

import qzo
from qzo.loss import head, own_loss
from qzo.loss.losses import Stacked
from qzo.nn.layers import arena_of, layers
from qzo.training.data import Example
from qzo.training.task import Task
from tests.support.float_models import TWO_BLOCKS

IDS = torch.arange(3, 15)[None].repeat(2, 1)
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}


class Neighbours(transformers.LlamaForCausalLM):
    """Logits that add up those of the tokens before."""

    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, **kwargs)
        output["logits"] = output.logits.cumsum(1) / 4
        if labels is not None:
            output["loss"] = self.loss_function(output.logits, labels, vocab_size=self.config.vocab_size)
        return output


class HeadNotCalled(transformers.LlamaForCausalLM):
    """Its head's weight is used, and its head not called."""

    def forward(self, labels=None, use_cache=None, **inputs):
        states = self.model(**inputs, use_cache=False).last_hidden_state
        logits = functional.linear(states, self.lm_head.weight)
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


class Smoothed(transformers.LlamaForCausalLM):
    """A loss of its own."""

    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, **kwargs)
        if labels is not None:
            output["loss"] = functional.cross_entropy(
                output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1
            )
        return output


def make(cls=transformers.LlamaForCausalLM, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return cls(transformers.LlamaConfig(**TWO_BLOCKS | changes)).to(dtype).eval()


def own(model):
    with torch.no_grad():
        return model(**BATCH).loss.float()


@pytest.mark.parametrize("cls", [Neighbours, HeadNotCalled])
def test_the_slower_way_is_taken_with_one_warning(cls):
    model = make(cls)
    with pytest.warns(UserWarning, match="the logits of all tokens are computed") as seen:
        both = [qzo.losses(model, BATCH, 2), qzo.losses(model, BATCH, 1)]
    assert len(seen) == 1
    assert torch.allclose(torch.cat(both), own(model).expand(3), rtol=1e-5)


def test_a_model_with_another_objective_is_refused():
    with pytest.raises(
        ValueError,
        match=r"Smoothed: its own loss of a batch is .*, the next-token cross entropy of "
        r"its own logits .*: it has another objective .* give QZO.step a closure of its own loss",
    ):
        qzo.losses(make(Smoothed), BATCH, 1)


def test_a_model_that_reads_in_both_directions_is_refused():
    """Its own loss is the cross entropy of its own logits, and both are of tokens that it has read."""
    torch.manual_seed(0)
    sizes = {key: TWO_BLOCKS[key] for key in TWO_BLOCKS if key != "num_key_value_heads"}
    model = transformers.BertLMHeadModel(transformers.BertConfig(**sizes, max_position_embeddings=32)).eval()
    with pytest.raises(ValueError, match=r"BertLMHeadModel reads text in both directions: .* \(is_decoder in its"):
        qzo.losses(model, BATCH, 1)
    model = transformers.BertLMHeadModel(transformers.BertConfig(**sizes, max_position_embeddings=32, is_decoder=True))
    assert torch.allclose(qzo.losses(model.eval(), BATCH, 1), own(model), rtol=1e-5)


def test_a_task_refuses_before_anything_runs():
    with pytest.raises(ValueError, match="it has another objective"):
        Task(make(Smoothed), [Example(tuple(range(3, 9)), labels=tuple(range(3, 9)))], 0)


def test_a_regression_is_no_classification():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TWO_BLOCKS | {"num_labels": 3, "problem_type": "multi_label_classification"})
    model = transformers.LlamaForSequenceClassification(config).eval()
    with pytest.raises(ValueError, match="Target size"):
        qzo.losses(model, {**BATCH, "labels": torch.tensor([0, 2])}, 1)
    model.config.problem_type = "single_label_classification"
    batch = {**BATCH, "labels": torch.tensor([0, 2])}
    assert torch.allclose(qzo.losses(model, batch, 2), model(**batch).loss.detach().expand(2), rtol=1e-5)


def test_a_router_whose_loss_the_config_asks_for():
    """Mixtral adds the router's loss to its own; neither the step nor the comparison has it."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **TWO_BLOCKS, num_local_experts=2, num_experts_per_tok=1, output_router_logits=True, router_aux_loss_coef=1.0
    )
    model = transformers.MixtralForCausalLM(config).eval()
    with torch.no_grad():
        plain, with_router = (model(**BATCH, output_router_logits=on).loss for on in (False, True))
    assert with_router > plain + 0.1
    assert torch.allclose(qzo.losses(model, BATCH, 1), plain, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_roundings_of_16_bits_are_no_difference(dtype):
    model = make(dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.allclose(qzo.losses(model, BATCH, 1), own(model), rtol=0.02)


def test_a_model_is_compared_once(monkeypatch):
    model, seen = make(), []
    monkeypatch.setattr(own_loss, "_check_tokens", lambda *_: bool(seen.append(1)) or True)
    qzo.losses(model, BATCH, 1)
    qzo.losses(model, BATCH, 2)
    assert seen == [1]
    qzo.losses(make(), BATCH, 1)
    assert seen == [1, 1]


def test_a_quantized_head_has_each_evaluations_scales(monkeypatch):
    """Few positions at a time: each piece holds as many of every evaluation."""
    model = qzo.quantize_(make(), group_size=32, skip=())
    arena_of(model)
    assert "lm_head" in layers(model)
    coefs = [0.5, -0.5, 0.0]
    monkeypatch.setattr(head, "LOGIT_BYTES", 12 * 4 * 64)
    alone = []
    for coef in coefs:
        with qzo.evaluating(model, qzo.Evaluations([7], [coef])):
            alone.append(qzo.losses(model, BATCH, 1))
    with qzo.evaluating(model, qzo.Evaluations([7] * 3, coefs)):
        together = qzo.losses(model, BATCH, 3)
    assert torch.allclose(together, torch.cat(alone), rtol=1e-5)
    assert len({round(float(x), 3) for x in together}) == 3


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        (transformers.CohereConfig, {"logit_scale": 0.25}),
        (transformers.GraniteConfig, {"logits_scaling": 4.0}),
        (transformers.Gemma2Config, {"final_logit_softcapping": 0.5, "head_dim": 16, "query_pre_attn_scalar": 16}),
    ],
)
def test_vision_language_models_do_what_their_own_forward_does(text, changes):
    """Llava's forward ends at its head: it has no scale and no soft cap of the text model's own class."""
    torch.manual_seed(0)
    sight = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, image_size=28, num_attention_heads=2, patch_size=14
    )
    config = transformers.LlavaConfig(
        text_config=text(**TWO_BLOCKS | changes), vision_config=sight, image_token_index=60
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    assert torch.allclose(qzo.losses(model, BATCH, 2), own(model).expand(2), rtol=1e-5)


def test_labels_that_differ_between_evaluations_are_refused():
    labels = IDS.clone()
    labels[1, :5] = -100
    with pytest.raises(ValueError, match=r"hold \[11, 7\] labels: each takes the same examples; use qzo.pair"):
        qzo.losses(make(), Stacked({**BATCH, "labels": labels}), 2)


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_losses_that_are_not_finite_are_no_other_logits(value):
    """A dtype that overflows, or a damaged tensor: the step is skipped and says so."""
    torch.manual_seed(0)
    model = qzo.quantize_(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TWO_BLOCKS)), group_size=32)
    weight = model.model.norm.weight
    good, weight.data = weight.data, torch.full_like(weight, value)
    optimizer = qzo.QZO(model, lr=0.1)
    batch = qzo.pair(BATCH, 2)
    with pytest.warns(UserWarning, match="step 0 had a NaN or infinite loss and changes nothing; if that goes on"):
        optimizer.step(lambda: qzo.losses(model, batch, 2))
    weight.data = good
    assert optimizer.step(lambda: qzo.losses(model, batch, 2)) < 10
    assert own_loss._seen[model]  # compared as soon as there is something to compare
