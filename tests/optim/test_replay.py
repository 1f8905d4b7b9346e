"""A journal applied to the model that it was written on: how far, to which bits, and which journals are refused."""

import json
import warnings

import pytest
import torch
from torch import nn

import qzo
from qzo.nn.layers import arena_of
from qzo.optim.journal import Journal, JournalError, Record
from qzo.optim.replay import journal_header, model_fields, replay
from tests.support.close import assert_same_bits

GROUP = {
    "noise": "ih4",
    "relative": True,
    "sharing": "group",
    "eps": 1e-2,
    "clip": 5.0,
    "directions": 2,
    "seed": 3,
    "floor": 2.0**-24,
}


def two_layers(seed=0, width=64):
    torch.manual_seed(seed)
    return qzo.quantize_(nn.Sequential(nn.Linear(96, width), nn.ReLU(), nn.Linear(width, 32)), group_size=32)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(journal of four steps, the second skipped; the arena after each step, the first entry before all)."""
    model, path = two_layers(), tmp_path_factory.mktemp("run") / "j"
    optimizer = qzo.QZO(model, lr=0.05, noise="ih4", directions=2, journal=path)
    arenas = [arena_of(model).data.clone()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the loss that is none
        for first in (1.0, float("nan"), 2.0, 0.5):
            optimizer.step(lambda first=first: torch.tensor([first, 0.9, 0.3, 0.5]))
            arenas.append(arena_of(model).data.clone())
    optimizer.close()
    return path, arenas


@pytest.mark.parametrize("until", [None, 0, 1, 2, 3, 4, 9])
def test_it_ends_in_the_bits_that_the_run_had_after_so_many_steps(run, until):
    path, arenas = run
    wanted = min(4 if until is None else until, 4)
    model = two_layers()
    assert replay(model, path, until) == wanted, "a skipped step counts"
    assert_same_bits(arena_of(model).data, arenas[wanted])
    assert len({tuple(arena.tolist()) for arena in arenas}) == 4, "all steps but the skipped one move scales"


def test_the_journal_is_only_read(run):
    before = run[0].read_bytes()
    replay(two_layers(), run[0])
    assert run[0].read_bytes() == before


def test_only_the_layers_that_trained_move(tmp_path):
    model, path = two_layers(), tmp_path / "j"
    qzo.train_only_(model, lambda name: name == "2")
    optimizer = qzo.QZO(model, lr=0.05, journal=path)
    optimizer.step(lambda: torch.tensor([1.0, 0.5]))
    optimizer.close()
    with pytest.raises(JournalError, match="0 trains here, which did not in its run"):
        replay(two_layers(), path)
    again = two_layers()
    qzo.train_only_(again, lambda name: name == "2")
    replay(again, path)
    assert_same_bits(again[2].read_scales(), model[2].read_scales())
    assert_same_bits(again[0].read_scales(), two_layers()[0].read_scales())


def test_a_step_that_was_skipped_moves_nothing_whatever_its_records_hold(tmp_path):
    model = two_layers()
    journal = Journal.create(tmp_path / "j", journal_header(model, GROUP))
    journal.append([Record(0, j, 5 + j, 0.25, 1.0, 0.5, True) for j in range(2)])
    journal.close()
    assert replay(model, tmp_path / "j") == 1
    assert_same_bits(arena_of(model).data, arena_of(two_layers()).data)


# ---------------------------------------------------------------------------------------------- refused


def test_there_has_to_be_a_journal_with_a_header(run, tmp_path):
    with pytest.raises(FileNotFoundError):
        replay(two_layers(), tmp_path / "none")
    (tmp_path / "cut").write_bytes(run[0].read_bytes()[:30])
    with pytest.raises(JournalError, match="cut has no whole header: the run ended before its first step"):
        replay(two_layers(), tmp_path / "cut")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: two_layers(seed=1), r"belongs to another model, .*codes, zero points or scales are not"),
        (lambda: two_layers(width=32), "0 has 64 rows of 3 scales there, 32 of 3 here"),
        (lambda: two_layers()[2:], "its run trained 0, which does not train here"),
    ],
)
def test_another_model(run, model, message):
    model = model()
    before = qzo.scales(model)
    with pytest.raises(JournalError, match=message):
        replay(model, run[0])
    for name, scales in qzo.scales(model).items():
        assert_same_bits(scales, before[name])


def test_a_model_that_has_been_tuned_is_another(run):
    model = two_layers()
    replay(model, run[0])
    with pytest.raises(JournalError, match="or this model is already tuned"):
        replay(model, run[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"law": "ih4/99"}, "uses noise law 'ih4/99', this qzo has 'ih4/1'"),
        ({"noise": "cauchy", "law": "cauchy/1"}, "uses noise law 'cauchy/1', this qzo has None"),
        ({"sharing": "row"}, "uses noise law 'ih4/1', this qzo has 'ih4-row/1'"),
    ],
)
def test_a_noise_law_that_this_version_lacks(tmp_path, change, message):
    """Said before anything moves: its steps would be other ones."""
    model = two_layers()
    journal = Journal.create(tmp_path / "j", journal_header(model, GROUP) | change)
    journal.append([Record(0, j, 5 + j, 0.1, 1.0, 0.5, False) for j in range(2)])
    journal.close()
    before = arena_of(model).data.clone()
    with pytest.raises(JournalError, match=message):
        replay(model, tmp_path / "j")
    assert_same_bits(arena_of(model).data, before)


# ---------------------------------------------------------------------------------------------- the header


def test_the_header_holds_what_a_replay_needs_and_is_json():
    model = two_layers()
    header = journal_header(model, GROUP | {"lr": 0.1, "step": 4}, {"batch_size": 8})
    assert json.loads(json.dumps(header)) == header
    assert {key: header[key] for key in GROUP} == GROUP
    assert (header["law"], header["recipe"]) == ("ih4/1", {"batch_size": 8})
    assert header["arena"] == {"0": [0, 3, 64], "2": [64, 2, 32]}
    assert {"qzo", "torch", "python"} <= set(header["versions"])
    assert not {"lr", "step"} & set(header), "the rate is in what was applied, the step in the records"
    assert journal_header(model, GROUP)["recipe"] == {}


def test_the_digest_is_of_all_that_was_quantized():
    def digest(change=lambda model: None):
        model = two_layers()
        change(model)
        return model_fields(model, arena_of(model))["digest"]

    def freeze_and_change(model):
        qzo.train_only_(model, lambda name: name == "0")
        assert digest(lambda model: qzo.train_only_(model, lambda name: name == "0")) == digest()
        model[2].codes[0].bitwise_xor_(1)

    changes = {
        "a code": lambda model: model[0].codes[0].bitwise_xor_(1),
        "a scale": lambda model: arena_of(model).data[5].mul_(1 + 2**-23),
        "a code of a layer that does not train": freeze_and_change,
    }
    found = {name: digest(change) for name, change in changes.items()}
    assert digest() == digest()
    assert digest().startswith("sha256:")
    assert len({digest(), *found.values()}) == 1 + len(changes)
    model = two_layers()
    with torch.no_grad():
        model[0].bias.add_(1)
    assert model_fields(model, arena_of(model))["digest"] == digest(), "biases never train"
