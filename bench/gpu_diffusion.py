"""Part "diffusion" of gpu_check.py: steps of Stable Diffusion 3.5 Large's transformer, random weights, paired.

Of each size the peak of a step by torch's allocator against what was predicted, seconds of a step, and the share of
the step that the modulations (adaLN's linears, one input row a sample) take by themselves.
"""

import time

import torch

from ..nn.layers import evaluating, layers
from ..optim.optimizer import QZO
from ..reports import memory, models
from ..system.memory import explain
from .results import NOT_THERE

CONFIG = "stabilityai-sd3.5-large"
SIZES = ((512, 1), (512, 8), (1024, 1), (1024, 8))  # pixels, samples
TURNS = 3


def diffusion(check):
    """A row of each size."""
    for resolution, samples in SIZES:
        case = f"{CONFIG} {samples} x {resolution} px"
        if check.left() < 25:
            check.note("diffusion", case, note="no time left")
            continue
        try:
            config = models.sized(models.read_config(CONFIG), resolution)
            load, empty = memory.random_model(config, None, "none", check.device, check.dtype)
        except ValueError as error:  # diffusers
            check.note("diffusion", case, note=f"{NOT_THERE[0]}: {error}")
            continue
        run = memory.Run(rows=samples, tokens=models.TEXT_TOKENS)
        predicted = memory.predict(empty, run, check.device, memory.this_chip())
        try:
            measured = memory.measure(load, run, check.device)
            seconds, share = timed(load(), run, check.device)
        except torch.OutOfMemoryError as error:
            check.note("diffusion", case, note=explain(error, "the next one is tried"))
            continue
        check.note(
            "diffusion",
            case,
            rows=samples,
            ms=1e3 * seconds,
            predicted=predicted,
            measured=measured,
            modulations=share,
            note=f"{measured['total'] / 1e9:.3f} GB, "
            f"{measured['total'] / predicted['total']:.4f} of what was predicted; "
            f"modulations {100 * share:.2f} % of the step",
        )


def timed(model, run, device):
    """(seconds of a step, the part of them that the modulations take when they run alone)."""
    batch = models.example_batch(model, run.rows, run.tokens, 1, device)
    optimizer = QZO(model, lr=1e-6, cuda_graph=False)
    step = least(lambda: optimizer.step(lambda: models.batch_losses(model, batch, 2)), device)
    modulations = [layer for name, layer in layers(model).items() if "norm" in name]
    inputs = [torch.randn(2 * run.rows, m.in_features, dtype=model.dtype, device=device) for m in modulations]

    def alone():
        with torch.no_grad(), evaluating(model, optimizer.evaluations()):
            for layer, x in zip(modulations, inputs, strict=True):
                layer(x)

    return step, least(alone, device) / step


def least(run, device):
    """Seconds of the fastest of TURNS calls, after one that is not counted."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for _ in range(TURNS + 1):
        wait()
        begun = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - begun)
    return min(times[1:])
