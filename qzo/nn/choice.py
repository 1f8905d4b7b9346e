"""Which layers of a float model are quantized, and in which groups."""

from torch import nn

from ..kernels.table import named_table
from .experts import split_experts_, stack_widths
from .layers import arena_of, layers
from .linear import QZOLinear
from .quantize import check_form
from .weights import check_group_size


def _linears(module):
    """name -> nn.Linear. A subclass computes something of its own (Llama 4's router gives two tensors), or others read
    its weight (nn.MultiheadAttention's)."""
    return {name: m for name, m in module.named_modules(remove_duplicate=False) if type(m) is nn.Linear}


def quantize_(module, bits=4, group_size=128, symmetric=True, skip=("lm_head",), table=None):
    """Replace every nn.Linear inside `module`, but none of a subclass, by a QZOLinear, in place, and return the module.

    Stacked experts are split into Linears first (experts.py). skip: what has a name that ends in one of these (a whole
    dotted part, or several) stays as it is. table: as in QZOLinear.from_linear. Raises ValueError when there is nothing
    to replace, or when group_size does not divide a layer's in_features; the module is then unchanged.
    """
    check_form(bits, symmetric, named_table(table))
    replaced = {}
    for name, linear in quantizable_(module, group_size, skip).items():
        parent, _, child = name.rpartition(".")
        if id(linear) not in replaced:
            replaced[id(linear)] = QZOLinear.from_linear(linear, bits, group_size, symmetric, table)
        setattr(module.get_submodule(parent), child, replaced[id(linear)])
    arena_of(module, exact=True)
    return module


def quantizable_(module, group_size, skip):
    """name -> nn.Linear of all that `quantize_` replaces; experts are split for that, in place. Raises as it does."""
    if isinstance(module, nn.Linear):
        raise ValueError("quantize_ replaces the Linears inside a module; for a bare one use QZOLinear.from_linear")

    def kept(name):
        return any(("." + name).endswith("." + s) for s in skip)

    widths = {name: m.in_features for name, m in _linears(module).items() if not kept(name)}
    widths |= stack_widths(module, kept)
    if not widths and not layers(module, trainable=None):
        raise ValueError(f"{type(module).__name__} has no nn.Linear to quantize (skip={tuple(skip)})")
    for name, width in widths.items():
        try:
            check_group_size(group_size, width)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    split_experts_(module, kept)
    return {name: m for name, m in _linears(module).items() if not kept(name)}


def group_for(model, group_size=None):
    """The group size given, or the largest of 128, 64, 32 that divides the in_features of every Linear to quantize."""
    linears = quantizable(model)
    if group_size is None:
        group_size = next((g for g in (128, 64, 32) if all(m.in_features % g == 0 for m in linears.values())), 32)
    for name, linear in linears.items():
        try:
            check_group_size(group_size, linear.in_features)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return group_size


def quantizable(model):
    """name -> nn.Linear of all that from_pretrained would quantize: every Linear but the output head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        name: m
        for name, m in model.named_modules()
        if type(m) is nn.Linear and m is not head and name.rpartition(".")[2] != "lm_head"
    }
