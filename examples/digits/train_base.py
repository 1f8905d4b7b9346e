"""Trains the base first-order on the digits but 9, quantizes it and writes base.safetensors: minutes on one core.

python examples/digits/train_base.py
"""

import math
import time

import torch
from diffusers import SD3Transformer2DModel
from digits import BASE, CONFIG, EMPTY, LAW, UNSEEN, Digits, load, losses, quantized, save_base
from torch import nn

from qzo.diffusion.objective import Rows

STEPS = 1000
BATCH = 128
LEARNING_RATE = 2e-3  # after 100 steps
PERIOD = 3000  # steps in which it would fall to nothing, as a cosine: what it draws is read well long before
DROPOUT = 0.1  # rows with the empty prompt, which guidance needs


def shown(training: Digits) -> Digits:
    """What the base sees."""
    return training.where(training.labels != UNSEEN)


def train(data: Digits, steps: int = STEPS) -> nn.Module:
    """The float base after so many steps of AdamW on the flow-matching loss."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(**CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=1e-2)
    started, average = time.perf_counter(), 1.0
    for step in range(steps):
        rate = min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / PERIOD))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
        some = torch.randint(len(data.labels), (BATCH,))
        noise = torch.randn(BATCH, *data.pictures.shape[1:])
        times = LAW.times((torch.arange(BATCH) + torch.rand(BATCH)) / BATCH)  # stratified
        dropped = torch.rand(BATCH) < DROPOUT
        shown_as = torch.where(dropped, EMPTY, data.labels[some])
        loss = losses(model, Digits(data.pictures[some], shown_as), Rows(times, noise, dropped)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average += 0.02 * (loss.item() - average)
        if step % 100 == 99:
            print(f"step {step + 1} of {steps}: loss {average:.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    return model


if __name__ == "__main__":
    save_base(quantized(train(shown(load()[0]))))
    print(f"{BASE}: {BASE.stat().st_size / 1e6:.2f} MB")
