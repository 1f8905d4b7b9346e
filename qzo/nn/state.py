"""What a state_dict holds of a QZOLinear, as a PackedWeight."""

from collections.abc import Mapping

import torch

from .weights import PackedWeight

NAMES = ("codes", "scales", "zeros", "bits", "perm", "table", "codebooks")


def packed_of(
    state: Mapping[str, torch.Tensor | None],
    bits: int,
    in_features: int,
    out_features: int,
    group_size: int,
    books: int,
) -> PackedWeight:
    """The PackedWeight of a state, {name of NAMES: tensor or None}, for a layer of this form.

    state holds codes and scales; books: codebooks of the layer. ValueError for a state of another form, and for what
    PackedWeight refuses.
    """
    codes, scales, stored, table = state["codes"], state["scales"], state["bits"], state["table"]
    assert codes is not None, "looked at before"
    assert scales is not None, "looked at before"
    held = 4 if stored is None else int(stored)
    if held != bits:
        raise ValueError(f"holds codes of {held} bits, the layer has {bits}")
    loaded = PackedWeight(
        codes,
        scales.to(torch.float32),
        state["zeros"],
        in_features,
        bits,
        state["perm"],
        None if table is None else tuple(table.tolist()),
        state["codebooks"],
    )
    if (loaded.out_features, loaded.group_size) != (out_features, group_size):
        raise ValueError(
            f"holds {loaded.out_features} outputs in groups of {loaded.group_size}, the layer has "
            f"{out_features} in groups of {group_size}"
        )
    if loaded.books != books:
        raise ValueError(f"holds {loaded.books} codebooks, the layer has {books}")
    return loaded
