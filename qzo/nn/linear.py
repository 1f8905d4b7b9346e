"""QZOLinear, a drop-in nn.Linear of quantized weights."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..kernels.operands import Weight, addresses
from ..kernels.table import named_table
from . import ops
from .arena import ScaleArena, codebooks_name
from .evaluations import Evaluations
from .no_values import NoValues
from .part import Part, Stored
from .quantize import quantize_weight
from .siblings import Siblings
from .state import NAMES, packed_of
from .weights import PackedWeight, check_bits, check_group_size, to_planes, to_rows

_OFFLOADED = "the codes are offloaded and stay where they are: restore() what qzo.offload has returned first"
_IN_PARTS = "the layer holds one rank's part of its codes: qzo.unshard_(model) on all ranks first"


class QZOLinear(nn.Module):
    """A quantized linear layer whose forward runs under perturbed scales inside `evaluating`.

    y = x . W^T + bias, W[n, k] = scale[k // group_size, n] * (code[n, k] - zero). Use it wherever an nn.Linear
    stands; it holds no gradients. Made from random weights like nn.Linear; see also `from_linear`, `from_packed`. The
    scales lie in a `ScaleArena`, in float32 whatever the dtype of the model. Forward under perturbed scales: arXiv
    2505.13430, section 3.

    Input float16, bfloat16 or float32 [..., in_features]; output [..., out_features].

    Parameters
    ----------
    in_features
        Of the last dimension of the input, K.
    out_features
        Of the last dimension of the output, N.
    bias
        Whether a bias [out_features] is added, as in nn.Linear. It does not train.
    bits
        Of a code: 2, 4 or 8.
    group_size
        Inputs that share a scale: 32, 64, 128 or -1 (the whole row); has to divide in_features.
    device
        Where codes and scales lie; None: torch's default device.
    dtype
        Of bias and output; None: the output has the dtype of the input.

    Raises
    ------
    ValueError
        A group size that does not fit, other bits; in forward: rows that the number of evaluations does not divide.
    TypeError
        In forward: an input of another dtype.
    """

    codes: torch.Tensor
    zeros: torch.Tensor | None
    perm: torch.Tensor | None
    codebooks: torch.Tensor | None
    bias: nn.Parameter | None
    table: tuple[float, ...] | None
    out_dtype: torch.dtype | None
    evaluations: Evaluations | None  # what forward runs under; `evaluating` sets it
    siblings: Siblings | None = None  # layers of the same module that may be given the same x (siblings.py)
    stored: Stored | None = None  # what `codes` and `zeros` have while the layer runs; None: they always have it
    part: Part | None = None  # what of the codes and zeros of the whole layer this rank has; None: all
    _planned: tuple[object, Weight] | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        bits: int = 4,
        group_size: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_bits(bits)
        group_size = check_group_size(group_size, in_features)
        device = torch.device(device or torch.get_default_device())
        if device.type == "meta":
            packed = PackedWeight.on_meta((out_features, in_features), group_size, bits)
            source_bias = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        else:
            linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=torch.float32)
            packed = quantize_weight(linear.weight.detach(), group_size, bits=bits)
            source_bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        self._take(packed, source_bias, dtype)

    def _take(self, packed: PackedWeight, bias: torch.Tensor | None, dtype: torch.dtype | None) -> None:
        self.in_features, self.out_features, self.bits = packed.in_features, packed.scales.shape[1], packed.bits
        self.group_size, self.table = packed.in_features // packed.scales.shape[0], packed.table
        self.out_dtype, self.trainable = dtype, True
        self.register_buffer("codes", packed.codes, persistent=False)
        self.register_buffer("zeros", packed.zeros, persistent=False)
        self.register_buffer("perm", packed.perm, persistent=False)
        self.register_buffer("codebooks", packed.codebooks, persistent=False)
        self.trains_codebooks = False
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.evaluations = self._planned = None
        self.arena = ScaleArena.of_shapes({"": (packed.scales.shape[0], self.out_features)}, packed.scales.device)
        self.arena_name = ""
        if not packed.scales.is_meta:
            self.arena.write("", packed.scales)

    @classmethod
    def from_packed(
        cls, packed: PackedWeight, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> "QZOLinear":
        """A layer around a PackedWeight, whose codes it takes as they are.

        Parameters
        ----------
        packed
            W [N, K], with its scales; a copy of those goes into the layer's arena.
        bias
            [N], or None.
        dtype
            Of the output; None: that of the input.

        Returns
        -------
        QZOLinear
            On the device of `packed`.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take(packed, bias, dtype)
        return layer

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        bits: int = 4,
        group_size: int = 128,
        symmetric: bool = True,
        table: str | Sequence[float] | None = None,
    ) -> "QZOLinear":
        """Quantize an nn.Linear: round to nearest with a least-squares refit of the scales (quantize.py).

        Parameters
        ----------
        linear
            With a weight [N, K] of any float dtype, and a bias [N] or none; it stays as it is.
        bits
            Of a code: 2, 4 or 8.
        group_size
            Inputs that share a scale: 32, 64, 128 or -1 (the whole row); has to divide K.
        symmetric
            Whether every zero point is the middle code, 2^(bits - 1); else each group has its own.
        table
            "nf4" (arXiv 2305.14314, appendix E), "fp4" or sixteen numbers that the 4-bit codes stand for; None: the
            codes are integers.

        Returns
        -------
        QZOLinear
            On the device of `linear`, with its bias.

        Raises
        ------
        ValueError
            A group size that does not fit, other bits, a table beside other bits than 4 or zero points, a weight that
            is not finite.
        """
        check_bits(bits)
        group_size = check_group_size(group_size, linear.in_features)
        bias = None if linear.bias is None else linear.bias.detach()
        return cls.from_packed(
            quantize_weight(linear.weight.detach(), group_size, symmetric, bits, named_table(table)), bias
        )

    def packed(self) -> PackedWeight:
        """The layer's weight as it is now; scales are a copy, codes and zeros are the layer's own."""
        (codes, zeros), scales, books = self.read_codes(), self.read_scales(), self.read_codebooks()
        return PackedWeight(codes, scales, zeros, self.in_features, self.bits, self.perm, self.table, books)

    def dequantize(self) -> torch.Tensor:
        """The matrix W, for tests and export only: forward never makes it.

        Returns
        -------
        torch.Tensor
            float32 [out_features, in_features] on the layer's device.
        """
        return self.packed().dequantize()

    def read_codes(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Codes and zero points: the layer's own, or copies where offloaded, or in parts (on all ranks at once)."""
        if self.part is not None:
            return self.part.whole_codes(self.codes), self.part.whole_zeros(self.zeros)
        if self.stored is None:
            return self.codes, self.zeros
        codes = self.stored.read("codes")
        assert codes is not None, "every layer has codes"
        return codes, self.stored.read("zeros")

    def read_scales(self) -> torch.Tensor:
        """A copy of the scales, float32 [G, N], in the sign of the checkpoint."""
        return self.arena.read(self.arena_name)

    def read_codebooks(self) -> torch.Tensor | None:
        """The codebooks [C, 2^bits, 8]: a copy in float32 if they train, else the layer's own; None: there are none."""
        return self.trained_codebooks() if self.trains_codebooks else self.codebooks

    def trained_codebooks(self) -> torch.Tensor:
        """A copy of codebooks that train, float32 [C, 2^bits, 8]."""
        return self.arena.quads(codebooks_name(self.arena_name)).reshape(self.held_codebooks().shape).clone()

    def held_codebooks(self) -> torch.Tensor:
        """The layer's own codebooks [C, 2^bits, 8], as they were loaded. ValueError where it has none."""
        if self.codebooks is None:
            raise ValueError("the layer has no codebooks: only AQLM layers have codebooks")
        return self.codebooks

    def join(self, arena: ScaleArena, name: str, codebooks: bool = False) -> None:
        """Move to an arena that has a slot of this name, and one of codebooks_name(name) where codebooks are to train.

        What the layer holds is written there, but for an arena on the meta device, which holds no values.
        """
        if not arena.data.is_meta:
            arena.write(name, self.read_scales())
            if codebooks:
                trained = self.trained_codebooks() if self.trains_codebooks else self.held_codebooks()
                arena.quads(codebooks_name(name)).copy_(trained.reshape(1, -1, 4))
        self.arena, self.arena_name, self.trains_codebooks = arena, name, codebooks

    @property
    def weight(self) -> torch.Tensor:
        """Shape, dtype and device, for models that ask a Linear for them as T5 does. It has no values:
        RuntimeError for whatever is computed with it."""
        dtype = self.out_dtype or (torch.float32 if self.bias is None else self.bias.dtype)
        return NoValues(self.out_features, self.in_features, dtype, self.codes.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., N] of x [..., K], in `out_dtype`, or that of x; under the evaluations of `evaluating`, if any."""
        if self.part is not None:
            return self.part.forward(x, self._product, self.out_dtype, self.bias)
        return self._product(x, self.out_dtype)

    def _product(self, x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        """What `forward` gives, in dtype, or that of x, by the codes that are here."""
        perturbation, evaluations, perm = None, self.evaluations, self._buffers["perm"]
        if evaluations is not None:
            perturbation = evaluations.perturbation if self.trainable else evaluations.unperturbed
        if perm is not None and x.shape[-1] == self.in_features:  # other widths: ops names the mismatch
            x = x.index_select(-1, perm)
        traced = ops.is_traced(x)
        if self.siblings is not None and perm is None and not traced and dtype == self.out_dtype:
            y = self.siblings.product(self, x, perturbation)
            if y is not None:
                return y
        weight = self._describe() if traced else self.kernel_weight()
        if weight.in_rows and ops.uses_triton(x.device):
            self.codes = to_planes(self.codes, weight.in_features, self.bits)
            weight = self.kernel_weight()
        return ops.matmul(x, weight, perturbation, dtype)

    def kernel_weight(self) -> Weight:
        """The weight as the kernels take it; the same object, with what was planned for it, until a tensor moves."""
        buffers, arena = self._buffers, self.arena
        now = (
            arena.slots[self.arena_name],
            self.trains_codebooks,
            addresses(arena.data, buffers["codes"], buffers["zeros"], self.bias, buffers["codebooks"]),
        )
        if self._planned is None or self._planned[0] != now:
            weight = self._describe()
            ops.know(weight)
            self._planned = now, weight
        return self._planned[1]

    def prepare(self) -> None:
        """Make the kernels' weight known where nothing has run yet: compiled code finds it by its tensors."""
        if self._planned is None and not self.codes.is_meta:
            self.kernel_weight()

    def _let_go(self) -> None:
        """Of all that was planned with the layer's tensors."""
        self.__dict__["_planned"] = None
        if self.siblings is not None:
            self.siblings.let_go()

    def _describe(self) -> Weight:
        name, books, book4 = self.arena_name, self.codebooks, -1
        if self.trains_codebooks:
            own = codebooks_name(name)
            books = self.arena.quads(own).view(self.held_codebooks().shape)
            book4 = self.arena.slots[own].base4
        weight = Weight(
            self.codes,
            self.arena.quads(name),
            self.in_features,
            self.group_size,
            self.zeros,
            self.bias,
            self.arena.slots[name].base4,
            self.bits,
            self.table,
            books,
            book4,
        )
        return weight if self.part is None else self.part.weight_of(weight)

    def extra_repr(self) -> str:
        form = "symmetric" if self.zeros is None else f"{str(self.zeros.dtype).removeprefix('torch.')} zeros"
        form = "table" if self.table else form if self.codebooks is None else f"{len(self.codebooks)} codebooks"
        order = "" if self.perm is None else "sorted columns, "
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, group_size={self.group_size}, {form}, {order}"
            f"{'trained' if self.trainable else 'frozen'}"
        )

    # ------------------------------------------------------------------------------------ moving and saving

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("codes", "zeros", "bias", "codebooks", "arena", "perm", "table", "out_dtype", "part"):
            self._let_go()  # or it would keep the memory of what is replaced

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_planned": None}  # a copy makes plans of its own

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QZOLinear":
        if self.out_dtype is not None:
            self.out_dtype = fn(torch.empty(0, dtype=self.out_dtype, device=self.codes.device)).dtype
        if self.stored is not None and fn(torch.empty(0, device=self.codes.device)).device != self.codes.device:
            raise RuntimeError(_OFFLOADED)
        self._let_go()
        codes, kept = self.codes, {name: self._buffers[name] for name in ("zeros", "codebooks")}
        self._buffers |= dict.fromkeys(kept)  # what a file has in float stays in its type, whatever the model is
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            if tensor is not None:
                device = self.codes.device
                self._buffers[name] = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
        if codes.device != self.codes.device and not self.codes.is_meta and self.codebooks is None:
            form = to_rows if self.codes.device.type == "cpu" else to_planes
            self.codes = form(self.codes, self._describe().in_features, self.bits)
        self.arena.move(fn)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.part is not None:  # one rank alone would wait for the others
            raise ValueError(_IN_PARTS)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        codes, zeros = self.read_codes()
        destination[prefix + "codes"] = to_planes(codes, self.in_features, self.bits)  # words of vectors stay
        destination[prefix + "scales"] = self.read_scales()
        more = {"zeros": zeros, "perm": self.perm, "codebooks": self.read_codebooks()}
        destination.update({prefix + name: tensor for name, tensor in more.items() if tensor is not None})
        if self.table is not None:
            destination[prefix + "table"] = torch.tensor(self.table)
        if self.bits != 4:
            destination[prefix + "bits"] = torch.tensor(self.bits)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {name: state_dict.pop(prefix + name, None) for name in NAMES}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing_keys += [prefix + name for name in ("codes", "scales") if own[name] is None]
        if own["codes"] is None or own["scales"] is None:
            return
        try:
            if self.stored is not None or self.part is not None:
                raise ValueError(_OFFLOADED if self.part is None else _IN_PARTS)
            books = 0 if self.codebooks is None else len(self.codebooks)
            loaded = packed_of(own, self.bits, self.in_features, self.out_features, self.group_size, books)
        except ValueError as error:
            error_msgs.append(f"{prefix.removesuffix('.')}: {error}")
            return
        device = self.codes.device
        form = to_rows if self.codes.dtype == torch.uint8 else to_planes
        self.codes = form(loaded.codes.to(device), self.in_features, self.bits).clone()
        if loaded.codebooks is not None:
            self.held_codebooks().copy_(loaded.codebooks)
            if self.trains_codebooks:
                self.arena.quads(codebooks_name(self.arena_name)).copy_(loaded.codebooks.reshape(1, -1, 4))
        self.zeros = None if loaded.zeros is None else loaded.zeros.to(device, copy=True)
        self.perm = None if loaded.perm is None else loaded.perm.to(device, copy=True)
        self.table = loaded.table
        self.arena.write(self.arena_name, loaded.scales)
