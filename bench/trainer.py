"""What transformers' Trainer costs a step: `python -m qzo.bench.trainer [--layers 8] [--steps 60] [--out FILE.jsonl]`.

The same batches through a bare loop (QZO.step, qzo.losses, a journal) and through QZOTrainer (the same losses, update
and journal, and transformers' own data loader, callbacks, schedule): a Llama of random weights, one thread, the two in
turn. Process time of a step, and of what is in it beside the losses and the update, which are the same code in both:
medians over the steps of all turns, the first steps of a turn left out. The overhead is the difference of the latter;
that of whole steps is smaller than the noise of the forwards.
"""

import argparse
import contextlib
import copy
import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from ..loss.losses import losses
from ..nn.choice import quantize_
from ..optim.optimizer import QZO
from ..trainer.mixin import QZOTrainer
from . import results
from .timing import machine

ROWS, TOKENS, WARM = 4, 32, 3


def model_of(blocks, hidden):
    """A quantized Llama of random weights."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1024,
    )
    return quantize_(LlamaForCausalLM(config), group_size=64).eval().requires_grad_(False)


def examples_of(count):
    """Rows of random tokens, all of them labels."""
    tokens = torch.randint(0, 1024, (count, TOKENS))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in tokens]


class Clock(TrainerCallback):
    """Process time at the end of each step, and of it what the losses and the update took."""

    def __init__(self):
        self.at, self.inside, self.total = [], [], 0.0

    def on_step_end(self, *_, **__):
        self.at.append(time.process_time())
        self.inside.append(self.total)

    def watch(self, optimizer):
        """Add up the time of what a step is made of: forwards and losses, journal and update."""
        for name in ("losses", "_finish"):
            vars(optimizer)[name] = functools.partial(self._timed, getattr(optimizer, name))

    def _timed(self, function, *args, **kwargs):
        begun = time.process_time()
        result = function(*args, **kwargs)
        self.total += time.process_time() - begun
        return result

    def steps(self):
        """(seconds, of them beside losses and update) of each step, from the end of one to the end of the next."""
        whole, inside = (
            [after - before for before, after in itertools.pairwise(times)] for times in (self.at, self.inside)
        )
        return [(all_of_it, all_of_it - of_it) for all_of_it, of_it in zip(whole, inside, strict=True)][WARM:]


def bare(model, examples, steps, folder):
    """Steps of a plain loop."""
    optimizer, clock = QZO(model, 2e-2, journal=f"{folder}/bare.qzo"), Clock()
    clock.watch(optimizer)
    for step in range(steps):
        rows = examples[step * ROWS : (step + 1) * ROWS]
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        optimizer.step(functools.partial(losses, model, batch, 2))
        clock.on_step_end()
    optimizer.close()
    return clock.steps()


class Watched(QZOTrainer):
    """A QZOTrainer whose optimizer a clock watches."""

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        self.clock.watch(optimizer)
        return optimizer


def trained(model, examples, steps, folder):
    """Steps of a QZOTrainer."""
    arguments = TrainingArguments(
        f"{folder}/trainer",
        learning_rate=2e-2,
        max_steps=steps,
        per_device_train_batch_size=ROWS,
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Watched(model, arguments, train_dataset=examples)
    trainer.clock = Clock()
    trainer.add_callback(trainer.clock)
    with contextlib.redirect_stdout(None):
        trainer.train()
    return trainer.clock.steps()


def measure(blocks=8, hidden=64, steps=40, turns=3):
    """One row of a results file; times in ms."""
    torch.manual_seed(0)
    model, examples = model_of(blocks, hidden), examples_of(steps * ROWS)
    found: dict[Callable[..., list[tuple[float, float]]], list[tuple[float, float]]] = {bare: [], trained: []}
    for _ in range(turns):
        for way, all_steps in found.items():
            with tempfile.TemporaryDirectory() as folder:
                all_steps += way(copy.deepcopy(model), examples, steps, folder)
    (loop_ms, loop_beside), (trainer_ms, trainer_beside) = (
        [1e3 * statistics.median(times) for times in zip(*all_steps, strict=True)] for all_steps in found.values()
    )
    return {
        "case": "a step of QZOTrainer beside the bare loop",
        "what": f"process time, median of {len(found[bare])} steps, {turns} turns of each way",
        "model": f"Llama, random weights, {blocks} blocks of {hidden}, 4 bits in groups of 64",
        "rows": ROWS,
        "tokens": TOKENS,
        "evaluations": 2,
        "loop_ms": round(loop_ms, 2),
        "trainer_ms": round(trainer_ms, 2),
        "loop_beside_ms": round(loop_beside, 2),
        "trainer_beside_ms": round(trainer_beside, 2),
        "overhead_ms": round(trainer_beside - loop_beside, 2),
        "overhead_of_50_ms": round((trainer_beside - loop_beside) / 50, 4),
        **machine("cpu"),
        "date": time.strftime("%Y-%m-%d"),
    }


def main(arguments=None):
    """Measure and print; append to the file."""
    parser = argparse.ArgumentParser(prog="python -m qzo.bench.trainer", description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=8, help="blocks of the model")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40, help="of each turn")
    parser.add_argument("--out", help="a JSONL file the row is appended to")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results.append(measure(options.layers, options.hidden, options.steps), options.out)


if __name__ == "__main__":
    main()
