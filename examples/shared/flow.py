"""A small flow-matching transformer of Stable Diffusion 3's kind on pixels: what the digits and the emoji share.

A prompt is a vector [D] that stands for a text encoder's output; it is the only token of text, and the pooled one.
"""

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import SD3Transformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import qzo
from qzo.diffusion.metrics import fixed_rows, paired_difference
from qzo.diffusion.objective import FlowLaw, Rows, draw, mixed, row_losses
from qzo.optim.step import evaluation_count

LAW = FlowLaw(mean=0.5)


class Prompted(NamedTuple):
    """pictures : float32 [N, C, H, W] in [-1, 1]; prompts : float32 [N, D]"""

    pictures: torch.Tensor
    prompts: torch.Tensor


def velocity(model: nn.Module, noisy: torch.Tensor, times: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """What the model takes n - x0 for, [R, C, H, W]; noisy of that shape, times [R], prompts [R, D]."""
    return model(
        hidden_states=noisy,
        timestep=1000 * times,
        encoder_hidden_states=prompts[:, None],
        pooled_projections=prompts,
        return_dict=False,
    )[0]


def losses(model: nn.Module, data: Prompted, rows: Rows) -> torch.Tensor:
    """float32 [R]: the loss of each row, of one or several draws of each picture."""
    draws = len(rows.times) // len(data.pictures)
    noisy, target = mixed(data.pictures.repeat_interleave(draws, 0), rows.noise, rows.times)
    return row_losses(velocity(model, noisy, rows.times, data.prompts.repeat_interleave(draws, 0)), target)


def compared(before: torch.Tensor, after: torch.Tensor, draws: int) -> dict[str, Any]:
    """A base's mean loss on rows of so many draws a picture, and its change, as a line of a results file has it."""
    found = paired_difference(before, after, draws)
    return {"before": float(before.mean()), **found._asdict(), "z": round(found.z, 2)}


def rows_to_measure(pictures: torch.Tensor, draws: int) -> Rows:
    """The same rows in every run, so many of each picture, as many in each stratum of times."""
    fixed = fixed_rows(LAW.times, len(pictures), draws, tuple(pictures.shape[1:]))
    return Rows(fixed.times, fixed.noise, torch.zeros(len(fixed.times), dtype=torch.bool))


@torch.no_grad()
def sample(
    model: Any, prompts: torch.Tensor, empty: torch.Tensor, seed: int = 0, steps: int = 20, guidance: float = 2.0
) -> torch.Tensor:
    """Pictures [N, C, H, W] of prompts [N, D]: Euler's method from noise to s = 0, with classifier-free guidance.

    empty : [D], the prompt that asks for nothing
    """
    size, channels = model.config["sample_size"], model.config["in_channels"]
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(len(prompts), channels, size, size, generator=generator)
    asked = torch.cat([prompts, empty.expand_as(prompts)])
    times = torch.linspace(1, 0, steps + 1)
    for now, then in itertools.pairwise(times):
        found, plain = velocity(model, pictures.repeat(2, 1, 1, 1), now.expand(len(asked)), asked).chunk(2)
        pictures = pictures + (then - now) * (plain + guidance * (found - plain))
    return pictures


# ------------------------------------------------------------------------------------------------------------- the base


class BaseRecipe(NamedTuple):
    """Of the base's training: AdamW, 100 steps of warm-up, then a cosine that reaches 0 after `period` steps.

    dropout : the share of rows with the empty prompt, which guidance needs
    """

    config: dict[str, Any]  # of SD3Transformer2DModel
    steps: int
    period: int
    batch: int = 128
    learning_rate: float = 2e-3
    dropout: float = 0.1


def train_base(recipe: BaseRecipe, data: Prompted, empty: torch.Tensor, steps: int | None = None) -> nn.Module:
    """The float base after so many steps (None: the recipe's) on the flow-matching loss; tells how it goes."""
    torch.manual_seed(0)
    model: Any = SD3Transformer2DModel(**recipe.config)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=1e-2)
    started, average, batch = time.process_time(), 1.0, recipe.batch
    steps = recipe.steps if steps is None else steps
    for step in range(steps):
        rate = min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / recipe.period))
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * rate
        some = torch.randint(len(data.pictures), (batch,))
        noise = torch.randn(batch, *data.pictures.shape[1:])
        times = LAW.times((torch.arange(batch) + torch.rand(batch)) / batch)  # stratified
        dropped = torch.rand(batch) < recipe.dropout
        prompts = torch.where(dropped[:, None], empty, data.prompts[some])
        loss = losses(model, Prompted(data.pictures[some], prompts), Rows(times, noise, dropped)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average += 0.02 * (loss.item() - average)
        if step % 100 == 99:
            spent = time.process_time() - started
            print(f"step {step + 1} of {steps}: loss {average:.3f}, {spent:.0f} s of a core", flush=True)
    return model


def quantized(model: nn.Module, group: int) -> nn.Module:
    """The model with every Linear in 4 bits, in place; nothing of it takes a gradient."""
    return qzo.quantize_(model.requires_grad_(False), group_size=group, skip=()).eval()


def save_base(model: Any, path: Path) -> None:
    """Codes, scales (float16 already, as quantize_ rounds them) and dense tensors, and the config they belong to."""
    tensors = {name: t.half() if name.endswith("scales") else t for name, t in model.state_dict().items()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, {"config": model.to_json_string()})


def load_base(path: Path, group: int) -> nn.Module:
    """A committed base in 4 bits, quantized in groups of so many weights."""
    with safe_open(path, "pt") as file:
        model = SD3Transformer2DModel.from_config(json.loads(file.metadata()["config"]))
    model = quantized(model, group)
    model.load_state_dict(load_file(path))
    return model


# ----------------------------------------------------------------------------------------------------------- the tuning


Batch = Callable[[torch.Generator], Prompted]  # draws a step's pictures


class Recipe(NamedTuple):
    """Of a tuning. learning_rate : relative to the scales; falls linearly to a tenth. batch : rows of a step"""

    steps: int
    batch: int
    learning_rate: float
    directions: int = 1  # of QZO
    one_sided: bool = False

    @property
    def evaluations(self) -> int:
        """Losses of a step."""
        return evaluation_count(self._asdict())


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is trained: losses(model, data, rows) -> [R], of rows whose times have a law."""

    losses: Callable[[nn.Module, Prompted, Rows], torch.Tensor] = losses
    law: FlowLaw = LAW

    def steps(self, recipe: Recipe, batch: Batch, seed: int) -> Iterator[tuple[int, float, Prompted, Rows]]:
        """(number, learning rate, pictures, rows) of each step: every method that is compared sees the same."""
        generator = torch.Generator().manual_seed(seed)
        for step in range(recipe.steps):
            data = batch(generator)
            rows = draw(self.law, seed, step, recipe.batch, data.pictures.shape[1:])
            yield step, recipe.learning_rate * (1 - 0.9 * step / recipe.steps), data, rows


def tune(
    model: nn.Module, recipe: Recipe, batch: Batch, seed: int, objective: Objective = Objective()
) -> list[tuple[int, float]]:
    """QZO on the scales of every layer: [(step, mean loss)], every 50 steps."""
    optimizer = qzo.QZO(
        model, recipe.learning_rate, directions=recipe.directions, one_sided=recipe.one_sided, seed=seed
    )
    evaluations, curve = recipe.evaluations, []
    for step, rate, *drawn in objective.steps(recipe, batch, seed):
        optimizer.param_groups[0]["lr"] = rate
        data, rows = (type(part)(*qzo.pair(tuple(part), evaluations)) for part in drawn)
        loss = optimizer.step(lambda d=data, r=rows: objective.losses(model, d, r).view(evaluations, -1).mean(1))
        if step % 50 == 49:
            curve.append((step + 1, round(float(loss), 4)))
    return curve


def first_order(
    model: nn.Module, parameters: list[nn.Parameter], recipe: Recipe, batch: Batch, seed: int
) -> list[tuple[int, float]]:
    """Adam on the same steps' rows: [(step, loss)], every 50 steps."""
    optimizer = torch.optim.Adam(parameters, recipe.learning_rate)
    curve = []
    for step, rate, data, rows in Objective().steps(recipe, batch, seed):
        optimizer.param_groups[0]["lr"] = rate
        loss = losses(model, data, rows).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 49:
            curve.append((step + 1, round(loss.item(), 4)))
    return curve
