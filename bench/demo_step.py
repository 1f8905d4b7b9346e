"""What a step of the demo costs: `python -m qzo.bench.demo_step [--repeats 9] [--out FILE.jsonl]`.

A step is eight evaluations of sixteen headlines through the top blocks, and the update. Beside it stands a forward
of the same 128 rows through the same blocks with dense float32 linears: no noise, no codes, no update. The two are
taken in turn on one thread, in process time, so that what else the machine does changes their ratio little.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..checkpoints.load import from_pretrained
from ..checkpoints.tokenizer import load_tokenizer
from ..loss.sums import means
from ..optim.optimizer import QZO
from ..training import demo, loop
from ..training.settings import Settings
from . import results
from .study.methods import adapted

EXAMPLES = 64  # whose frozen blocks run once


class Dense(nn.Linear):
    """The linear that a QZOLinear stands for."""

    def __init__(self, layer: Any):
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.weight = nn.Parameter(layer.dequantize(), requires_grad=False)
        if layer.bias is not None:
            self.bias = nn.Parameter(layer.bias, requires_grad=False)


def measure(repeats: int) -> dict[str, Any]:
    """A row of a results file: medians of a step and of the dense forward in ms, and their ratio."""
    torch.set_num_threads(1)
    path, settings = demo.model_file(), Settings(train_layers=demo.TRAIN_LAYERS)
    model, tokenizer = from_pretrained(path, device="cpu"), load_tokenizer(path)
    prefix = loop.choose_layers(model, demo.TRAIN_LAYERS)
    task = loop.build_task(model, demo.headlines()[0][:EXAMPLES], tokenizer, settings, prefix)
    copies = settings.evaluations
    batch = task.batch(task.indices(0, settings.batch_size, 0), copies)
    optimizer = QZO(model, 1e-3, directions=settings.directions, one_sided=bool(settings.one_sided))
    step: list[float] = []
    dense: list[float] = []
    for _ in range(repeats + 1):
        step.append(milliseconds(lambda: optimizer.step(lambda: task.compiled_sums(batch, copies, centred=True))))
        with torch.no_grad(), adapted(model, Dense, 0):
            dense.append(milliseconds(lambda: means(task.compiled_sums(batch, copies, centred=True))))
    ours, theirs = (statistics.median(times[1:]) for times in (step, dense))  # the first ones warm up
    return {
        "case": "a step of the demo",
        "rows": len(batch["input_ids"]),
        "tokens": batch["input_ids"].shape[1],
        "step_ms": round(ours, 1),
        "dense_ms": round(theirs, 1),
        "ratio": round(ours / theirs, 2),
        "repeats": repeats,
        "versions": {"torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }


def milliseconds(call: Callable[[], object]) -> float:
    """Process time of a call."""
    begun = time.process_time()
    call()
    return 1e3 * (time.process_time() - begun)


def main(arguments: list[str] | None = None) -> None:
    """Measure and print; append to the file."""
    parser = argparse.ArgumentParser(prog="python -m qzo.bench.demo_step", description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", help="a JSONL file the row is appended to")
    options = parser.parse_args(arguments)
    results.append(measure(options.repeats), options.out)


if __name__ == "__main__":
    main()
