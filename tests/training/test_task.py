"""A task: what it refuses before a step, its batches, and what the model scores on them.

Tokens and places that a model has no row for are named in one line; on a GPU they would end the process.
"""

import math

import pytest
import torch
import transformers

from qzo.training.data import Example
from qzo.training.packing import row_of
from qzo.training.prefix import FrozenPrefix
from qzo.training.task import Task, measure

BERT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 10,
    "is_decoder": True,
}
GPT = {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 10}
BART = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 64,
    "vocab_size": 64,
    "max_position_embeddings": 10,
}
PLACES = {  # name -> what a model takes: one of 10 places and rows for them; OPT's and BART's tables have two more
    "OPTForCausalLM": (
        10,
        {
            "hidden_size": 64,
            "ffn_dim": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 64,
            "word_embed_proj_dim": 64,
            "max_position_embeddings": 10,
        },
    ),
    "RobertaForCausalLM": (8, BERT),
    "BertLMHeadModel": (10, BERT),
    "GPT2LMHeadModel": (10, GPT),
    "OpenAIGPTLMHeadModel": (10, GPT),
    "BartForConditionalGeneration": (10, BART),
}


def make(name, **config):
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**config)).eval()


def llama(**changes):
    return make(
        "LlamaForCausalLM",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
        **changes,
    )


def text(count):
    ids = tuple(range(3, 3 + count))
    return Example(ids, labels=ids)


@pytest.mark.parametrize("name", PLACES)
def test_an_example_longer_than_the_model_has_places(name):
    most, config = PLACES[name]
    model = make(name, **config)
    task = Task(model, [text(4), text(most)], 0, bucketed=False)
    assert torch.isfinite(task.losses(task.batch([0, 1], 1), 1)).all()
    with pytest.raises(ValueError, match=rf"an example has {most + 1} tokens, {name} has places for {most}: give"):
        Task(model, [text(4), text(most + 1)], 0)
    if name == "OPTForCausalLM":
        with pytest.raises(ValueError, match="an example has 11 tokens"):
            Task(model, [Example((3,) * 8, options=((4,), (5, 6, 7)), label=0)], 0)


@pytest.mark.parametrize(
    "example",
    [
        Example((3, 32), labels=(3, 32)),
        Example((3,), options=((4,), (32,)), label=0),
        Example((3, 4), options=((4, 5), (6, 40, 7)), label=0),
        Example((3, 4), labels=(-100, 32)),
    ],
)
def test_a_token_that_the_model_does_not_know(example):
    kind = text(3) if example.options is None else Example((3,), options=example.options[:1] * 2, label=0)
    with pytest.raises(ValueError, match=r"example 2 has the token (32|40), LlamaForCausalLM knows 32: the"):
        Task(llama(), [kind, example], 0)


def test_padding_that_the_model_does_not_know_is_another():
    """A pad token is often added to a tokenizer, and the model left as it was."""
    model, examples = llama(), [text(4), text(9)]
    task = Task(model, examples, 32)
    assert task.batch([0, 1], 1)["input_ids"][0, 4:].tolist() == [0] * 5
    assert task.evaluate() == Task(model, examples, 0).evaluate()


def test_rows_longer_than_what_the_config_says_keep_their_tokens_in_buckets():
    """Rotary positions go on; a batch is as wide as its longest row."""
    model, examples = llama(max_position_embeddings=10), [text(4), text(12)]
    wanted = Task(model, examples, 0, bucketed=False).evaluate()["loss"]
    assert Task(model, examples, 0, bucketed=True).evaluate()["loss"] == pytest.approx(wanted, rel=1e-6)


# ---------------------------------------------------------------------------------------------- what it holds


def choice(count, label, options=((4,), (5,))):
    return Example(tuple(range(3, 3 + count)), options=options, label=label)


CHOICES = [choice(7, 0), choice(3, 1), choice(5, 1), choice(9, 0), choice(4, 1)]
SEVERAL = [choice(4, 0, ((4,), (5, 6, 7))), choice(2, 1, ((8, 9), (10,)))]


def test_examples_of_one_kind_and_a_packing_that_there_is():
    model = llama()
    with pytest.raises(ValueError, match="packing='on': known are off, auto"):
        Task(model, CHOICES, 0, packing="on")
    with pytest.raises(ValueError, match="the data mixes examples with no options and 2 options"):
        Task(model, [text(4), choice(3, 0)], 0)


def test_a_batch_holds_its_examples_once_for_each_evaluation():
    task = Task(llama(), CHOICES, 0, bucketed=False)
    batch = task.batch([1, 3], 3)
    assert batch["input_ids"].shape == (6, 9)
    assert torch.equal(batch["input_ids"].view(3, 2, 9)[0], batch["input_ids"].view(3, 2, 9)[2])
    assert batch["input_ids"][0].tolist() == [3, 4, 5, 0, 0, 0, 0, 0, 0]
    assert batch["attention_mask"].sum(1).tolist() == [3, 9] * 3
    assert (batch["option_ids"].tolist(), batch["label"].tolist()) == ([[4, 5]] * 6, [1, 0] * 3)
    assert task.labels().tolist() == [0, 1, 1, 0, 1]


