"""Bytes that are held, and when: meters that read them off a device, and a ledger that predicts them.

The ledger is a dispatch mode. The same forward that trains is run on the meta device, where tensors have shapes and
no bytes; each new storage adds its bytes, each one freed takes them off. What an operator allocates inside itself is
not seen from there and is added by the formulas that stand beside the code: `scratch_bytes` in kernels/, and the
attention's here.
"""

import contextlib
import ctypes
import dataclasses
import functools
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..kernels import dequantize, perturb, plan, qmm_torch, tiles
from ..kernels.operands import Perturbation, Weight
from ..nn.layers import layers
from ..nn.linear import QZOLinear
from ..nn.ops import many_rows_form, pick_tile

aten = torch.ops.aten
CHIPS = tuple(tiles.PROCESSORS)
# what torch gives cuBLAS to work in, once per stream: 32 MiB from Hopper on, 4096 KiB x 2 + 16 KiB x 8 before
CUBLAS_BYTES = {9: 32 << 20, 8: 8_519_680}


def check_chip(chip: str) -> str:
    """ValueError naming the chips there are."""
    if chip not in CHIPS:
        raise ValueError(f"chip {chip!r} is not known; there are {', '.join(CHIPS)}")
    return chip


def library_bytes(device: str, chip: str) -> int:
    """What a dense matmul of the output head makes its library keep."""
    if device == "cpu" or chip.startswith("gfx"):
        return 0
    return CUBLAS_BYTES[9 if int(chip.removeprefix("sm_")) >= 90 else 8]


def allocated(nbytes: int, device: str) -> int:
    """Bytes that the allocator takes for a tensor: 512 at a time on a GPU; on a CPU pages, large ones being maps."""
    unit = 512 if device == "cuda" else 4096 if nbytes >= 1 << 16 else 64
    return -(-nbytes // unit) * unit


def weights_bytes(model: nn.Module, device: str) -> dict[str, int]:
    """{"codes", "scales", "zeros", "dense"}: what a model holds between steps, each storage once."""
    found = list(layers(model, trainable=None).values())
    held: dict[str, list[torch.Tensor | None]] = {
        "codes": [layer.codes for layer in found],
        "zeros": [layer.zeros for layer in found],
        "scales": list({id(layer.arena): layer.arena.data for layer in found}.values()),
    }
    own = {id(t) for tensors in held.values() for t in tensors}
    held["dense"] = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in own]
    sizes = {}
    for what, tensors in held.items():
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t is not None}
        sizes[what] = sum(allocated(size, device) for size in storages.values())
    return {what: sizes[what] for what in ("codes", "scales", "zeros", "dense")}


# ---------------------------------------------------------------------------------------------- meters


class Meter(Protocol):
    """Bytes that are held, now and at most since `reset`."""

    def current(self) -> int:
        """Bytes that are held now."""

    def peak(self) -> int:
        """The most that were held since `reset`."""

    def reset(self) -> None:
        """Begin a new peak, at what is held now."""


class DeviceMeter:
    """What torch's CUDA allocator holds, memory_allocated and max_memory_allocated, less what it held at the start."""

    def __init__(self, device: str = "cuda") -> None:
        self.device, self.start = device, 0
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        self.start = self.settled()
        self.reset()

    def settled(self) -> int:
        gc.collect()
        return self.current()

    def current(self) -> int:
        return torch.cuda.memory_allocated(self.device) - self.start

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) - self.start

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)


def map_large_blocks() -> None:
    """Make every block from 64 KB on a map of its own, which leaves the resident set when it is freed. To be called
    before large blocks come from the heap: what is free there is used first."""
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD


