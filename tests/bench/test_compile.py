"""The kernels' machine code for every supported chip, made and read without a GPU.

The compiler has a process of its own: under Triton's interpreter, where other tests live, nothing compiles.
"""

import json
import os
import subprocess
import sys

import pytest

from qzo.bench.codegen import sass
from qzo.kernels import tiles
from tests.support.paths import ROOT

ARCHES = tuple(tiles.PROCESSORS)


@pytest.fixture(scope="session")
def compiled():
    """(records, broken budgets) of the quick set, which takes minutes: sass.launch_set tells what it is.

    Picked are the budgets, the tiles, and cases in which of flags every two meet on a chip of one of the families, if
    not in a budget or a tile. Each of these chips has every value of every flag: what fails for one flag is seen on
    each, what fails for two is seen, if not on each. `--set every` has the product.
    """
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "qzo.bench.codegen.sass", "--set", "quick", "--json"],
        cwd=ROOT,
        env=clean,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *records, last = [json.loads(line) for line in done.stdout.splitlines()]
    return records, last["over_budget"]


@pytest.mark.parametrize("arch", ARCHES)
def test_every_kernel_is_sound(compiled, arch):
    """No spill, no trap, shared memory that fits, tensor cores fed from registers."""
    records = [record for record in compiled[0] if record["launch"].startswith(arch + " ")]
    assert records, f"nothing was compiled for {arch}"
    assert [(record["launch"], record["faults"]) for record in records if record["faults"]] == []


@pytest.mark.parametrize("arch", ARCHES)
def test_every_kernel_is_compiled(compiled, arch):
    """All kernels, and a tile for each bucket of rows of tiles.pick."""
    names = [record["launch"].split()[1:3] for record in compiled[0] if record["launch"].startswith(arch + " ")]
    # float zero points, which the group sums are for, come with the pairs of flags
    paired = {"group_sums"} if arch in sass.FAMILIES else set()
    every = {"qmm", "folded", "dequantize", "update", "update_rows", "perturb"}
    assert {kernel for kernel, _ in names} == every | paired
    wanted = {
        tiles.pick(tiles.Problem(rows, 4096, 4096, 128, sass.launches.torch.bfloat16, arch))
        for rows in (1, 16, 32, 64, 128, 512, 8192)
    }
    assert {f"{tile.rows}x{tile.outputs}" for tile in wanted} <= {tile for kernel, tile in names if kernel == "qmm"}


def test_instruction_budgets(compiled):
    assert compiled[1] == []
