"""Runs of QZOTrainer whose losses come from CUDA graphs have the bits of those without; what is not captured.

Where there is no GPU, tests/support/graphs.py stands in for the graphs, and `Pads` for a CUDA device's batches.
"""

import copy
import warnings

import pytest
import torch
from transformers import Trainer

import qzo
from qzo.loss.losses import losses
from qzo.trainer import QZOTrainer
from qzo.trainer.captured import OwnLosses, padded
from tests.support import graphs, trainers
from tests.support.journals import read_whole
from tests.support.trainers import losses_of, scales, trained

pytestmark = trainers.needs_accelerate

LENGTHS = [12] * 4 + [20, 12, 8, 12] + [12, 7, 9, 8] + [12] * 2  # four batches: none padded, padded, the same, the last
EIGHT = {"max_steps": 8, "save_strategy": "no", "train_sampling_strategy": "sequential"}


class Pads(QZOTrainer):
    """Its batches are those of a CUDA device."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._pads = True


def rows(lengths):
    """Rows of random words, the first two of them no labels."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randint(3, 30, (length,), generator=generator) for length in lengths]
    return [{"input_ids": ids, "labels": ids.clone().index_fill(0, torch.tensor([0, 1]), -100)} for ids in found]


def collated(some):
    """Rows -> a batch as wide as the longest."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids, labels = ([row[name] for row in some] for name in ("input_ids", "labels"))
    mask = pad([torch.ones_like(row) for row in ids], True)
    return {"input_ids": pad(ids, True), "attention_mask": mask, "labels": pad(labels, True, -100)}


def ran(base, folder, kind=Pads, changes=None, resume=None, **settings):
    """A run over rows of LENGTHS, four a batch, in their order; -> (trainer, its journal's bytes)."""
    given = {"train_dataset": rows(LENGTHS), "data_collator": collated, **settings}
    run = trained(base, folder, kind, resume, {**EIGHT, **(changes or {})}, **given)
    return run, (folder / "journal.qzo").read_bytes()


def assert_same(one, other):
    """Two runs' scales, journals and logged losses."""
    assert torch.equal(scales(one[0]), scales(other[0]))
    assert one[1] == other[1]
    assert losses_of(one[0]) == losses_of(other[0])


@pytest.fixture
def recorders(monkeypatch):
    return graphs.stand_in(monkeypatch)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return trainers.loaded(tmp_path_factory.mktemp("base"))[0]


# ---------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({}, {}),
        ({}, {"paired": False}),
        ({"gradient_accumulation_steps": 3, "max_steps": 4}, {"directions": 3, "one_sided": True}),
    ],
    ids=["paired", "in turn", "accumulated, one-sided"],
)
def test_graphs_have_the_bits_of_a_run_without(base, tmp_path, recorders, changes, settings):
    """Three shapes that come in turn, the last batch smaller, another rate each step, evaluations between them. Eight
    batches: a step each, or accumulated three and one."""
    between = {"eval_strategy": "steps", "eval_steps": 3}
    data = {"eval_dataset": rows([12] * 4)}
    plain = ran(base, tmp_path / "plain", changes=changes, cuda_graph=False, **settings)
    assert recorders == []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "cuda_graph")
        captured = ran(base, tmp_path / "graphs", changes={**changes, **between}, **settings, **data)
    assert_same(captured, plain)
    assert len(set(losses_of(plain[0]))) == plain[0].args.max_steps
    [recorder] = recorders
    # a shape's first batch runs without a graph; one replay of each graph compares it with the plain losses
    assert len(recorder.graphs) == 3
    assert sum(graph.replays for graph in recorder.graphs) == 8 - 3 + 3


def test_a_run_with_graphs_is_resumed_with_and_without(base, tmp_path, recorders):
    changes = {"save_strategy": "steps", "save_steps": 4}
    whole = ran(base, tmp_path, changes=changes)
    for choice in (None, False):
        (tmp_path / "journal.qzo").write_bytes(whole[1][:-40])  # killed in the last record
        assert_same(ran(base, tmp_path, changes=changes, resume=tmp_path / "checkpoint-4", cuda_graph=choice), whole)
    assert [len(recorder.graphs) for recorder in recorders] == [3, 1]
    with pytest.raises(qzo.JournalError, match=r"its padding is .*as on a CUDA device"):
        ran(base, tmp_path, QZOTrainer, changes, tmp_path / "checkpoint-4")


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"paired": False, "directions": 2}, {"directions": 3, "one_sided": True}])
def test_graphs_on_a_gpu_have_the_bits_of_a_run_without(base, tmp_path, settings):
    model, changes = copy.deepcopy(base).cuda().half(), {"use_cpu": False, "gradient_accumulation_steps": 3}
    plain = ran(model, tmp_path / "plain", QZOTrainer, changes, cuda_graph=False, **settings)
    captured = ran(model, tmp_path / "graphs", QZOTrainer, changes, **settings)
    assert_same(captured, plain)
    assert b"as on a CUDA device" in plain[1]
    assert len(captured[0]._optimizer.graphs.captured) == 3


