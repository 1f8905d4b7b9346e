"""Which block is where: no slot is filled while it is in use, each block is copied once a forward, behind compute."""

import itertools
import random

import pytest

from qzo.nn.streaming.slots import Slots, assign
from tests.support.offloads import Clock


class Watched:
    """A copier that knows what each slot holds, which of them is in use, and in which order blocks were copied."""

    def __init__(self, count):
        self.holds, self.in_use, self.order = [None] * count, None, []

    def start(self, block, slot):
        assert slot != self.in_use, f"block {block} was copied over what is being read"
        self.holds[slot] = block
        self.order.append(block)

    def wait(self, slot):
        assert self.in_use is None
        self.in_use = slot

    def done(self, slot):
        assert slot == self.in_use
        self.in_use = None

    def close(self):
        pass


def made(blocks, count):
    chosen = assign(blocks, count)
    copier = Watched(count)
    return Slots([1] * blocks, chosen, copier), copier, chosen


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("blocks", [3, 4, 5, 6, 7, 8, 80])
def test_neighbours_have_slots_of_their_own(blocks, count):
    chosen = assign(blocks, count)
    assert set(chosen) == set(range(min(blocks, count)))
    ring = [*chosen, chosen[0]]
    shared = sum(a == b for a, b in itertools.pairwise(ring))
    assert shared == (blocks % 2 if count == 2 else 0)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("seed", range(20))
def test_a_block_that_was_entered_is_there_whatever_the_order(seed, count):
    choose = random.Random(seed)
    blocks = choose.randrange(count, 9)
    slots, copier, chosen = made(blocks, count)
    for _ in range(200):
        block = choose.choice([choose.randrange(blocks), ((slots.current or 0) + 1) % blocks])
        slots.enter(block)
        assert copier.in_use == chosen[block]
        assert copier.holds[chosen[block]] == block
        if choose.random() < 0.7:
            slots.leave()
            assert copier.in_use is None
    assert slots.copied_bytes == len(copier.order)


def test_a_forward_copies_each_block_once_and_ahead_of_its_turn():
    slots, copier, _ = made(7, 3)
    for _ in range(4):
        for block in range(7):
            slots.enter(block)
            ahead = copier.order[-1]
            slots.leave()
            assert (ahead - block) % 7 >= 1, "the next one is on its way while this one computes"
    assert copier.order[:28] == [*range(7)] * 4
    assert len(copier.order) <= 28 + 3


def test_when_no_block_is_in_use_every_slot_is_filled_ahead():
    """So that the head, the update and the next batch hide copies too."""
    slots, copier, _ = made(6, 3)
    for block in [*range(6)] * 2:
        slots.enter(block)
        slots.leave()
        assert set(copier.holds) == {(block + ahead) % 6 for ahead in (1, 2, 3)}


def test_the_order_is_learned():
    """Only the upper blocks run, as behind a frozen prefix: the others are copied no more."""
    slots, copier, _ = made(12, 3)
    for _ in range(3):
        for block in range(4, 12):
            slots.enter(block)
            slots.leave()
        seen, copier.order = copier.order, []
    assert sorted(seen) == [*range(4, 12)]


def test_what_a_copy_raises_is_raised_and_the_next_attempt_copies_again():
    slots, copier, _ = made(5, 3)
    wait, copier.wait = copier.wait, lambda slot: (_ for _ in ()).throw(OSError("gone"))
    with pytest.raises(OSError, match="gone"):
        slots.enter(0)
    copier.wait = wait
    slots.enter(0)
    assert copier.order.count(0) == 2


def test_one_block_stays():
    slots, copier, _ = made(1, 1)
    for _ in range(3):
        slots.enter(0)
        slots.leave()
    assert copier.order == [0]


@pytest.mark.parametrize("ratio", [0.2, 1, 5])
@pytest.mark.parametrize(("blocks", "count"), [(80, 3), (79, 3), (40, 2), (13, 3)])
def test_a_step_takes_the_longer_of_bus_and_compute_and_a_block(blocks, count, ratio):
    """In simulated time; ratio: seconds that a block computes, to one second on the bus."""
    clock, steps = Clock([1.0] * blocks, count), 5
    slots = Slots(clock.sizes, assign(blocks, count), clock)
    ends = [0.0]
    for _ in range(steps):
        for block in range(blocks):
            slots.enter(block)
            clock.now += ratio
            slots.leave()
        ends.append(clock.now)
    longest = max(end - begun for begun, end in itertools.pairwise(ends))
    assert longest <= 1.05 * max(blocks, blocks * ratio) + max(1, ratio)
    assert longest >= max(blocks - count, blocks * ratio), "nothing is faster than the bus"
