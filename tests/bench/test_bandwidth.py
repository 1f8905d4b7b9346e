"""The kernels that the roof is measured with (interpreted)."""

import pytest
import torch

from qzo.bench import bandwidth


def test_the_kernels_of_the_roof_read_and_copy_all():
    x = torch.randint(-(2**31), 2**31 - 1, (3 * bandwidth.BLOCK * bandwidth.TURNS,), dtype=torch.int32)
    y, sums = torch.empty_like(x), bandwidth.sums_of(x)
    bandwidth.copy(x, y)
    bandwidth.read(x, sums)
    assert torch.equal(x, y)
    assert torch.equal(sums, x.view(3, -1).sum(1, dtype=torch.int32))
    with pytest.raises(ValueError, match="1000 numbers: expected a multiple of 32768"):
        bandwidth.sums_of(x[:1000])
