"""Digits of 8 x 8 pixels (scikit-learn's), what stands for their names, and a network that reads them.

What train_base.py and tune.py share.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from examples.shared.flow import Prompted

BASE = Path(__file__).parent / "base.safetensors"
UNSEEN = 9  # what the base is never shown
EMPTY = 10  # the prompt that asks for nothing
GROUP = 32


class Digits(NamedTuple):
    """pictures : float32 [N, 1, 8, 8] in [-1, 1]; labels : int64 [N]"""

    pictures: torch.Tensor
    labels: torch.Tensor

    def where(self, kept: torch.Tensor) -> "Digits":
        """Those that a mask [N] keeps."""
        return Digits(self.pictures[kept], self.labels[kept])

    def prompted(self) -> Prompted:
        """With the prompt of each."""
        return Prompted(self.pictures, prompts()[self.labels])


def load() -> tuple[Digits, Digits]:
    """(70 % for training, the rest), the same in every run."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    pictures = torch.tensor(found.images, dtype=torch.float32)[order, None] / 8 - 1
    labels = torch.tensor(found.target, dtype=torch.int64)[order]
    count = len(order) * 7 // 10
    return Digits(pictures[:count], labels[:count]), Digits(pictures[count:], labels[count:])


def prompts() -> torch.Tensor:
    """float32 [11, 32]: what stands for a text encoder's output, one fixed random vector a digit, and the empty one."""
    return torch.randn(11, 32, generator=torch.Generator().manual_seed(1))


# ----------------------------------------------------------------------------------------------------------- the reader


class Reader(nn.Module):
    """Names the digit in a picture; its 64 features serve KID."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(512, 64),
            nn.ReLU(),
        )
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(64, 10))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """[N, 10] scores of pictures [N, 1, 8, 8]."""
        return self.head(self.features(pictures))

    @torch.no_grad()
    def read(self, pictures: torch.Tensor) -> torch.Tensor:
        """int64 [N]: the digit in each picture."""
        return self(pictures).argmax(1)


def trained_reader(training: Digits, steps: int = 1000) -> Reader:
    """Trained on real digits of all ten classes from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reader = Reader()
        optimizer = torch.optim.AdamW(reader.parameters(), 2e-3, weight_decay=1e-2)
        for _ in range(steps):
            some = torch.randint(len(training.labels), (128,))
            noisy = training.pictures[some] + 0.1 * torch.randn(128, 1, 8, 8)
            loss = functional.cross_entropy(reader(noisy), training.labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return reader.eval().requires_grad_(False)
