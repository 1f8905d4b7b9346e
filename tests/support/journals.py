"""Journals of runs that began, and the golden ones: written by the first version 1 and kept for ever."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

import qzo
from qzo.optim.journal import Record, read
from tests.support.paths import ROOT

GOLDEN = sorted((ROOT / "tests/fixtures/journals").glob("v1-*.qzo"))


def read_whole(path: str | Path) -> tuple[dict[str, Any], list[list[Record]], int]:
    """(header, steps, where they end) of a journal that has a whole header."""
    found = read(path)
    assert found is not None, f"{path} has no whole header"
    return found


def golden_model() -> nn.Module:
    """The base of the golden journals: two quantized layers whose weights are a formula, so the same on any machine."""
    model = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(((torch.arange(weight.numel()) * 7919 % 251 - 125) / 256).view_as(weight))
    return qzo.quantize_(model, group_size=32)


def write_golden(folder: Path) -> None:
    """How the golden journals were made; those in fixtures/ are never written again."""
    runs: dict[str, tuple[dict[str, Any], list[list[float]]]] = {
        "v1-ih4.qzo": (
            {"lr": 0.05, "noise": "ih4", "directions": 2, "seed": -3, "recipe": {"batch_size": 4, "data": "sha256:0"}},
            [[1.0, 0.75, 2.0, 2.125], [0.5, float("nan"), 1.0, 1.0], [0.1, 0.7, 0.3, 0.2], [9.0, 1.0, 0.5, 0.5]],
        ),
        "v1-absolute.qzo": (
            {"lr": 1e-4, "relative": False, "clip": float("inf"), "floor": 0.0, "seed": (1 << 64) - 1},
            [[1.0, 0.5], [0.25, 0.5], [float("inf"), 0.5]],
        ),
    }
    for name, (settings, losses) in runs.items():
        optimizer = qzo.QZO(golden_model(), journal=folder / name, **settings)
        for given in losses:
            optimizer.step(lambda given=given: torch.tensor(given))
        optimizer.close()
