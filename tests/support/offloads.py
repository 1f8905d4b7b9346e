"""Models of blocks to offload, runs on them, and copiers that show what the real ones may do at worst."""

import functools
import random
import time

import torch
from torch import nn

import qzo
from qzo.nn.layers import arena_of
from qzo.nn.streaming import offload as streaming
from qzo.nn.streaming.copiers import ThreadCopier

COUNT = 7


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(64, width), nn.Linear(width, 64, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Tower(nn.Module):
    """COUNT blocks, of two sizes; the head is in no block."""

    def __init__(self, count=COUNT):
        super().__init__()
        self.blocks = nn.ModuleList(Residual(64 + 32 * (i % 2)) for i in range(count))
        self.head = nn.Linear(64, 32)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def tower(count=COUNT, **options):
    torch.manual_seed(5)
    return qzo.quantize_(Tower(count), **{"group_size": 32, "symmetric": False, **options})


def streamed_bytes(model):
    """Codes and zero points of the blocks."""
    layers = [child for block in model.blocks for child in block.children()]
    return sum(tensor.nbytes for layer in layers for tensor in layer.read_codes() if tensor is not None)


def run(model, steps=4, directions=1, paired=True, parts=1):
    """(the losses of each step, the arena after them) of a run; parts: micro-batches of a step."""
    optimizer = qzo.QZO(model, lr=0.05, directions=directions, paired=paired)
    rows = torch.randn(4 * parts, 64, generator=torch.Generator().manual_seed(1)).chunk(parts)
    count = 2 * directions if paired else 1

    def of_part(part):
        return model(part.repeat(count, 1)).square().mean(1).view(count, -1).mean(1)

    def closure():
        parts_losses = qzo.together(model, [functools.partial(of_part, part) for part in rows])
        losses = sum(parts_losses)
        return losses if paired else losses[0]

    found = []
    for _ in range(steps):
        optimizer.step(closure)
        assert optimizer.last is not None
        found.append(optimizer.last.losses)
    return found, arena_of(model).data.clone()


def same(one, other):
    return one[0] == other[0] and torch.equal(one[1], other[1])


class LateCopier:
    """Destroys what a slot holds when a copy begins, and fills it as late as can be: when it is waited for."""

    def __init__(self, store, slots):
        self.store, self.slots, self.begun = store, slots, {}

    def start(self, block, slot):
        self.slots[slot].fill_(0xA5)
        self.begun[slot] = block

    def wait(self, slot):
        if slot in self.begun:
            self.store.read(self.begun.pop(slot), self.slots[slot])

    def done(self, slot):
        pass

    def close(self):
        pass


class DelayingStore:
    """A store that lets the reader wait, each time for another while."""

    def __init__(self, store, seed, most=0.002):
        self.store, self.random, self.most = store, random.Random(seed), most
        self.sizes, self.nbytes, self.write, self.close = store.sizes, store.nbytes, store.write, store.close

    def read(self, block, into, start=0):
        time.sleep(self.random.uniform(0, self.most))
        into.fill_(0xA5)
        time.sleep(self.random.uniform(0, self.most))
        self.store.read(block, into, start)


def through(monkeypatch, copier):
    """From now on models are offloaded through copier(store, slots)."""
    monkeypatch.setattr(streaming, "copier_of", copier)


def delayed(monkeypatch, seed):
    through(monkeypatch, lambda store, slots: ThreadCopier(DelayingStore(store, seed), slots))


class Clock:
    """A copier in simulated time: one bus, of a byte a second, and one device; `now` is when the device is free."""

    def __init__(self, sizes, slots):
        self.sizes, self.now, self.bus_free = sizes, 0.0, 0.0
        self.copied, self.consumed = [0.0] * slots, [0.0] * slots

    def start(self, block, slot):
        begun = max(self.bus_free, self.consumed[slot], self.now)
        self.copied[slot] = self.bus_free = begun + self.sizes[block]

    def wait(self, slot):
        self.now = max(self.now, self.copied[slot])

    def done(self, slot):
        self.consumed[slot] = self.now

    def close(self):
        pass
