"""Batches in a few shapes: the widths that pad least, and losses that padding leaves as they are."""

import itertools
import random

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

import qzo
from qzo.loss.losses import option_scores, static_batch
from qzo.optim.graph import LIMIT
from qzo.training import data
from qzo.training import loop as train
from qzo.training.buckets import COUNT, Buckets, best_widths, next_step, padding_bounds
from qzo.training.data import Example
from qzo.training.packing import packed_batch
from qzo.training.task import Task
from tests.support import graphs, tiny


def padding(lengths, widths):
    return sum(min(w for w in widths if w >= length) - length for length in lengths)


def test_a_run_has_no_more_widths_than_graphs():
    assert COUNT <= LIMIT


def test_the_widths_pad_least():
    """Against every choice there is."""
    dice = random.Random(0)
    for _ in range(200):
        lengths, count = [8 * dice.randint(1, 24) for _ in range(dice.randint(1, 10))], dice.randint(1, 4)
        there = sorted(set(lengths))
        least = min(
            padding(lengths, [*some, there[-1]]) for k in range(count) for some in itertools.combinations(there[:-1], k)
        )
        widths = best_widths(lengths, count)
        assert len(widths) <= count
        assert list(widths) == sorted(widths)
        assert padding(lengths, widths) == least


def test_a_batch_is_wider_than_its_longest_row_but_not_than_the_model_takes():
    sizes = [(length, length // 2) for length in range(1, 1025)]
    for limit in (None, 1024):
        buckets = Buckets(sizes, () if limit is None else (limit,))
        assert len(buckets.widths) == 8
        shapes = {length: buckets.shape(length) for length, _ in sizes}
        assert all(width > length for length, (width, _) in shapes.items() if length < 1024)
        assert all(count >= length // 2 for length, (_, count) in shapes.items())
        assert shapes[1024] == ((1032, 512) if limit is None else (1024, 512))
        assert len(set(shapes.values())) == 8


def test_no_row_is_padded_across_a_bound_and_there_are_no_more_shapes():
    sizes = [(length, length // 2) for length in range(1, 1025)]
    buckets = Buckets(sizes, (200, 1024))
    shapes = {length: buckets.shape(length) for length, _ in sizes}
    assert all(length < width <= 200 for length, (width, _) in shapes.items() if length < 200)
    assert shapes[200][0] == 200
    assert all(length < width for length, (width, _) in shapes.items() if 200 < length < 1024)
    assert len(set(shapes.values())) == 8
    assert len(buckets.widths) == 7, "one of which lies across"
    assert len(Buckets(sizes, (2048,)).widths) == 8


@pytest.mark.parametrize(
    ("lengths", "most"), [([n for n in range(30, 1001)], 0.12), ([round(32 * 1.001**n) for n in range(3467)], 0.19)]
)
def test_what_padding_costs_is_what_the_module_says(lengths, most):
    buckets = Buckets([(n, 0) for n in lengths])
    assert sum(buckets.shape(n)[0] - n for n in lengths) / sum(lengths) == pytest.approx(most, abs=0.01)


def test_long_rows_have_coarse_widths():
    """131,072 lengths are looked through at once, not each."""
    assert Buckets([(n, 0) for n in range(1 << 17)]).unit == 512


def test_steps_add_at_most_a_quarter():
    assert [next_step(n) for n in (1, 8, 9, 64, 65, 128, 129, 1000)] == [8, 8, 16, 64, 80, 128, 160, 1024]
    assert [next_step(n, 16) for n in (1, 9, 128, 129, 256, 257, 513, 1000)] == [8, 16, 128, 136, 256, 272, 544, 1024]
    for steps in (4, 16):
        assert all(n <= next_step(n, steps) <= max((1 + 1 / steps) * n, n + 7) for n in range(1, 5000))


# ---------------------------------------------------------------------------------------------- batches of a task

KINDS = {
    "text": [Example(tuple(range(3, 5 + n)), labels=tuple(range(3, 5 + n))) for n in range(6)],
    "completion": [Example(tuple(range(3, 9 + n)), labels=(-100,) * 4 + tuple(range(7, 9 + n))) for n in range(6)],
    "one": [Example(tuple(range(3, 5 + n)), options=((7,), (9,), (11,)), label=n % 3) for n in range(6)],
    "several": [Example(tuple(range(3, 7 + n)), options=((7, 8), (9,), (11, 12, 4)), label=n % 3) for n in range(6)],
    "shared": [Example(tuple(range(3, 19 + n)), options=((7, 8), (9,), (11, 12, 4)), label=n % 3) for n in range(6)],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny.save_checkpoint(tmp_path_factory.mktemp("m"))
    return qzo.from_pretrained(folder, group_size=32, device="cpu")


@pytest.mark.parametrize("packing", ["off", "auto"])
@pytest.mark.parametrize("layers", [None, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_buckets_leave_the_losses_and_look_at_no_value(model, kind, layers, packing):
    """As while a step is captured: with host reads refused, on batches of unequal lengths."""
    prefix = train.choose_layers(model, layers)
    exact, padded = (Task(model, KINDS[kind], 0, prefix, packing, bucketed=b) for b in (False, True))
    exact.settle(), padded.settle()
    shapes = set()
    for indices in ([0, 1], [1, 5, 2], [4, 3]):
        want, batch = exact.closure(indices, 2), padded.batch(indices, 2)
        with qzo.evaluating(model, qzo.Evaluations([1, 1], [0.3, -0.3])):
            losses = want()
            with graphs.capturing():
                got = padded.losses(batch, 2)
        assert torch.allclose(got, losses, rtol=1e-5)
        assert losses[0] != losses[1]
        read = batch["targets" if "targets" in batch else "input_ids"]
        shapes.add((batch["input_ids"].shape[1], read.shape[1]))
        if "attention_mask" in batch:
            assert not batch["attention_mask"].all()
    assert len(shapes) <= 3
    if kind not in ("text", "completion"):
        assert torch.allclose(padded.scores(2), exact.scores(2), atol=1e-5)
    assert padded.evaluate(2)["loss"] == pytest.approx(exact.evaluate(2)["loss"], rel=1e-5)


@pytest.fixture(scope="module")
def longrope():
    """A Phi-3 whose rotary embeddings have other factors from 17 tokens on."""
    factors = {"short_factor": [1.0] * 16, "long_factor": [8.0] * 16}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    tokens = {"vocab_size": 30, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    places = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    config = Phi3Config(**shape, **tokens, **places, rope_parameters=rope)
    return qzo.quantize_(Phi3ForCausalLM(config), group_size=32)


def test_padding_leaves_a_model_the_factors_of_short_texts(longrope):
    assert padding_bounds(longrope.config) == (16, 64)
    examples = [Example(tuple(range(3, 3 + n)), labels=tuple(range(3, 3 + n))) for n in (12, 15, 16, 18)]
    exact, padded = (Task(longrope, examples, 0, bucketed=bucketed) for bucketed in (False, True))
    for number in range(4):
        batch = padded.batch([number], 2)
        assert batch["input_ids"].shape[1] in ((16, 24) if number == 3 else (16,))
        with qzo.evaluating(longrope, qzo.Evaluations([1, 1], [0.3, -0.3])):
            want, got = exact.losses(exact.batch([number], 2), 2), padded.losses(batch, 2)
        assert torch.allclose(got, want, rtol=1e-5), number


def test_the_options_of_a_static_batch_are_scored_as_those_of_another(model):
    for kind in ("several", "shared"):
        exact, padded = (data.collate(KINDS[kind], 0, shape=shape) for shape in (None, (32, 5)))
        assert "labels" not in padded
        assert torch.allclose(option_scores(model, padded), option_scores(model, exact), atol=1e-5)


def test_a_static_batch_reads_what_labels_say(model):
    labels = torch.tensor([[3, -100, 5, 6, -100], [-100, -100, -100, 4, -100], [3, -100, -100, -100, -100]])
    batch = {"input_ids": labels.clamp(min=3), "attention_mask": torch.ones_like(labels), "labels": labels}
    static = static_batch(qzo.pair(batch, 2), 3)
    assert static["targets"].tolist() == 2 * [[5, 6, -100], [4, -100, -100], [-100, -100, -100]]
    assert static["sources"][:2, :2].tolist() == [[1, 2], [2, 0]]
    assert static_batch(batch)["targets"].shape == (3, 2)
    want = qzo.losses(model, batch, 2)  # a model's first batch is checked, which reads on the host
    with graphs.capturing():
        got = qzo.losses(model, static, 2)
    assert torch.allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize(
    ("labels", "targets", "said"),
    [
        ([[3, 4, 5]], 1, "targets=1: the batch has rows of 2 labels, in 2 places"),
        ([[3, 4, 5]], 3, "targets=3"),
        ([[3, -100, -100]], None, "no position of the batch carries a label"),
    ],
)
def test_static_batches_that_cannot_be(labels, targets, said):
    with pytest.raises(ValueError, match=said):
        static_batch({"labels": torch.tensor(labels)}, targets)


def test_a_packed_batch_without_targets_is_refused():
    examples = [Example((3,), labels=(3,))] * 2
    assert "static" not in packed_batch(examples, 0, join=True)
    with pytest.raises(ValueError, match="no position of the batch carries a label"):
        packed_batch(examples, 0, join=True, shape=(8, 8))


@pytest.mark.parametrize("bucketed", [False, True])
def test_a_batch_without_labels_is_refused(model, bucketed):
    task = Task(model, [Example((3,), labels=(3,)), Example((4, 5), labels=(-100, -100))], 0, bucketed=bucketed)
    with pytest.raises(ValueError, match="no position of the batch carries a label"):
        task.closure([0, 1], 2)()


def test_the_device_decides_and_a_cpu_pads_exactly(model):
    task = Task(model, KINDS["one"], 0)
    assert not task.bucketed
    assert task.batch([0, 1], 2)["input_ids"].shape == (4, 3)
