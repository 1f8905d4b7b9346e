"""What a format cannot hold exactly, said before anything is written: a ValueError that names the layer, the
reason and what to do."""

from collections.abc import Mapping

from ...nn.weights import PackedWeight


def check_integers(name: str, weight: PackedWeight, target: str) -> None:
    """For float zero points, tables and codebooks, where the target has integers."""
    if weight.books:
        raise ValueError(
            f"{name} has codes that stand for vectors (AQLM), which {target} does not hold; save it in "
            "its own format (qzo.save_pretrained)"
        )
    if weight.table is not None:
        raise ValueError(
            f"{name} has codes that stand for a table's entries (NF4, FP4), which {target} does not hold; "
            "save it as bitsandbytes"
        )
    if weight.zeros is not None and weight.zeros.is_floating_point():
        raise float_zeros(name, target)


def float_zeros(name: str, target: str) -> ValueError:
    """The error of a layer with zero points that are no integers."""
    return ValueError(
        f"{name} has a float minimum (GGUF Q4_1) or float zero points (HQQ), which {target}'s integer zero points "
        "cannot hold; round them, which changes the weights and tells by how much (qzo export --round-zeros, "
        "round_zeros=True in Python), save it in its own format (qzo.save_pretrained), or start from another file, "
        "such as a Q4_0 one"
    )


def check_order(name: str, weight: PackedWeight, target: str) -> None:
    """For sorted columns, where the target has groups of neighbours only."""
    if weight.perm is not None:
        raise ValueError(
            f"{name} has its columns sorted by group (act-order), which {target} does not hold; "
            "save it in its own format (qzo.save_pretrained), or as gptq"
        )


def check_whole_words(name: str, weight: PackedWeight, target: str, inputs: bool) -> None:
    """For sizes whose codes do not fill 32-bit words along the outputs, or `inputs` too."""
    per = 32 // weight.bits
    for what in ("out_features", "in_features") if inputs else ("out_features",):
        size = getattr(weight, what)
        if size % per:
            raise ValueError(
                f"{name} has {what}={size}, and {target} packs {per} codes of {weight.bits} bits "
                "into a word; save it as compressed-tensors"
            )


def group_sizes(packed: Mapping[str, PackedWeight]) -> dict[str, int]:
    """name -> group size, or -1 for a whole row, of layers {name: PackedWeight}.

    A layer that is a single group has the number where another layer's groups have it too.
    """
    divided = {weight.group_size for weight in packed.values() if weight.group_size != weight.in_features}
    return {name: weight.group_size if weight.group_size in divided else -1 for name, weight in packed.items()}
