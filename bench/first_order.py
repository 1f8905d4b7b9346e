"""What gradients reach on the demo's scales: `python -m qzo.bench.first_order [--seed 0] [--out FILE.jsonl]`.

The demo's model, rows, trained layers and batches (demo.py), but the scales are trained by Adam with gradients of the
dequantized weights: the upper bound beside which the README puts the zeroth-order figures. Each scale is written as
itself times a factor that starts at 1, as relative perturbations have it.
"""

import argparse
import json
import time

import torch
from torch.nn import functional

from ..checkpoints.load import from_pretrained
from ..checkpoints.tokenizer import load_tokenizer
from ..loss.losses import option_scores
from ..nn.layers import layers
from ..training import demo
from ..training import loop as train
from ..training.settings import Settings

STEPS = 40
BATCH = 32
LEARNING_RATE = 3e-3  # relative, falling linearly to a tenth


class Differentiable(torch.nn.Module):
    """A QZOLinear whose weight, float32 [N, K], is kept, and multiplied by one factor [N, G] per scale."""

    weight: torch.Tensor

    def __init__(self, layer):
        super().__init__()
        self.register_buffer("weight", layer.dequantize())
        self.bias, self.group_size = layer.bias, layer.group_size
        self.factor = torch.nn.Parameter(torch.ones(layer.out_features, layer.in_features // layer.group_size))

    def forward(self, x):
        """x [.., K] -> [.., N]."""
        return functional.linear(x, self.weight * self.factor.repeat_interleave(self.group_size, 1), self.bias)


def run(seed=0, say=print):
    """The results as one row of a results file."""
    started = time.perf_counter()
    training, held_out = demo.headlines()
    settings = Settings(max_steps=STEPS, seed=seed, train_layers=demo.TRAIN_LAYERS, batch_size=BATCH)
    path = demo.model_file()
    model, tokenizer = from_pretrained(path, device="cpu"), load_tokenizer(path)
    prefix = train.choose_layers(model, demo.TRAIN_LAYERS)
    task = train.build_task(model, training[: demo.TRAIN_ROWS], tokenizer, settings, prefix)
    test = train.build_task(model, held_out, tokenizer, settings, prefix)
    before = test.evaluate()
    factors = []
    for name, layer in layers(model).items():
        parent, _, child = name.rpartition(".")
        replaced = Differentiable(layer)
        setattr(model.get_submodule(parent), child, replaced)
        factors.append(replaced.factor)
    optimizer = torch.optim.Adam(factors, lr=LEARNING_RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - 0.9 * step / STEPS)
        batch = task.batch(task.indices(step, BATCH, seed), 1)
        assert prefix is not None
        with prefix.skipped(batch["states"]):
            loss = functional.cross_entropy(option_scores(model, batch), batch["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        say(f"step {step + 1} of {STEPS}: loss {loss.item():.3f}")
    with torch.no_grad():
        tuned = test.evaluate()
    return {
        "case": "first-order Adam on the demo's scales",
        "zero_shot": before,
        "tuned": tuned,
        "steps": STEPS,
        "batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        "scales": sum(f.numel() for f in factors),
        "forward_rows": STEPS * BATCH,
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {"torch": torch.__version__},
    }


def main(arguments=None):
    """Run and print; append to the file."""
    parser = argparse.ArgumentParser(prog="python -m qzo.bench.first_order", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="a JSONL file the row is appended to")
    options = parser.parse_args(arguments)
    line = json.dumps(run(options.seed))
    print(line)
    if options.out:
        with open(options.out, "a", encoding="utf-8") as file:
            print(line, file=file)


if __name__ == "__main__":
    main()
