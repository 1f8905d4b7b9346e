"""The frozen prefix: a forward from the first trained block on has the bits of the whole one, or is refused."""

import copy
import itertools

import pytest
import torch
import transformers
from torch import nn

from qzo.training import data
from qzo.training.prefix import FrozenPrefix, PrefixCache, decoder_blocks

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
ROWS = [tuple(3 + (i + j) % 20 for j in range(2 + i % 5)) for i in range(40)]  # more than a group of rows


def inputs(rows):
    return data.padded([(ids, None) for ids in rows], 0, "cpu")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


# ---------------------------------------------------------------------------------------------- the split


def test_names_of_what_trains(model):
    prefix = FrozenPrefix(model, 1)
    assert prefix.trained_names == ("model.layers.2.",)
    assert prefix.trains("model.layers.2.mlp.up_proj")
    assert not prefix.trains("model.layers.1.mlp.up_proj")
    assert not prefix.trains("lm_head")
    assert not FrozenPrefix(model, 2).trains("model.layers.20.mlp.up_proj"), "a name that only begins alike"
    assert (prefix.below, prefix.first) == (list(model.model.layers[:2]), model.model.layers[2])


@pytest.mark.parametrize("train_layers", [1, 2, 3])
def test_a_forward_from_its_states_has_the_bits_of_the_whole(model, train_layers):
    prefix, given = FrozenPrefix(model, train_layers), inputs(ROWS[:4])
    whole = model(**given)
    ran = []
    hooks = [block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(model.model.layers)]
    states = prefix.states(given)
    assert ran == list(range(3 - train_layers)), "it leaves the forward at the first block that trains"
    assert states.shape == (4, len(given["input_ids"][0]), 32)
    for hook in hooks:
        hook.remove()
    with prefix.skipped(states):
        assert torch.equal(model(**given).logits, whole.logits)
        if train_layers < 3:
            given["input_ids"] = given["input_ids"].flip(0)
            assert torch.equal(model(**given).logits, whole.logits), (
                "blocks below are not run, whatever they would read"
            )
    prefix.check(given)


def test_after_an_error_the_blocks_below_run_again(model):
    prefix, given = FrozenPrefix(model, 1), inputs(ROWS[:2])
    want = model(**given).logits
    with pytest.raises(RuntimeError), prefix.skipped(torch.zeros(2, 3, 7)):
        model(**given)
    assert torch.equal(model(**given).logits, want)
    hooks = len(prefix.first._forward_pre_hooks)
    with pytest.raises(IndexError):
        prefix.states({"input_ids": torch.tensor([[99]])})
    assert len(prefix.first._forward_pre_hooks) == hooks


def test_a_model_that_cannot_be_split_is_refused(model):
    odd = copy.deepcopy(model)
    prefix = FrozenPrefix(odd, 1)
    shared = []  # the block below hands the trained one more than hidden states
    odd.model.layers[0].mlp.register_forward_hook(lambda *_: shared.append(1.0))

    def use(module, args, out):
        out = out + float(len(shared))
        shared.clear()
        return out

    prefix.first.register_forward_hook(use)
    with pytest.raises(
        ValueError, match=r"does not run the same from its block 2 on: train it whole \(without train_la"
    ):
        prefix.check(inputs(ROWS[:1]))


@pytest.mark.parametrize("train_layers", [0, 4, -1])
def test_blocks_that_there_are_not(model, train_layers):
    with pytest.raises(ValueError, match=rf"train_layers={train_layers}: LlamaForCausalLM has 3 blocks"):
        FrozenPrefix(model, train_layers)


def test_models_whose_blocks_are_no_one_list(model):
    assert decoder_blocks(model) == ("model.layers", model.model.layers)
    sizes = dict(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=16)
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    with pytest.raises(
        ValueError, match="T5ForConditionalGeneration has an encoder before its decoder: train it whole"
    ):
        FrozenPrefix(t5, 1)
    other = copy.deepcopy(model)
    other.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(ValueError, match="holds its blocks in no list of 3 entries: train_layers cannot be used"):
        FrozenPrefix(other, 1)


# ---------------------------------------------------------------------------------------------- what is kept


def test_kept_states_have_the_same_bits_whatever_was_asked_before(model):
    prefix = FrozenPrefix(model, 1)
    large, small = (PrefixCache(prefix, ROWS, inputs, max_bytes=size) for size in (1 << 30, 1))
    some = [5, 1, 30]
    lengths = [len(ROWS[i]) for i in some]
    first = large.batch(some, lengths, 8)
    assert first.shape == (3, 8, 32)
    for row, i in zip(first, some, strict=True):
        want = prefix.states(inputs([ROWS[i]]))[0]
        torch.testing.assert_close(row[: len(want)], want, rtol=1e-4, atol=1e-5)
        assert not row[len(want) :].any()
    small.batch([9, 39], [len(ROWS[9]), len(ROWS[39])], 8)
    assert torch.equal(small.batch(some, lengths, 8), first)


def test_states_behind_one_another(model):
    cache = PrefixCache(FrozenPrefix(model, 1), ROWS, inputs)
    first = cache.batch([5, 20, 9], [2, 2, 3], 3)
    together = torch.cat([first[0, :2], first[2, :3]])
    assert torch.equal(cache.joined([5, 9], [2, 3]), together[None])
    wide = cache.joined([5, 9], [2, 3], 7)
    assert torch.equal(wide[0, :5], together)
    assert not wide[0, 5:].any()
    assert wide.shape == (1, 7, 32)


def test_rows_are_computed_in_whole_groups_of_like_length_and_once(model):
    asked = []
    cache = PrefixCache(FrozenPrefix(model, 1), ROWS, lambda rows: (asked.append(len(rows)), inputs(rows))[1])
    assert sorted(itertools.chain(*cache.groups)) == list(range(40))
    assert [len(group) for group in cache.groups] == [32, 8]
    lengths = [len(ROWS[i]) for group in cache.groups for i in group]
    assert lengths == sorted(lengths)
    shortest, longest = cache.groups[0][0], cache.groups[1][-1]
    for _ in range(2):
        cache.batch([longest, shortest], [len(ROWS[longest]), 1], 6)
    assert sorted(asked) == [8, 32]


def test_the_group_that_was_asked_for_longest_ago_goes(model):
    rows = [(3, 4)] * (3 * PrefixCache.GROUP)
    asked = []
    cache = PrefixCache(
        FrozenPrefix(model, 1),
        rows,
        lambda some: (asked.append(1), inputs(some))[1],
        2 * PrefixCache.GROUP * 2 * 32 * 4,
    )
    for i in (0, 32, 0, 64):  # of three groups; two fit
        cache.batch([i], [2], 2)
    assert list(cache._held) == [0, 2]
    assert cache._bytes == sum(cache._size(number) for number in cache._held)
    held = [states for group in cache._held.values() for states in group.values()]
    assert sum(states.untyped_storage().nbytes() for states in held) == cache._bytes, "nothing else is kept alive"
    cache.batch([0], [2], 2)
    assert len(asked) == 3
    cache.batch([32], [2], 2)
    assert len(asked) == 4
    tight = PrefixCache(FrozenPrefix(model, 1), rows, inputs, max_bytes=1)
    tight.batch([0, 64], [2, 2], 2)
    assert len(tight._held) == 1, "the one that is asked for is always held"
