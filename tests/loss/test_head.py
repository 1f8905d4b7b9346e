"""The output head: logits at single positions are those of the whole forward, and the rest of them is never made."""

import warnings

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from qzo.loss import head
from tests.support.float_models import TWO_BLOCKS

IDS = torch.arange(3, 15)[None] + torch.tensor([[0], [7], [14], [21]])
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
ROW, COLUMN = torch.tensor([0, 0, 1, 3, 3, 2]), torch.tensor([2, 7, 11, 0, 5, 5])  # of two evaluations, three each


class HeadNotCalled(transformers.LlamaForCausalLM):
    """Its head's weight is used, and its head not called."""

    def forward(self, use_cache=None, **inputs):
        states = self.model(**inputs, use_cache=False).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(logits=functional.linear(states, self.lm_head.weight))


class HeadNotNamed(transformers.LlamaForCausalLM):
    def get_output_embeddings(self):
        raise NotImplementedError


def make(cls=transformers.LlamaForCausalLM, **changes):
    torch.manual_seed(0)
    return cls(transformers.LlamaConfig(**TWO_BLOCKS | changes)).eval()


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def whole(model):
    """All logits of INPUTS, [4, 12, 64]."""
    with torch.no_grad():
        return model(**INPUTS).logits


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


# ---------------------------------------------------------------------------------------------- logits


@pytest.mark.parametrize("most", [1, 2, 3, 99, None])
def test_logits_at_positions_are_those_of_the_whole_forward(model, whole, most):
    parts = list(head.logits_at(model, INPUTS, ROW, COLUMN, 2, most))
    assert [part.shape[1] for part in parts] == {1: [1, 1, 1], 2: [2, 1]}.get(most, [3])
    got = torch.cat(parts, 1)
    assert (got.shape, got.dtype) == ((2, 3, 64), torch.float32)
    torch.testing.assert_close(got, whole[ROW, COLUMN].view(2, 3, 64), rtol=1e-5, atol=1e-5)


def test_the_body_runs_once_and_the_head_reads_these_rows_and_no_others(model, monkeypatch):
    bodies, heads = [], []
    hooks = [
        model.model.layers[0].register_forward_hook(lambda *_: bodies.append(1)),
        model.lm_head.register_forward_hook(lambda _, args, out: heads.append(out[..., 0].numel())),
    ]
    monkeypatch.setattr(head, "LEAST_ROWS", 1)
    monkeypatch.setattr(head, "LOGIT_BYTES", 4 * 64 * 4)  # four positions of float32 logits
    try:
        assert len(list(head.logits_at(model, INPUTS, ROW, COLUMN, 2))) == 2
    finally:
        for hook in hooks:
            hook.remove()
    assert bodies == [1]
    assert heads == [4, 2], "of each evaluation two positions, and then the one that is left"


def test_16_bit_logits_are_given_in_float32():
    [got] = head.logits_at(make().to(torch.bfloat16), INPUTS, ROW, COLUMN, 2)
    assert got.dtype == torch.float32


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (HeadNotCalled, "its head is not called with hidden states"),
        (HeadNotNamed, r"it does not say which module its head is \(get_output_embeddings\)"),
    ],
)
def test_where_the_head_cannot_be_cut_all_logits_are_computed_with_one_warning(cls, reason):
    odd = make(cls)
    want = odd(**INPUTS).logits[ROW, COLUMN].view(2, 3, 64)
    with pytest.warns(UserWarning, match=rf"{cls.__name__}: the logits of all tokens are computed, .*{reason}") as seen:
        found = [*head.logits_at(odd, INPUTS, ROW, COLUMN, 2, 1), *head.logits_at(odd, INPUTS, ROW, COLUMN, 2, 1)]
    assert len(seen) == 1
    assert len(found) == 2, "all of them at once"
    for got in found:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert head.is_whole(odd)
    assert not head.is_whole(make(cls)), "of this model, not of its class"


def test_a_model_without_logits_is_refused():
    bare = transformers.LlamaModel(transformers.LlamaConfig(**TWO_BLOCKS)).eval()
    with pytest.raises(ValueError, match=r"LlamaModel has no language-model head \(its output has no logits\)"):
        next(head.logits_at(bare, INPUTS, ROW, COLUMN))


def test_after_a_forward_that_fails_the_head_is_as_before(model, whole):
    before = vars(model.lm_head).copy()
    with pytest.raises(IndexError):
        list(head.logits_at(model, INPUTS, ROW + 4, COLUMN, 2))
    assert vars(model.lm_head) == before
    assert torch.equal(model(**INPUTS).logits, whole)


def test_what_the_head_reads(model):
    want = model.model(**INPUTS).last_hidden_state
    torch.testing.assert_close(head.head_input(model, INPUTS), want, rtol=1e-6, atol=1e-6)
    odd = make(HeadNotCalled)
    assert head.head_input(odd, INPUTS).shape == (4, 12, 64), "logits, where the head is not called"


# ---------------------------------------------------------------------------------------------- one forward


