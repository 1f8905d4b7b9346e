"""python quick_check.py DIRECTORY:FIRST...: a few seconds of truth about the copy of qzo in each directory.

Prints one line for each, "green" or the first thing that is wrong. torch and triton are imported once; each copy is
then imported and checked in a process of its own, forked from there. FIRST is a word for what a copy may have a fault
in, a file of kernels/ or a part of them: what is about that is checked first, and all the rest behind it.
"""

import functools
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

# imported before the fork, for speed: whatever the checks import that is not qzo
import hypothesis  # noqa: F401
import pytest  # noqa: F401
import torch
import triton  # noqa: F401


def check(directory: str, first: str) -> None:
    """Import qzo from `directory` and compare it with the oracle; raises AssertionError where they differ."""
    sys.path[:0] = [directory, str(Path(__file__).resolve().parent.parent.parent)]
    import qzo

    assert Path(qzo.__file__).is_relative_to(directory), f"imported {qzo.__file__}"
    checks = [("codes.py", codes), *matmuls(), ("few_rows.py", few_rows), *updates()]
    for _, run in sorted(checks, key=lambda each: first not in each[0].split()):
        run()


def matmuls():
    """(what a matmul is about, its comparison with the oracle) of each."""
    from qzo.kernels.table import NF4
    from tests.kernels.test_qmm import FOLDED, RATIO, SPLIT, TILE, Matmul

    common: dict[str, Any] = dict(n=3, rows=2, seeds=(5, 9), coefs=(0.2, -0.1))
    return [
        (about, functools.partial(true_matmul, matmul, tile))
        for matmul, tile, about in (
            (Matmul(k=160, group=32, law="ih4", zeros="uint8", bias=True, **common), TILE, "integer"),
            (Matmul(k=320, group=64, zeros="float32", base4=2**32 - 2, **common), RATIO, "ratio"),
            (Matmul(k=96, group=32, zeros="float32", relative=False, **common), TILE, "absolute"),
            (Matmul(k=192, group=64, law=None, **common), TILE, ""),
            (Matmul(k=256, group=64, n=3, rows=2, seeds=(5, 5), coefs=(0.2, -0.1), pair=True), TILE, "pair"),
            (Matmul(k=256, group=64, n=20, rows=2, seeds=(5, 5), coefs=(0.2, -0.1), pair=True), FOLDED, "pair folded"),
            (Matmul(k=384, group=64, law="ih4", n=20, rows=2, seeds=(5, 9), coefs=(0.2, -0.1)), FOLDED, "folded"),
            (Matmul(k=128, shared=True, **common), TILE, "shared"),
            (Matmul(k=256, group=64, bits=2, zeros="uint8", **common), TILE, "codes.py"),
            (Matmul(k=256, group=128, bits=8, **common), TILE, "codes.py bytes"),
            (Matmul(k=128, group=64, table=NF4, **common), TILE, "table.py"),
            (Matmul(k=128, group=64, table=NF4, exact=True, **common), TILE, "table.py forms.py exact"),
            (Matmul(k=200, group=0, books=3, bits=8, **common), SPLIT, "vectors.py plan.py"),
            (Matmul(k=200, group=0, zeros="float32", **common), SPLIT, "row"),
        )
    ]


def true_matmul(matmul, tile):
    from qzo.kernels.codes import pack_planes, pack_rows

    for y in (matmul.kernel(tile), matmul.reference(pack_rows), matmul.reference(pack_planes)):
        matmul.assert_true(y)


def few_rows():
    from tests.kernels import test_few_rows

    for name in ("float zero points", "whole row, in bags of 128 and one of 72"):
        test_few_rows.test_against_the_oracle(name)


def codes():
    from qzo.kernels.codes import pack_rows, unpack_rows

    found = torch.randint(0, 16, (3, 200), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(unpack_rows(pack_rows(found), 200), found)


def updates():
    """(what an update is about, its comparison with the reference) of each."""
    from tests.kernels import test_update
    from tests.support.close import assert_same_bits

    def values(run):
        for relative in (True, False):
            for coefs in ((0.3, 1e-4), (3.0, 1.0)):
                scales = test_update.scales_of(20)
                assert_same_bits(*test_update.run_both(run, scales, (1, 2), coefs, "ih4", relative, base4=7))

    def steps(run):
        assert_same_bits(*test_update.run_steps(run, test_update.scales_of(20), "ih4", True))

    def rows(run):
        assert_same_bits(*test_update.rows_run(run, steps=2))

    def zero(run):
        test_update.test_a_zero_scale_stays_zero_and_keeps_its_bit(run, False)

    return [
        (f"update.py {part.__name__}", functools.partial(part, run))
        for run in test_update.RUNS
        for part in (values, steps, rows, zero)
    ]


def judge(directory, first, pipe):
    """Send "green" or the first line of what is wrong; another kind of error ends the process instead."""
    verdict = "green"
    try:
        check(directory, first)
    except AssertionError as error:
        verdict = str(error).split("\n")[0] or "an assertion without a message"
    pipe.send(verdict)


def in_a_child(directory, first):
    """The verdict on one copy from a forked process, "CRASH" if it died."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    child = fork.Process(target=judge, args=(directory, first, theirs))
    child.start()
    theirs.close()
    child.join()
    return ours.recv() if child.exitcode == 0 else "CRASH"


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
    for each in sys.argv[1:]:
        print(in_a_child(*each.rsplit(":", 1)), flush=True)
