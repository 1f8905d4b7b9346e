"""What an eps costs the estimate, for each noise law and type of activations: `python -m qzo.bench.eps`.

The demo's model and one batch of its headlines. (L+ - L-) / (2 eps) along some directions stands beside what it
estimates: the product of the loss's gradient with the direction, in float32 by a backward pass. One-sided, L+ / eps
less its mean over the directions stands beside the product less its mean. A large eps leaves the curve of the loss in
them, a small one the rounding of the activations.
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from ..checkpoints.load import from_pretrained
from ..checkpoints.tokenizer import load_tokenizer
from ..kernels.noise import VERSIONS, noise, step_seed
from ..nn.evaluations import Evaluations
from ..nn.layers import evaluating, layers, scale_index
from ..reports.signal import rounding
from ..training import demo, loop
from ..training.settings import Settings
from . import results
from .study.methods import Differentiable, adapted

EPS = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
ACTIVATIONS = ("float32", "float16", "bfloat16")
DIRECTIONS = 12


def measure(directions: int = DIRECTIONS) -> Iterator[dict[str, Any]]:
    """A row for each law, type and eps as it comes: the RMS error of the derivatives over their RMS, and their cosine,
    of pairs and one-sided."""
    path, settings = demo.model_file(), Settings(train_layers=demo.TRAIN_LAYERS)
    model, tokenizer = from_pretrained(path, device="cpu"), load_tokenizer(path)
    prefix = loop.choose_layers(model, demo.TRAIN_LAYERS)
    task = loop.build_task(model, demo.headlines()[0][:64], tokenizer, settings, prefix)
    batch = task.batch(task.indices(0, settings.batch_size, 0), 1)
    gradient, seeds = gradients(task, batch), [step_seed(0, 0, j) for j in range(directions)]
    for law in VERSIONS:
        exact = torch.stack([product(model, gradient, law, seed) for seed in seeds])
        for activations in ACTIVATIONS:
            for eps in EPS:
                if activations == "float32":
                    found = losses(task, batch, law, seeds, eps)
                else:
                    with rounding(model, activations):
                        found = losses(task, batch, law, seeds, eps)
                yield {
                    "case": "error of the derivative",
                    "noise": law,
                    "activations": activations,
                    "eps": eps,
                    **beside((found[0] - found[1]) / (2 * eps), exact),
                    "one_sided": beside((found[0] - found[0].mean()) / eps, exact - exact.mean()),
                    "directions": directions,
                    "batch": len(batch["label"]),
                    "model": f"{path.name}, top {demo.TRAIN_LAYERS} blocks",
                    "versions": {"torch": torch.__version__},
                    "date": time.strftime("%Y-%m-%d"),
                }


def beside(found: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """The RMS error of estimates over the RMS of what they estimate, and their cosine; both float64 [J]."""
    return {
        "error": float((found - exact).norm() / exact.norm()),
        "cosine": float(functional.cosine_similarity(found, exact, dim=0)),
    }


def gradients(task: Any, batch: Any) -> dict[str, torch.Tensor]:
    """Of the loss, by each layer's multipliers of its scales: name -> float32 [N, G]."""
    names = list(layers(task.model))
    with adapted(task.model, Differentiable, 0) as factors:
        loss = functional.cross_entropy(task.scores_of(batch), batch["label"])
        return dict(zip(names, torch.autograd.grad(loss, factors), strict=True))


def product(model: Any, gradient: dict[str, torch.Tensor], law: str, seed: int) -> torch.Tensor:
    """The gradient times the direction of a seed, float64: what the difference of two losses estimates."""
    total = torch.zeros((), dtype=torch.float64)
    for name, index in scale_index(model).items():
        total += (gradient[name].double() * noise(law, seed, index).T).sum()
    return total


def losses(task: Any, batch: Any, law: str, seeds: list[int], eps: float) -> torch.Tensor:
    """L+ and L- along each seed's direction, float64 [2, len(seeds)]."""
    found = []
    for coef in (eps, -eps):
        for seed in seeds:
            with torch.no_grad(), evaluating(task.model, Evaluations([seed], [coef], law)):
                found.append(functional.cross_entropy(task.scores_of(batch).double(), batch["label"]))
    return torch.stack(found).reshape(2, -1)


def main(arguments: list[str] | None = None) -> None:
    """Measure; print each row, and append it to the file."""
    parser = argparse.ArgumentParser(prog="python -m qzo.bench.eps", description=__doc__.partition("\n")[0])
    parser.add_argument("--directions", type=int, default=DIRECTIONS, help=f"(default {DIRECTIONS})")
    parser.add_argument("--out", help="a JSONL file the rows are appended to")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for row in measure(options.directions):
        results.append(row, options.out)


if __name__ == "__main__":
    main()
