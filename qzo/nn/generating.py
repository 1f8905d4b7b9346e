"""`generating`: layers of a CPU keep their codes a second time, in the order that a few rows read them, for a while."""

import contextlib
import dataclasses
from collections.abc import Iterator

from torch import nn

from ..kernels.few_rows import Turned, supports
from ..system.memory import Trimmer
from . import ops
from .layers import layers
from .linear import QZOLinear


@contextlib.contextmanager
def generating(module: nn.Module) -> Iterator[None]:
    """Make forwards of a few rows, as `model.generate` runs them token by token, fast on a CPU: a context manager.

    Inside, up to eight rows are multiplied straight from packed codes (kernels/few_rows.py), a single one in less time
    than dense float32 weights take. For that each layer holds its codes and scales a second time, and the products of
    scales and zero points where it has those: with 4 bits in groups of 32, 0.63 to 0.75 bytes a weight, freed on exit.
    Results differ from those outside in the last digits of float32: sums are added in another order. It is for integer
    codes on a CPU; other layers (NF4, FP4, AQLM, layers on a GPU or offloaded), more rows than eight, and a layer with
    a tensor that is replaced inside, run as they do outside.

    Parameters
    ----------
    module
        Holds the layers; their scales may change inside.

    Raises
    ------
    RuntimeError
        Inside `evaluating`; and `evaluating` of such a layer in here: a step's numbers follow from its journal alone.
    """
    found = list(layers(module, trainable=None).values())
    if any(layer.evaluations is not None for layer in found):
        raise RuntimeError("qzo.generating() inside evaluating(): leave evaluating() before a model generates")
    turned: list[tuple[QZOLinear, int]] = []
    trimmer = Trimmer()
    try:
        for layer in found:
            nbytes = 0 if layer.codes.is_meta or layer.stored is not None else _turn(layer)
            if nbytes:
                turned.append((layer, nbytes))
                trimmer.took(nbytes)
        yield
    finally:
        for layer, nbytes in turned:
            layer._let_go()
            trimmer.took(nbytes)


def _turn(layer: QZOLinear) -> int:
    """Plan with a Weight that is turned; the bytes that it takes, or 0 where it cannot be or is already."""
    weight = layer.kernel_weight()
    if layer._planned is None or weight.turned is not None or not supports(weight):
        return 0
    turned = Turned(weight)
    weight = dataclasses.replace(weight, turned=turned, plans={})
    ops.know(weight)
    layer._planned = layer._planned[0], weight  # until a tensor of the layer moves
    return turned.nbytes
