"""A prompt that ends in a space before its completion: what is learned is what a server makes of the whole text."""

import warnings

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qzo
from qzo.training.data import IGNORED, tokenize
from qzo.training.records import read_records
from qzo.training.task import Task
from tests.support import tiny, zoo


@pytest.fixture(scope="module")
def tokenizer():
    return zoo.make("tiktoken")


def model(tokenizer):
    """A random Llama that knows the tokenizer's tokens."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    network = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **sizes))
    return qzo.quantize_(network.eval(), group_size=32)


def test_its_loss_is_that_of_the_space_where_it_belongs(tokenizer):
    """13.3 where 1.x was expected: that was a token that no served text has."""
    with pytest.warns(UserWarning, match="in 1 of 1 lines a token holds"):
        at_the_end = tokenize([{"prompt": "Topic: ", "completion": "yes"}], tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        in_front = tokenize([{"prompt": "Topic:", "completion": " yes"}], tokenizer)
    [example] = at_the_end
    whole = tokenizer("Topic: yes", add_special_tokens=False)["input_ids"]
    assert list(example.ids) == [tokenizer.bos_token_id, *whole, tokenizer.eos_token_id]
    learned = [label for label in example.labels if label != IGNORED]
    assert tokenizer.convert_ids_to_tokens(learned) == ["Ġyes", "</s>"]
    network = model(tokenizer)
    losses = [Task(network, examples, 0).evaluate()["loss"] for examples in (at_the_end, in_front)]
    assert losses[0] == losses[1]
    with torch.no_grad():
        logits = network(torch.tensor([example.ids])).logits[0].float()
    at = len(example.ids) - len(learned) - 1
    want = torch.nn.functional.cross_entropy(logits[at : at + len(learned)], torch.tensor(learned))
    assert losses[0] == pytest.approx(float(want), rel=1e-5)


def test_one_warning_counts_the_lines_whose_tokens_merge(tmp_path, tokenizer):
    records = [{"prompt": f"Topic:{' ' * (n % 3 == 0)}", "completion": f"{' ' * (n % 3 != 0)}yes"} for n in range(9)]
    path = tiny.write_jsonl(tmp_path / "d.jsonl", records)
    with pytest.warns(UserWarning, match="in 3 of 9 lines") as seen:
        examples = tokenize(read_records(path), tokenizer)
    assert len({(example.ids, example.labels) for example in examples}) == 1
    [said] = [str(warning.message) for warning in seen]
    assert said.startswith(f"in 3 of 9 lines of {path} a token holds the prompt's end and what follows it (the first: ")
    assert f"{path}, line 1)" in said