def test_a_forward_has_no_cache_and_no_routers_loss():
    config = transformers.MixtralConfig(
        **TWO_BLOCKS, num_local_experts=2, num_experts_per_tok=1, output_router_logits=True
    )
    torch.manual_seed(0)
    output = head.forward(transformers.MixtralForCausalLM(config).eval(), INPUTS)
    assert output.past_key_values is None
    assert output.router_logits is None


def test_a_forward_in_training_mode_has_no_dropout_and_leaves_the_modes_as_they_were():
    dropping = make(attention_dropout=0.9)
    want = head.forward(dropping, INPUTS).logits
    dropping.train()
    dropping.model.layers[0].eval()
    modes = [module.training for module in dropping.modules()]
    assert torch.equal(head.forward(dropping, INPUTS).logits, want)
    assert [module.training for module in dropping.modules()] == modes
    within = []
    with pytest.raises(ZeroDivisionError), head.without_dropout(dropping):
        within.append(1 / any(module.training for module in dropping.modules()))
    assert not within, "one of them was on"
    assert [module.training for module in dropping.modules()] == modes, "after an error too"


def test_arguments_that_a_forward_names(model):
    assert head.takes(model, "position_ids")
    assert head.takes(model, "anything"), "it takes keywords of any name"
    assert not head.takes(nn.Linear(1, 1), "position_ids")
    assert head.takes(nn.Linear(1, 1), "input")


@pytest.mark.parametrize(
    ("batch", "rows"),
    [
        ({"labels": torch.zeros(3, 2), "input_ids": torch.zeros(2, 5)}, 2),
        ({"pixel_values": torch.zeros(8, 4), "input_ids": torch.zeros(2, 5)}, 2),
        ({"pixel_values": torch.zeros(8, 4), "labels": torch.zeros(3, 2)}, 3),
        ({"flag": True, "size": torch.tensor(5), "input_features": torch.zeros(6, 2)}, 6),
    ],
)
def test_rows_are_counted_by_tokens_whatever_stands_first(batch, rows):
    assert head.row_count(batch) == rows


def test_a_batch_without_rows_is_refused_by_its_keys():
    with pytest.raises(ValueError, match=r"the batch holds no tensor of tokens \(its keys: use_cache, size\)"):
        head.row_count({"use_cache": False, "size": torch.tensor(1)})


# ---------------------------------------------------------------------------------------------- parts of a model


def test_head_and_body_of_a_model(model):
    assert head.output_head(model) is model.lm_head
    assert head.body(model) is model.model
    assert head.output_head(nn.Linear(1, 1)) is None

    class Beside(nn.Module):
        """No base model is named: what has most parameters beside the head."""

        def __init__(self):
            super().__init__()
            self.small, self.large = nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2), nn.Linear(9, 9)])
            self.head = nn.Linear(20, 20)

        def get_output_embeddings(self):
            return self.head

    named = Beside()
    assert head.body(named) is named.large[1]


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError])
def test_a_model_that_fails_when_asked_for_its_head_has_none(error):
    def fails():
        raise error("no such thing here")

    odd = make()
    odd.get_output_embeddings = fails
    assert head.output_head(odd) is None


def test_labels_become_inputs_of_a_decoder():
    class Plain(nn.Module):
        config = transformers.T5Config(decoder_start_token_id=2, pad_token_id=0)

    labels = torch.tensor([[5, 6, 7], [8, -100, -100]])
    assert head.decoder_inputs(Plain(), labels).tolist() == [[2, 5, 6], [2, 8, 0]]
    assert labels[1, 1] == -100, "the labels themselves stay"
    Plain.config = transformers.T5Config(decoder_start_token_id=None)
    with pytest.raises(
        ValueError, match=r"Plain does not say how labels become .*: give decoder_input_ids beside labels"
    ):
        head.decoder_inputs(Plain(), labels)
    sizes = dict(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=16)
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    assert torch.equal(head.decoder_inputs(t5, labels), t5.prepare_decoder_input_ids_from_labels(labels))
    assert head.has_encoder(t5)
    assert not head.has_encoder(make())


def test_a_warning_comes_once_for_a_model():
    odd = make()
    with pytest.warns(UserWarning, match="LlamaForCausalLM: .* more memory and time: of a reason"):
        head.take_whole(odd, "of a reason")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head.take_whole(odd, "of another")


def test_a_row_among_few_has_the_bits_that_it_has_among_many(model):
    """A CPU's head is given four rows of an evaluation at least, of which those beyond are dropped."""
    torch.manual_seed(0)
    inputs = {"input_ids": torch.randint(3, 30, (12, 5))}
    many = torch.cat([*head.logits_at(model, inputs, torch.arange(12), torch.full((12,), 4))], 1)
    for count in (1, 2, 3, 5):
        row, column = torch.arange(count), torch.full((count,), 4)
        [few] = head.logits_at(model, {"input_ids": inputs["input_ids"][:count]}, row, column)
        assert torch.equal(few, many[:, :count])
