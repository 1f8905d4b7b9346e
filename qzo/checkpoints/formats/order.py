"""The group of each input, as act-order checkpoints have it, and the order of columns, as PackedWeight has it."""

import torch


def perm_of(g_idx: torch.Tensor, k: int, size: int, name: str = "g_idx") -> torch.Tensor | None:
    """int64 [K] that puts the inputs of each group side by side, or None where they are. g_idx: integers [K].

    ValueError for a group that there is not and for one that has more or fewer than `size` inputs.
    """
    if g_idx.dtype not in (torch.int32, torch.int64) or list(g_idx.shape) != [k]:
        raise ValueError(f"{name} must be int32 {[k]}, got {g_idx.dtype} {list(g_idx.shape)}")
    least, most, count = int(g_idx.min()), int(g_idx.max()), k // size
    if least < 0 or most >= count:
        raise ValueError(f"{name} names groups {least} to {most}; there are groups 0 to {count - 1}")
    members = torch.bincount(g_idx, minlength=count)
    odd = (members != size).nonzero().flatten().tolist()
    if odd:
        raise ValueError(f"{name} gives group {odd[0]} {int(members[odd[0]])} columns; every group has {size}")
    perm = g_idx.argsort(stable=True)
    return None if torch.equal(perm, torch.arange(k)) else perm


def g_idx_of(perm: torch.Tensor | None, k: int, size: int) -> torch.Tensor:
    """int32 [K], the group of each input, from an order of columns or None."""
    groups = (torch.arange(k) // size).to(torch.int32)
    return groups if perm is None else torch.empty_like(groups).index_copy_(0, perm.cpu(), groups)
