"""gpu_check's comparison of a trainer with CUDA graphs and without, on a CPU: the stand-in's graphs serve."""

import re

import pytest
import torch

from qzo.bench import gpu_trainer
from qzo.optim.graph import Graphs
from tests.support import graphs, trainers
from tests.support.paths import ROOT

pytestmark = trainers.needs_accelerate
MODEL = ROOT / "tests" / "fixtures" / "gptqmodel-gptq-sym-g128"


def test_a_trainer_with_graphs_is_compared_with_one_without(monkeypatch):
    """Losses that graphs have otherwise are found."""
    graphs.stand_in(monkeypatch)
    pads = property(lambda self: True, lambda self, value: None)
    monkeypatch.setattr(gpu_trainer.QZOTrainer, "_pads", pads, raising=False)
    said = r"6 steps, same journal; \d+\.\d\d ms a step in 2 graphs, \d+\.\d\d ms without"
    assert re.fullmatch(said, gpu_trainer.compared(MODEL, "cpu", 6))
    wrong = torch.ones(2, dtype=torch.float64)
    monkeypatch.setattr(Graphs, "losses", lambda self, closure, batch, paired: wrong.clone())
    with pytest.raises(RuntimeError, match="the journals with and without graphs differ"):
        gpu_trainer.compared(MODEL, "cpu", 4)
