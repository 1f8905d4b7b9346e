"""python quick_check.py DIRECTORY...: a few seconds of truth about the copy of qzo in each directory.

Prints one line for each, "green" or the first thing that is wrong. torch and triton are imported once; each
copy is then imported and checked in a process of its own, forked from there.
"""

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


def check(directory: str) -> None:
    """Import qzo from `directory` and compare it with the oracle; raises AssertionError where they differ."""
    sys.path[:0] = [directory, str(Path(__file__).resolve().parent.parent.parent)]
    import qzo
    from qzo.kernels.codes import pack_planes, pack_rows, unpack_rows
    from qzo.kernels.table import NF4
    from tests.kernels import test_few_rows, test_update
    from tests.kernels.test_qmm import FOLDED, RATIO, SPLIT, TILE, Matmul
    from tests.support.close import assert_same_bits

    assert Path(qzo.__file__).is_relative_to(directory), f"imported {qzo.__file__}"

    common: dict[str, Any] = dict(n=3, rows=2, seeds=(5, 9), coefs=(0.2, -0.1))
    for matmul, tile in (
        (Matmul(k=160, group=32, law="ih4", zeros="uint8", bias=True, **common), TILE),
        (Matmul(k=320, group=64, zeros="float32", base4=2**32 - 2, **common), RATIO),
        (Matmul(k=96, group=32, zeros="float32", relative=False, **common), TILE),
        (Matmul(k=192, group=64, law=None, **common), TILE),
        (Matmul(k=256, group=64, n=3, rows=2, seeds=(5, 5), coefs=(0.2, -0.1), pair=True), TILE),
        (Matmul(k=256, group=64, n=20, rows=2, seeds=(5, 5), coefs=(0.2, -0.1), pair=True), FOLDED),
        (Matmul(k=384, group=64, law="ih4", n=20, rows=2, seeds=(5, 9), coefs=(0.2, -0.1)), FOLDED),
        (Matmul(k=128, shared=True, **common), TILE),
        (Matmul(k=256, group=64, bits=2, zeros="uint8", **common), TILE),
        (Matmul(k=256, group=128, bits=8, **common), TILE),
        (Matmul(k=128, group=64, table=NF4, **common), TILE),
        (Matmul(k=128, group=64, table=NF4, exact=True, **common), TILE),
        (Matmul(k=200, group=0, books=3, bits=8, **common), SPLIT),
        (Matmul(k=200, group=0, zeros="float32", **common), SPLIT),
    ):
        for y in (matmul.kernel(tile), matmul.reference(pack_rows), matmul.reference(pack_planes)):
            matmul.assert_true(y)
    for name in ("float zero points", "whole row, in bags of 128 and one of 72"):
        test_few_rows.test_against_the_oracle(name)
    assert torch.equal(unpack_rows(pack_rows(matmul.codes), matmul.k), matmul.codes)
    for run in test_update.RUNS:
        for relative in (True, False):
            for coefs in ((0.3, 1e-4), (3.0, 1.0)):
                scales = test_update.scales_of(20)
                assert_same_bits(*test_update.run_both(run, scales, (1, 2), coefs, "ih4", relative, base4=7))
        assert_same_bits(*test_update.run_steps(run, test_update.scales_of(20), "ih4", True))
        assert_same_bits(*test_update.rows_run(run, steps=2))
        test_update.test_a_zero_scale_stays_zero_and_keeps_its_bit(run, False)


def judge(directory, pipe):
    """Send "green" or the first line of what is wrong; another kind of error ends the process instead."""
    verdict = "green"
    try:
        check(directory)
    except AssertionError as error:
        verdict = str(error).split("\n")[0] or "an assertion without a message"
    pipe.send(verdict)


def in_a_child(directory):
    """The verdict on one copy from a forked process, "CRASH" if it died."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    child = fork.Process(target=judge, args=(directory, theirs))
    child.start()
    theirs.close()
    child.join()
    return ours.recv() if child.exitcode == 0 else "CRASH"


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
    for each in sys.argv[1:]:
        print(in_a_child(each), flush=True)