# ---------------------------------------------------------------------------------------------- what is not captured


def test_what_reads_on_the_host_runs_without_after_one_warning(base, tmp_path, recorders):
    model = copy.deepcopy(base)
    mlp = model.model.layers[1].mlp
    mlp.act_fn = torch.nn.Sequential(mlp.act_fn, graphs.Reads())
    with pytest.warns(UserWarning, match="cuda_graph") as said:
        run = ran(model, tmp_path / "a", changes={"max_steps": 5})
    [text] = [str(one.message) for one in said if "cuda_graph" in str(one.message)]
    assert "model.layers.1.mlp.act_fn.1 (Reads) cannot be captured" in text
    assert_same(run, ran(model, tmp_path / "b", changes={"max_steps": 5}, cuda_graph=False))


class Counts(Pads):
    """A compute_loss that keeps something in Python."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.calls = getattr(self, "calls", 0) + 1
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


def test_a_loss_of_ones_own_is_left_alone(base, tmp_path, recorders):
    run, _ = ran(base, tmp_path / "a", Counts, {"max_steps": 3})
    assert run.calls == 3 * 2
    assert recorders == []
    with pytest.warns(UserWarning, match="cuda_graph=True: the loss is not transformers' own") as said:
        ran(base, tmp_path / "b", Counts, {"max_steps": 1}, cuda_graph=True)
    assert sum("cuda_graph" in str(one.message) for one in said) == 1


def test_ranks_run_without_the_graph_that_was_asked_for(base, tmp_path, monkeypatch):
    model, arguments = copy.deepcopy(base), trainers.arguments(tmp_path)
    monkeypatch.setattr(type(arguments), "world_size", 2)
    with pytest.warns(UserWarning, match="cuda_graph=True: several ranks add up"):
        QZOTrainer(model, arguments, train_dataset=rows(LENGTHS), cuda_graph=True)


def test_a_graph_that_was_asked_for_on_a_cpu_is_said_once(base, tmp_path):
    few = {"max_steps": 3}
    plain = ran(base, tmp_path / "a", QZOTrainer, few)
    with pytest.warns(UserWarning, match="cuda_graph=True: the model is on 'cpu', a graph needs a CUDA") as said:
        assert_same(ran(base, tmp_path / "b", QZOTrainer, few, cuda_graph=True), plain)
    assert sum("cuda_graph" in str(one.message) for one in said) == 1
    assert "padding" not in read_whole(tmp_path / "a" / "journal.qzo")[0]["recipe"]
    with pytest.raises(ValueError, match="cuda_graph='auto': expected None"):
        ran(base, tmp_path / "c", cuda_graph="auto")


# ---------------------------------------------------------------------------------------------- batches


def test_padded_batches_have_the_losses_and_look_at_no_value(base):
    for lengths, width, read in (([12] * 4, 16, 15), ([20, 12, 8, 9], 24, 23), ([16, 3], 24, 16), ([3], 8, 7)):
        batch = collated(rows(lengths))
        found = padded(base, batch)
        assert found["input_ids"].shape == found["attention_mask"].shape == (len(lengths), width)
        assert found["targets"].shape == (len(lengths), read)
        assert found["attention_mask"].sum() == sum(lengths)
        with qzo.evaluating(base, qzo.Evaluations([1, 1], [0.3, -0.3])):
            want = losses(base, batch, 2)
            with graphs.capturing():
                got = OwnLosses(base, 2)(found)
        assert torch.allclose(got, want, rtol=1e-5)
        assert want[0] != want[1]


def test_few_labels_are_few_places_and_no_mask_is_one_of_ones(base):
    batch = collated(rows([20, 12]))
    batch["labels"][:, :-3] = -100
    del batch["attention_mask"]
    found = padded(base, batch)
    assert found["targets"].shape == (2, 8)
    assert found["attention_mask"].tolist() == [[1] * 20 + [0] * 4] * 2


def test_other_batches_stay_as_they_are(base):
    longest = base.config.max_position_embeddings
    batch = collated(rows([12, 9]))
    for other in (
        collated(rows([longest])),
        {**batch, "labels": torch.tensor([0, 1])},
        {**batch, "position_ids": torch.arange(12).repeat(2, 1)},
        {**batch, "attention_mask": torch.ones(2, 1, 12, 12)},
        {"inputs_embeds": torch.zeros(2, 12, 8), "labels": batch["labels"]},
    ):
        assert padded(base, other) == other
    assert padded(base, collated(rows([longest - 1])))["input_ids"].shape == (1, longest)
    with pytest.raises(ValueError, match="no position of the batch carries a label"):
        padded(base, {**batch, "labels": torch.full((2, 12), -100)})


def test_closures_of_one_model_are_the_same_to_a_graph(base):
    assert len({OwnLosses(base, 2), OwnLosses(base, 2), OwnLosses(base, 1), OwnLosses(copy.deepcopy(base), 2)}) == 3
