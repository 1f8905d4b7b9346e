"""Layers of one module that are given the same x right after one another (q, k and v; gate and up): one launch for all.

Nobody says which they are: one forward shows it. From the next on the first of them multiplies for the others too, and
their outputs are kept until they are asked for with that very x. Whatever else happens, a layer multiplies for itself.
No bit depends on it: each runs the tile, and adds in the order, that it has alone.

Terms (member): docs/glossary.md.
"""

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from ..kernels.operands import Perturbation, Weight
from . import ops

MOST_KNOWN = 64  # layers, or plans; then all is learned anew


class Layer(Protocol):
    """What is asked of a QZOLinear here (linear.py is built on this file)."""

    perm: torch.Tensor | None
    out_dtype: torch.dtype | None

    def kernel_weight(self) -> Weight:
        """The weight as the kernels take it."""


_Reference = weakref.ref[Layer]
_Kept = tuple[torch.Tensor | None, tuple[torch.Tensor, ...], int]  # an output, the weight's tensors, their versions


class _Run:
    """Calls with one x, one after another: under what, by whom, and outputs that are still to be asked for."""

    callers: tuple[int, ...]
    kept: dict[int, _Kept]

    def __init__(self, x: torch.Tensor, perturbation: Perturbation, choice: ops.Choice) -> None:
        self.x, self.perturbation, self.choice = weakref.ref(x), perturbation, choice
        self.version, self.stream = _version(x, perturbation), _stream(x.device)
        self.callers, self.kept = (), {}

    def goes_on(self, x: torch.Tensor, perturbation: Perturbation, choice: ops.Choice) -> bool:
        return (
            self.x() is x
            and self.perturbation is perturbation
            and self.choice is choice
            and self.version == _version(x, perturbation)
            and self.stream == _stream(x.device)
        )


_changes = operator.attrgetter("_version")  # how often a tensor's values were changed in place


def _version(x: torch.Tensor, perturbation: Perturbation) -> int:
    return x._version + perturbation.seeds._version + perturbation.coefs._version


def _stream(device: torch.device) -> int | None:
    """What tells apart the streams of a device that work may be queued on."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else None


def _alone(*_: object) -> None:
    """What a layer runs for others that has none behind it."""


class _Together:
    """Layers behind the first, and what multiplies by the weights of all; no layers: the first is on its own."""

    def __init__(
        self,
        x: torch.Tensor,
        layers: Sequence[_Reference] = (),
        weights: Sequence[Weight] = (),
        run: Callable[..., None] | None = None,
    ) -> None:
        self.layers, self.weights, self.run = layers, weights, run or _alone
        self.shapes = [(*x.shape[:-1], weight.out_features) for weight in weights]
        self.behind = [
            (found, weight, tuple(weight.tensors().values())) for found, weight in zip(layers, weights[1:], strict=True)
        ]

    def stands(self, first: Layer) -> bool:
        """Whether the layers are still what they were when this was planned."""
        if self.layers and first.kernel_weight() is not self.weights[0]:
            return False
        for found, weight, _ in self.behind:
            layer = found()
            if layer is None or layer.kernel_weight() is not weight:
                return False
        return True

    def __call__(
        self, x: torch.Tensor, perturbation: Perturbation, dtype: torch.dtype
    ) -> tuple[torch.Tensor, dict[int, _Kept]]:
        """y of the first, and what is kept for each of the others."""
        ys = [torch.empty(shape, dtype=dtype, device=x.device) for shape in self.shapes]
        self.run(x, self.weights[0], perturbation, *ys)
        return ys[0], {
            id(found()): (y, tensors, sum(map(_changes, tensors)))
            for (found, _, tensors), y in zip(self.behind, ys[1:], strict=True)
        }


class Siblings:
    """What the QZOLinear children of one module know of each other. They are never kept alive by it; a copy of them
    knows nothing yet."""

    _after: dict[int, dict[int, _Reference]]  # id of a layer -> id -> reference of those that were given its x after it
    _plans: dict[tuple[object, ...], _Together]

    def __init__(self) -> None:
        self._run: _Run | None = None
        self._forget()

    def __reduce__(self) -> tuple[type["Siblings"], tuple[()]]:
        return Siblings, ()

    def _forget(self) -> None:
        """What was learned, and what was planned by it."""
        self._after = {}
        self._plans = {}

    def let_go(self) -> None:
        """Hold no tensors: a layer's are about to change."""
        self._plans.clear()
        if self._run is not None:
            self._run.kept.clear()

    def product(self, layer: Layer, x: torch.Tensor, perturbation: Perturbation | None) -> torch.Tensor | None:
        """y of `layer`; None: it is to multiply for itself. Its columns have no order of their own, nobody traces x."""
        me, run, choice = id(layer), self._run, ops.chosen()
        if perturbation is None:
            perturbation = ops.plain(x.device)
        if run is not None and run.goes_on(x, perturbation, choice) and me not in run.callers:
            y, tensors, version = run.kept.pop(me, _NOTHING)
            if y is not None and sum(map(_changes, tensors)) == version:
                run.callers += (me,)
                return y
        elif (
            not choice.shared_launches
            or not ops.uses_triton(x.device)
            or x.is_inference()
            or perturbation.seeds.is_inference()
            or perturbation.coefs.is_inference()
        ):
            return None
        else:
            if run is not None and run.kept:  # somebody was not asked this time
                self._forget()
            run = self._run = _Run(x, perturbation, choice)
        y = self._lead(layer, x, run)
        run.callers += (me,)
        return y

    def _lead(self, layer: Layer, x: torch.Tensor, run: _Run) -> torch.Tensor | None:
        """Multiply for those behind the layer too, and keep what is theirs; None if there are none."""
        perturbation = run.perturbation
        key = id(layer), run.callers, x.shape, x.dtype, x.get_device(), perturbation.form, run.choice
        together = self._plans.get(key)
        if together is None or not together.stands(layer):
            self._learn(layer, run)
            together = self._plan(layer, x, run)
            if together is None:
                return None
            self._plans[key] = together
        if not together.layers:
            return None
        y, kept = together(x, perturbation, layer.out_dtype or x.dtype)
        run.kept |= kept
        return y

    def _learn(self, layer: Layer, run: _Run) -> None:
        me = id(layer)
        if len(self._after) >= MOST_KNOWN or len(self._plans) >= MOST_KNOWN:
            self._forget()
        for earlier in run.callers:
            known = self._after.setdefault(earlier, {})
            if me not in known:
                known[me] = weakref.ref(layer)
                self._plans.clear()
        self._after.setdefault(me, {})

    def _plan(self, layer: Layer, x: torch.Tensor, run: _Run) -> _Together | None:
        """A _Together; None: not now. A CUDA graph's capture makes no plans."""
        if x.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        behind = {found: found() for me, found in self._after[id(layer)].items() if me not in run.callers}
        found = {
            other.kernel_weight(): found
            for found, other in behind.items()
            if other is not None and other.perm is None and other.out_dtype == layer.out_dtype
        }
        if not found or any(tensor.is_inference() for weight in found for tensor in weight.tensors().values()):
            return _Together(x)
        weights, launch = ops.plan_together(x, (layer.kernel_weight(), *found), run.perturbation)
        return _Together(x, [found[weight] for weight in weights[1:]], weights, launch)


_NOTHING: _Kept = None, (), 0