@pytest.mark.parametrize("blocks", [None, 1])
def test_scores_and_measures_are_in_the_order_of_the_examples(blocks):
    """Whatever the length by which they were put into batches, and with a prefix's states as without."""
    model = llama(initializer_range=0.3)
    task = Task(model, CHOICES, 0, None if blocks is None else FrozenPrefix(model, blocks), bucketed=False)
    scores = task.scores(batch_size=2)
    alone = torch.cat([Task(model, [example], 0).scores() for example in CHOICES])
    torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-5)
    assert len(scores.unique(dim=0)) == 5
    assert task.evaluate(2) == pytest.approx(measure(alone, task.labels()), rel=1e-4)
    batch = task.batch(range(5), 2)
    assert ("states" in batch) == (blocks is not None)
    torch.testing.assert_close(task.losses(batch, 2), task.closure(range(5), 2)())
    assert float(task.losses(batch, 2)[1]) == pytest.approx(task.evaluate()["loss"], rel=1e-4)


def test_texts_are_measured_by_the_mean_of_their_labelled_tokens():
    task = Task(llama(), [text(4), text(9), text(6)], 0, bucketed=False)
    each = [float(task.closure([i], 1)()) for i in range(3)]
    wanted = (3 * each[0] + 8 * each[1] + 5 * each[2]) / 16  # the first token of a text is not predicted
    for batch_size in (1, 2):
        found = task.evaluate(batch_size)
        assert found == {"loss": pytest.approx(wanted, rel=1e-5), "accuracy": None}


def test_rows_that_an_example_goes_through_the_model_as(monkeypatch):
    """Its prompt, each of its options behind it, or all of them behind one prompt where the model can."""
    assert Task(llama(), CHOICES, 0).rows(CHOICES[1]) == [(3, 4, 5)]
    task = Task(llama(), SEVERAL, 0)
    task.shares = False
    assert task.rows(SEVERAL[0]) == [(3, 4, 5, 6, 4), (3, 4, 5, 6, 5, 6, 7)]
    task.shares = True
    [row] = task.rows(SEVERAL[0])
    assert row == row_of(SEVERAL[0])
    assert len(row) < 5 + 7, "the prompt once"
    refused = Task(llama(), SEVERAL, 0, packing="auto")
    monkeypatch.setattr("qzo.training.task.sharing_pays", lambda examples: True)
    monkeypatch.setattr("qzo.training.task.why_not", lambda *_: "of a reason")
    with pytest.warns(UserWarning, match="LlamaForCausalLM runs without packed rows: of a reason"):
        assert refused.settle() == (False, False)


def test_an_encoder_is_given_neither_buckets_nor_packed_rows():
    task = Task(make("BartForConditionalGeneration", **BART), [text(4)], 0, packing="auto", bucketed=True)
    assert (task.bucketed, task.packing, task.settle()) == (False, "off", (False, False))


# ---------------------------------------------------------------------------------------------- measures


def test_a_measure_is_cross_entropy_and_the_share_that_is_right():
    scores = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 3.5]]).half()
    found = measure(scores, torch.tensor([0, 1, 0]))
    wanted = sum(math.log(1 + math.exp(-gap)) for gap in (2.0, 1.0, -0.5)) / 3
    assert found == {"loss": pytest.approx(wanted, rel=1e-6), "accuracy": pytest.approx(2 / 3)}


# ---------------------------------------------------------------------------------------------- label biases


@pytest.mark.parametrize(
    ("examples", "classes"),
    [
        (CHOICES, (4, 5)),
        ([*CHOICES, choice(4, 1, ((4,), (6,)))], None),  # of one example another option
        (SEVERAL, None),  # of several tokens
        ([text(4)], None),
    ],
)
def test_a_classification_has_the_same_options_of_one_token_everywhere(examples, classes):
    assert Task(llama(), examples, 0).classes == classes


@pytest.mark.parametrize("bucketed", [False, True])
def test_fitted_biases_are_in_scores_and_losses_from_then_on(bucketed):
    task = Task(llama(), CHOICES, 0, bucketed=bucketed)
    scores, label, wanted = task.scores(), task.labels(), task.evaluate(fitted=True)
    before = task.evaluate()
    assert wanted["loss"] is not None
    assert before["loss"] is not None
    assert wanted["loss"] < before["loss"]
    [(first, bias), (second, other)] = task.fit_biases_()
    assert (first, second, bias + other) == (4, 5, pytest.approx(0, abs=1e-6))
    moved = scores + torch.tensor([bias, other])
    assert torch.allclose(task.scores(), moved)
    assert task.evaluate() == pytest.approx(wanted)
    indices = [0, 2, 4]
    losses = task.losses(task.batch(indices, 2), 2)
    assert losses.tolist() == pytest.approx([measure(moved[indices], label[indices])["loss"]] * 2, rel=1e-5)
    task.fit_biases_()
    assert task.evaluate() == pytest.approx(wanted), "there is nothing left to fit"
