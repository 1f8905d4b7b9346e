"""Tokens and places that a model has no row for are found before a step, in one line; on a GPU they end the process."""

import pytest
import torch
import transformers

from qzo.training.data import Example
from qzo.training.task import Task

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
