"""The digits: the committed base learns a 9 by forward passes; what its scripts share."""

import importlib

import pytest
import torch

from tests.support.paths import ROOT

FOLDER = ROOT / "examples/digits"


@pytest.fixture(scope="module")
def scripts():
    """(digits, train_base, tune), the modules."""
    for package in ("sklearn", "diffusers"):
        pytest.importorskip(package, reason=f"{package} is of the extra 'test'")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield [importlib.import_module(name) for name in ("digits", "train_base", "tune")]


def test_a_few_steps_teach_the_base_something_about_nines(scripts):
    """On held-out nines, paired on the same rows: beyond what their number leaves to chance."""
    digits, _, tune = scripts
    training, held_out = digits.load()
    nines = held_out.where(held_out.labels == digits.UNSEEN)
    fixed = tune.fixed_rows(digits.LAW.times, len(nines.labels), tune.DRAWS, nines.pictures.shape[1:])
    rows = tune.Rows(fixed.times, fixed.noise, torch.zeros(len(fixed.times), dtype=torch.bool))
    model = digits.load_base()
    before = digits.losses(model, nines, rows)
    tune.train(model, training, seed=0, steps=8)
    found = tune.paired_difference(before, digits.losses(model, nines, rows), tune.DRAWS)
    assert found.z < -5, found


def test_the_base_is_never_shown_a_nine(scripts):
    digits, train_base, _ = scripts
    training, held_out = digits.load()
    assert train_base.shown(training).labels.unique().tolist() == list(range(9))
    assert len(training.labels) + len(held_out.labels) == 1797
    assert not {tuple(p.flatten().tolist()) for p in training.pictures} & {
        tuple(p.flatten().tolist()) for p in held_out.pictures
    }


def test_a_base_comes_back_as_it_was_written(scripts, tmp_path):
    digits, train_base, _ = scripts
    base = digits.quantized(train_base.train(train_base.shown(digits.load()[0]), steps=1))
    digits.save_base(base, tmp_path / "base.safetensors")
    again = digits.load_base(tmp_path / "base.safetensors")
    noisy, times, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 4, 9])
    assert torch.equal(digits.velocity(base, noisy, times, labels), digits.velocity(again, noisy, times, labels))
    assert digits.BASE.stat().st_size < 2e6


def test_samples_follow_the_flow_to_its_end(scripts):
    """A velocity that leads straight to a prompt's own picture gets there, and with guidance as far beyond it."""
    digits, *_ = scripts
    ends = torch.linspace(-1, 1, 11)

    def straight(hidden_states, timestep, encoder_hidden_states, **_):
        label = torch.cdist(encoder_hidden_states[:, 0], digits.prompts()).argmin(1)
        return ((hidden_states - ends[label].view(-1, 1, 1, 1)) / (timestep / 1000).view(-1, 1, 1, 1),)

    labels = torch.tensor([3, 9, 0])
    for guidance in (1.0, 2.0):
        found = digits.sample(straight, labels, steps=5, guidance=guidance)
        want = ends[digits.EMPTY] + guidance * (ends[labels] - ends[digits.EMPTY])
        torch.testing.assert_close(found, want.view(-1, 1, 1, 1).expand_as(found), atol=1e-5, rtol=1e-5)