class ResidentMeter:
    """The process's resident set, less what was resident at the start: VmRSS, VmHWM of Linux.

    What earlier work freed is given back first, or new blocks would hide in it.
    """

    def __init__(self) -> None:
        map_large_blocks()
        self.start = 0
        self.start = self.settled()
        self.reset()

    def settled(self) -> int:
        """What is resident once all that is free has left."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return self.current()

    def _read(self, field: str) -> int:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith(field)) - self.start

    def current(self) -> int:
        return self._read("VmRSS:")

    def peak(self) -> int:
        return self._read("VmHWM:")

    def reset(self) -> None:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")


class Ledger(TorchDispatchMode):
    """Predicts a meter's readings for what runs inside on the meta device.

    device, chip: whose allocator and tiles; labelled: how many positions `nonzero` is to find; padded: what a
    question about a tensor's values is answered (the attention mask asks whether every position is attended).
    """

    def __init__(self, device: str, chip: str, labelled: int, padded: bool, threads: int = 1) -> None:
        super().__init__()
        self.device, self.chip, self.labelled, self.padded, self.threads = device, chip, labelled, padded, threads
        self.now = self.most = 0
        self._known: set[int] = set()
        self._attention = _OneAttention(self)

    def __enter__(self) -> "Ledger":
        self._attention.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._attention.__exit__(*error)

    def current(self) -> int:
        return self.now

    def peak(self) -> int:
        return self.most

    def reset(self) -> None:
        self.most = self.now

    def hold(self, nbytes: int) -> None:
        """Bytes that come and stay."""
        self.now += nbytes
        self.most = max(self.most, self.now)

    def brush(self, nbytes: int) -> None:
        """Bytes that come and go inside an operator."""
        self.most = max(self.most, self.now + allocated(nbytes, self.device))

    def know(self, tensors: Iterable[torch.Tensor]) -> None:
        """Storages that are counted elsewhere."""
        for t in tensors:
            self._known.add(t.untyped_storage()._cdata)

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is aten._local_scalar_dense.default and args[0].is_meta:
            return not self.padded if args[0].dtype == torch.bool else 0
        if function is aten.nonzero.default and args[0].is_meta:
            result = args[0].new_empty(self.labelled, args[0].dim(), dtype=torch.int64)
        else:
            result = function(*args, **kwargs)
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.is_meta:
                self._enter(t.untyped_storage())
        if function is torch.ops.qzo.qmm.default:
            self.brush(self._qmm_scratch(*args, **kwargs))
        return result

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or not storage.nbytes():
            return
        self._known.add(key)
        size = allocated(storage.nbytes(), self.device)
        self.hold(size)
        weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def _qmm_scratch(
        self,
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bias: torch.Tensor | None,
        seeds: torch.Tensor,
        coefs: torch.Tensor,
        base4: int,
        group: int,
        law: int,
        relative: bool,
        out_dtype: torch.dtype | None,
        shared: bool = False,
        pair: bool = False,
        large_rows: str = "fused",
        bits: int = 4,
        table: tuple[float, ...] | None = None,
        exact: bool = False,
        codebooks: torch.Tensor | None = None,
        book4: int = -1,
    ) -> int:
        m, k = x.shape
        weight = Weight(codes, scales, k, group, zeros, bias, base4, bits, table, codebooks, book4)
        cast = 0  # codebooks in the type of x, and as the CPU reads them
        if codebooks is not None and (book4 >= 0 or codebooks.dtype != x.dtype):
            cast += codebooks.numel() * x.element_size()
        if self.device == "cpu":
            cast += codebooks.numel() * 4 if codebooks is not None and x.dtype != torch.float32 else 0
            cast += perturb.scratch_bytes(codebooks.numel() // 4) if codebooks is not None and book4 >= 0 and law else 0
            return cast + qmm_torch.scratch_bytes(
                m, x.dtype, weight, Perturbation(seeds, coefs, law, relative, shared), self.threads
            )
        form = many_rows_form(large_rows, m // seeds.numel(), weight, x.dtype, exact)
        if form == "blas":
            return cast + dequantize.scratch_bytes(weight.out_features, k, x.dtype)
        copy = 0 if x.is_contiguous() else m * k * x.element_size()
        if form == "folded":
            return cast + copy
        tile = pick_tile(m // seeds.numel(), weight, x.dtype, self.chip, exact)
        return cast + copy + plan.scratch_bytes(m, weight, tile)


class _OneAttention(TorchFunctionMode):
    """Attention as the fused kernels do it: no scores are held, the output lies as [batch, tokens, heads, width].

    A boolean mask is made one of floats first; a log-sum-exp per query and head comes with the output.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        return function(*args, **kwargs)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        *rest: Any,
        **more: Any,
    ) -> torch.Tensor:
        batch, heads, tokens, _ = query.shape
        out = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        mask = (
            0
            if attn_mask is None or attn_mask.dtype != torch.bool
            else (attn_mask.untyped_storage().nbytes() * query.element_size())
        )
        self.ledger.brush(mask + 4 * batch * heads * tokens)
        return out


# ---------------------------------------------------------------------------------------------- a step, cut in spans


@dataclasses.dataclass(frozen=True)
class Span:
    """Between two cuts: its phase, the layer that ran (None between layers), bytes before, at most, and after."""

    phase: str
    layer: str | None
    before: int
    peak: int
    after: int


class Spans:
    """Cuts a step at every QZOLinear and at the end of the model's body, and reads the meter at each cut.

    Phases: "forward" until the body has run, "loss" until the losses are there, "update" after them.
    """

    def __init__(self, model: nn.Module, body: nn.Module, meter: Meter) -> None:
        self.model, self.body, self.meter = model, body, meter
        self.found: list[Span] = []
        self.phase, self.at = "forward", 0

    def cut(self, layer: str | None = None) -> None:
        after = self.meter.current()
        self.found.append(Span(self.phase, layer, self.at, max(self.meter.peak(), self.at, after), after))
        self.begin()

    def begin(self) -> None:
        self.meter.reset()
        self.at = self.meter.current()

    def enter(self, phase: str) -> None:
        self.cut()
        self.phase = phase

    @contextlib.contextmanager
    def watching(self) -> Iterator["Spans"]:
        """Hooks in place; the rest of the step is cut on exit."""
        handles = []
        within = set(self.body.modules())  # a body may be called again for what it gave: its layers are not
        for name, module in self.model.named_modules():
            if isinstance(module, QZOLinear):
                before = functools.partial(self._before, module in within)
                handles.append(module.register_forward_pre_hook(before))
                handles.append(module.register_forward_hook(functools.partial(self._after, name)))
        handles.append(self.body.register_forward_hook(lambda *_: self.enter("loss")))
        self.begin()
        try:
            yield self
            self.cut()
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, within: bool, *_: object) -> None:
        if within and self.phase != "forward":
            self.enter("forward")
        else:
            self.cut()

    def _after(self, name: str, *_: object) -> None:
        self.cut(name)


def parts_of(span: Span, resident: int) -> dict[str, int]:
    """What a span's peak consists of. In a layer, whatever is above its input and output is workspace; in the loss,
    whatever comes on top of what the body left is logits; in the update all is workspace."""
    above = span.peak - resident
    if span.phase == "forward":
        workspace = max(0, span.peak - max(span.before, span.after)) if span.layer else 0
        return {"activations": above - workspace, "logits": 0, "workspace": workspace}
    if span.phase == "loss":
        logits = max(0, span.peak - span.before)
        return {"activations": above - logits, "logits": logits, "workspace": 0}
    return {"activations": 0, "logits": 0, "workspace": above}
