"""Digits of 8 x 8 pixels (scikit-learn's), a flow-matching transformer that draws them, and a network that reads them.

What train_base.py and tune.py share.
"""

import itertools
import json
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import SD3Transformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import qzo
from qzo.diffusion.objective import FlowLaw, Rows, mixed, row_losses

BASE = Path(__file__).parent / "base.safetensors"
UNSEEN = 9  # what the base is never shown
EMPTY = 10  # the prompt that asks for nothing
LAW = FlowLaw(mean=0.5)
GROUP = 32
CONFIG = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 3,
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "caption_projection_dim": 96,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 4,
}


class Digits(NamedTuple):
    """pictures : float32 [N, 1, 8, 8] in [-1, 1]; labels : int64 [N]"""

    pictures: torch.Tensor
    labels: torch.Tensor

    def where(self, kept: torch.Tensor) -> "Digits":
        """Those that a mask [N] keeps."""
        return Digits(self.pictures[kept], self.labels[kept])


def load() -> tuple[Digits, Digits]:
    """(70 % for training, the rest), the same in every run."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    pictures = torch.tensor(found.images, dtype=torch.float32)[order, None] / 8 - 1
    labels = torch.tensor(found.target, dtype=torch.int64)[order]
    count = len(order) * 7 // 10
    return Digits(pictures[:count], labels[:count]), Digits(pictures[count:], labels[count:])


# ------------------------------------------------------------------------------------------------------------ the model


def prompts() -> torch.Tensor:
    """float32 [11, 32]: what stands for a text encoder's output, one fixed random vector a digit, and the empty one."""
    return torch.randn(11, 32, generator=torch.Generator().manual_seed(1))


def velocity(model: nn.Module, noisy: torch.Tensor, times: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What the model takes n - x0 for, [R, 1, 8, 8]; noisy of that shape, times [R], labels int64 [R]."""
    prompt = prompts()[labels]
    return model(
        hidden_states=noisy,
        timestep=1000 * times,
        encoder_hidden_states=prompt[:, None],
        pooled_projections=prompt,
        return_dict=False,
    )[0]


def losses(model: nn.Module, digits: Digits, rows: Rows) -> torch.Tensor:
    """float32 [R]: the loss of each row, of one or several draws of each picture."""
    draws = len(rows.times) // len(digits.labels)
    noisy, target = mixed(digits.pictures.repeat_interleave(draws, 0), rows.noise, rows.times)
    return row_losses(velocity(model, noisy, rows.times, digits.labels.repeat_interleave(draws)), target)


@torch.no_grad()
def sample(
    model: nn.Module, labels: torch.Tensor, seed: int = 0, steps: int = 20, guidance: float = 2.0
) -> torch.Tensor:
    """Pictures [N, 1, 8, 8] of labels int64 [N]: Euler's method from noise to s = 0, with classifier-free guidance."""
    pictures = torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    asked = torch.cat([labels, torch.full_like(labels, EMPTY)])
    times = torch.linspace(1, 0, steps + 1)
    for now, then in itertools.pairwise(times):
        found, plain = velocity(model, pictures.repeat(2, 1, 1, 1), now.expand(len(asked)), asked).chunk(2)
        pictures = pictures + (then - now) * (plain + guidance * (found - plain))
    return pictures


def quantized(model: nn.Module) -> nn.Module:
    """The model with every Linear in 4 bits, in place; nothing of it takes a gradient."""
    return qzo.quantize_(model.requires_grad_(False), group_size=GROUP, skip=()).eval()


def save_base(model: nn.Module, path: Path = BASE) -> None:
    """Codes, scales (float16 already, as quantize_ rounds them) and dense tensors, and the config they belong to."""
    tensors = {name: t.half() if name.endswith("scales") else t for name, t in model.state_dict().items()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, {"config": json.dumps(CONFIG)})


def load_base(path: Path = BASE) -> nn.Module:
    """The committed base in 4 bits."""
    with safe_open(path, "pt") as file:
        model = SD3Transformer2DModel(**json.loads(file.metadata()["config"]))
    model = quantized(model)
    model.load_state_dict(load_file(path))
    return model


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
