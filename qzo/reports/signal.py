"""How much of L+ - L- survives the rounding of activations.

The perturbation never meets a rounded weight, but the activations between the layers are rounded, and a
small eps moves a loss by less than that rounding may. Here the derivative of a batch along several directions is
taken in float32 and once more with what enters and leaves every quantized layer rounded, everything else being equal.
"""

import contextlib

import torch

from ..loss.losses import losses, pair
from ..nn.evaluations import Evaluations
from ..nn.layers import evaluating, layers


def _float(dtype):
    return lambda x: x.to(dtype).float()


def _per_row(x, most, to_units):
    """Each row scaled so that its largest magnitude is `most`, rounded, and scaled back."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / most
    return to_units(x / scale) * scale


def _int8(x):
    return _per_row(x, 127, torch.round)


def _e4m3(x):
    return _per_row(x, 448, _float(torch.float8_e4m3fn))


# name -> (rounding of what enters a quantized layer, of what leaves it)
ROUNDINGS = {
    "float16": (_float(torch.float16), _float(torch.float16)),
    "bfloat16": (_float(torch.bfloat16), _float(torch.bfloat16)),
    "int8": (_int8, _float(torch.float16)),
    "float8_e4m3": (_e4m3, _float(torch.float16)),
}


@contextlib.contextmanager
def rounding(model, activations):
    """Inside, what enters and leaves every quantized layer is rounded as ROUNDINGS[activations] has it."""
    enters, leaves = ROUNDINGS[activations]
    handles = []
    for layer in layers(model, trainable=None).values():
        handles.append(layer.register_forward_pre_hook(lambda _, args: (enters(args[0]), *args[1:])))
        handles.append(layer.register_forward_hook(lambda _, args, y: leaves(y)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def derivatives(model, batch, seeds, eps, noise="rademacher"):
    """(L+ - L-) / (2 eps) of a batch along the direction of each seed: float64 [len(seeds)]."""
    stacked, found = pair(dict(batch), 2), []
    for seed in seeds:
        with evaluating(model, Evaluations([seed, seed], [eps, -eps], noise)):
            plus, minus = losses(model, stacked, 2).double().tolist()
        found.append((plus - minus) / (2 * eps))
    return torch.tensor(found, dtype=torch.float64)


def survival(model, batch, eps=1e-2, seeds=range(16), noise="rademacher", activations=tuple(ROUNDINGS)):
    """What rounding the activations does to the derivatives of a batch.

    Parameters
    ----------
    model : a float32 transformers model with QZOLinear layers
    batch : mapping, as qzo.losses takes it
    eps : relative size of the perturbation
    seeds : directions
    activations : names of ROUNDINGS; int8 and float8_e4m3 are scaled row by row, what leaves a layer is then float16

    Returns a dict: name -> {"error", "cosine"}: the RMS error of the derivatives over their RMS, and the cosine between
    the rounded and the exact ones (1: every bit of the signal, 0: none). Raises ValueError for a name that is unknown.
    """
    unknown = [name for name in activations if name not in ROUNDINGS]
    if unknown:
        raise ValueError(f"activations {', '.join(unknown)} are not known; there are {', '.join(ROUNDINGS)}")
    exact = derivatives(model, batch, seeds, eps, noise)
    result = {}
    for name in activations:
        with rounding(model, name):
            got = derivatives(model, batch, seeds, eps, noise)
        result[name] = {
            "error": float((got - exact).norm() / exact.norm()),
            "cosine": float(torch.nn.functional.cosine_similarity(got, exact, dim=0)),
        }
    return result
