"""The order of columns of act-order checkpoints, from the groups of the inputs and back."""

import pytest
import torch

from qzo.checkpoints.formats import order


def test_inputs_of_a_group_stand_side_by_side_in_their_order():
    g_idx = torch.tensor([1, 0, 1, 2, 0, 2], dtype=torch.int32)
    perm = order.perm_of(g_idx, 6, 2)
    assert perm is not None
    assert perm.tolist() == [1, 4, 0, 2, 3, 5]
    assert g_idx[perm].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("size", [1, 2, 8, 16])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_groups_come_back(size, dtype):
    g_idx = (torch.randperm(64) // size).to(dtype)
    found = order.g_idx_of(order.perm_of(g_idx, 64, size), 64, size)
    assert found.dtype == torch.int32
    assert torch.equal(found, g_idx.int())


def test_groups_of_neighbours_need_no_order():
    plain = torch.arange(12).int() // 4
    assert order.perm_of(plain, 12, 4) is None
    assert torch.equal(order.g_idx_of(None, 12, 4), plain)


@pytest.mark.parametrize(
    ("g_idx", "message"),
    [
        (torch.arange(8).float() // 4, r"^here must be int32 \[8\], got torch.float32 \[8\]$"),
        (torch.arange(4).int(), r"must be int32 \[8\], got torch.int32 \[4\]"),
        (torch.arange(8).int() // 4 + 1, "here names groups 1 to 2; there are groups 0 to 1"),
        (torch.arange(8).int() // 4 - 1, "here names groups -1 to 0; there are groups 0 to 1"),
        (torch.tensor([0, 0, 0, 1, 1, 1, 1, 1]), "here gives group 0 3 columns; every group has 4"),
    ],
)
def test_groups_that_are_none(g_idx, message):
    with pytest.raises(ValueError, match=message):
        order.perm_of(g_idx, 8, 4, "here")
