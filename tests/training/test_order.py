"""In which order a run sees its examples: by the seed and the number of the pass alone, batches of lengths alike."""

import itertools
import random

from qzo.training.data import WINDOW, batch_indices

SIZE = 4
LENGTHS = random.Random(0).choices(range(5, 200), k=3 * WINDOW * SIZE + 2)
STEPS = len(LENGTHS) // SIZE


def passing(number, seed=3, lengths=LENGTHS):
    """The batches of a pass."""
    return [batch_indices(step, lengths, SIZE, seed) for step in range(number * STEPS, (number + 1) * STEPS)]


def padded(batches):
    """Tokens of padding in all of them."""
    return sum(SIZE * max(LENGTHS[i] for i in batch) - sum(LENGTHS[i] for i in batch) for batch in batches)


def test_passes_differ_and_repeat_nothing():
    passes = [passing(number) for number in range(3)]
    for batches in passes:
        seen = [i for batch in batches for i in batch]
        assert len(seen) == len(set(seen)) == STEPS * SIZE
        assert seen != sorted(seen)
    assert len({tuple(map(tuple, batches)) for batches in passes}) == 3
    assert len({frozenset(map(frozenset, batches)) for batches in passes}) == 3, "the same batches in another order"
    left = [set(range(len(LENGTHS))).difference(*batches) for batches in passes]
    assert {len(some) for some in left} == {2}
    assert left[0] != left[1], "an incomplete batch is not always the same examples"


def test_a_batch_depends_on_its_step_and_on_nothing_before():
    backwards = [batch_indices(step, LENGTHS, SIZE, 3) for step in reversed(range(STEPS, 2 * STEPS))]
    assert backwards[::-1] == passing(1)
    assert passing(1) != passing(1, seed=4)
    assert passing(1, seed=-1) == passing(1, seed=2**64 - 1)  # 64 bits, however they are written


def test_batches_need_little_padding_and_come_in_no_order_of_length():
    batches = passing(0)
    shuffled = [i for batch in batches for i in batch]
    random.Random(1).shuffle(shuffled)
    assert padded(batches) < 0.25 * padded([shuffled[at : at + SIZE] for at in range(0, len(shuffled), SIZE)])
    longest = [max(LENGTHS[i] for i in batch) for batch in batches]
    rising = sum(a < b for a, b in itertools.pairwise(longest)) / (len(longest) - 1)
    assert 0.25 < rising < 0.75
