"""Of part "e2e" of gpu_check.py: QZOTrainer with CUDA graphs and without, `python -m qzo.bench.gpu_trainer MODEL cuda`.

A module of its own, as nothing else there has to import transformers' Trainer.
"""

import contextlib
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainingArguments

import qzo

from ..trainer.mixin import JOURNAL, QZOTrainer


class Clock(TrainerCallback):
    """Wall time at the end of each step, which has read its losses back by then."""

    def __init__(self):
        self.at = []

    def on_step_end(self, *_, **__):
        self.at.append(time.perf_counter())

    def ms(self):
        """The median step of the second half."""
        half = self.at[len(self.at) // 2 :]
        return 1e3 * statistics.median(after - before for before, after in itertools.pairwise(half))


def trained(folder, device, steps, cuda_graph):
    """Steps on batches of two shapes -> (the journal's bytes, ms of a step, how many graphs there are)."""
    tokens = [torch.arange(i, i + (12, 24)[i // 4 % 2]) % 64 for i in range(32)]
    rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in tokens]
    dtype = torch.float16 if device == "cuda" else torch.float32
    model, clock = qzo.from_pretrained(str(folder), dtype=dtype, device=device), Clock()
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(None):
        arguments = TrainingArguments(
            out,
            learning_rate=2e-2,
            max_steps=steps,
            per_device_train_batch_size=4,
            train_sampling_strategy="sequential",
            use_cpu=device == "cpu",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = QZOTrainer(model, arguments, train_dataset=rows, callbacks=[clock], cuda_graph=cuda_graph)
        trainer.train()
        graphs = trainer._optimizer.graphs
        return (Path(out) / JOURNAL).read_bytes(), clock.ms(), len(graphs.captured) if graphs else 0


def compared(folder, device, steps=60):
    """What a step takes with graphs and without, in a sentence. RuntimeError where the journals differ."""
    (plain, plain_ms, _), (captured, ms, count) = (trained(folder, device, steps, choice) for choice in (False, None))
    if captured != plain:
        raise RuntimeError(f"the journals with and without graphs differ, of {count} graphs")
    return f"{steps} steps, same journal; {ms:.2f} ms a step in {count} graphs, {plain_ms:.2f} ms without"


if __name__ == "__main__":
    print(compared(*sys.argv[1:]))
