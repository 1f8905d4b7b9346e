"""QZOLinear, a drop-in nn.Linear of quantized weights."""

import torch
from torch import nn

from ..kernels.operands import Weight, addresses
from ..kernels.table import named_table
from . import ops
from .arena import ScaleArena, codebooks_name
from .quantize import quantize_weight
from .weights import PackedWeight, check_bits, check_group_size, to_planes, to_rows


class _NoValues(torch.Tensor):
    """Stands for a matrix that is never made: what it is like can be asked, nothing can be computed with it."""

    @staticmethod
    def __new__(cls, rows, columns, dtype, device):
        return torch.Tensor._make_wrapper_subclass(cls, (rows, columns), dtype=dtype, device=device)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ in ("__get__", "size", "dim", "numel", "is_floating_point"):
            return super().__torch_function__(function, types, args, kwargs or {})
        raise RuntimeError(
            f"{function.__name__}: the weight of a QZOLinear is codes and scales and has no values of "
            "its own; layer(x) multiplies by it, layer.dequantize() makes it"
        )

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function}: the weight of a QZOLinear has no values of its own; use layer.dequantize()")

    def __repr__(self):
        return f"weight of a QZOLinear: {list(self.shape)}, {self.dtype}, no values (see dequantize)"


class QZOLinear(nn.Module):
    """A quantized linear layer whose forward runs under perturbed scales inside `evaluating`.

    y = x . W^T + bias, W[n, k] = scale[k // group_size, n] * (code[n, k] - zero). Use it wherever an nn.Linear
    stands; it holds no gradients. Made from random weights like nn.Linear; see also `from_linear`, `from_packed`.

    Parameters
    ----------
    in_features, out_features, bias : as in nn.Linear
    bits : 2, 4 or 8
    group_size : 32, 64, 128 or -1 (whole row); has to divide in_features
    device : where codes and scales lie
    dtype : of bias and output; None: the output has the dtype of the input

    Input float16, bfloat16 or float32 [..., in_features]; output [..., out_features]. Raises ValueError for a group
    size that does not fit, for other bits, or in forward for rows that the number of evaluations does not divide.
    """

    _siblings = None  # layers of the same module that may be given the same x (siblings.py)

    def __init__(self, in_features, out_features, bias=True, bits=4, group_size=128, device=None, dtype=None):
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

    def _take(self, packed, bias, dtype):
        self.in_features, self.out_features, self.bits = packed.in_features, packed.scales.shape[1], packed.bits
        self.group_size, self.table = packed.in_features // packed.scales.shape[0], packed.table
        self.out_dtype = dtype
        self.trainable = True
        self.register_buffer("codes", packed.codes, persistent=False)
        self.register_buffer("zeros", packed.zeros, persistent=False)
        self.register_buffer("perm", packed.perm, persistent=False)
        self.register_buffer("codebooks", packed.codebooks, persistent=False)
        self.trains_codebooks = False
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._evaluations = self._planned = None
        self.arena = ScaleArena.of_shapes({"": tuple(packed.scales.shape)}, packed.scales.device)
        self.arena_name = ""
        if not packed.scales.is_meta:
            self.arena.write("", packed.scales)

    @classmethod
    def from_packed(cls, packed, bias=None, dtype=None):
        """A layer around a PackedWeight; bias [out_features] or None."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take(packed, bias, dtype)
        return layer

    @classmethod
    def from_linear(cls, linear, bits=4, group_size=128, symmetric=True, table=None):
        """Quantize an nn.Linear: round to nearest with a least-squares refit of the scales (quantize.py).

        table: "nf4", "fp4" or sixteen numbers that the 4-bit codes stand for; None: the codes are integers.
        """
        check_bits(bits)
        group_size = check_group_size(group_size, linear.in_features)
        bias = None if linear.bias is None else linear.bias.detach()
        return cls.from_packed(
            quantize_weight(linear.weight.detach(), group_size, symmetric, bits, named_table(table)), bias
        )

    def packed(self):
        """The layer's weight as it is now; scales are a copy, codes and zeros are the layer's own."""
        return PackedWeight(
            self.codes,
            self.read_scales(),
            self.zeros,
            self.in_features,
            self.bits,
            self.perm,
            self.table,
            None if self.codebooks is None else self.read_codebooks(),
        )

    def dequantize(self):
        """float32 [out_features, in_features] on the layer's device: a whole matrix, for tests and export only."""
        return self.packed().dequantize()

    def read_scales(self):
        """A copy of the scales, float32 [G, N], in the sign of the checkpoint."""
        return self.arena.read(self.arena_name)

    def read_codebooks(self):
        """The codebooks [C, 2^bits, 8] as they are now: a copy in float32 if they train, else the layer's own."""
        if not self.trains_codebooks:
            return self.codebooks
        return self.arena.quads(codebooks_name(self.arena_name)).reshape(self.codebooks.shape).clone()

    @property
    def weight(self):
        """Shape, dtype and device, for models that ask a Linear for them as T5 does. It has no values:
        RuntimeError for whatever is computed with it."""
        dtype = self.out_dtype or (torch.float32 if self.bias is None else self.bias.dtype)
        return _NoValues(self.out_features, self.in_features, dtype, self.codes.device)

    def forward(self, x):
        perturbation, evaluations, perm = None, self._evaluations, self._buffers["perm"]
        if evaluations is not None:
            perturbation = evaluations.perturbation if self.trainable else evaluations.unperturbed
        if perm is not None and x.shape[-1] == self.in_features:  # other widths: ops names the mismatch
            x = x.index_select(-1, perm)
        traced = ops.is_traced(x)
        if self._siblings is not None and perm is None and not traced:
            y = self._siblings.product(self, x, perturbation)
            if y is not None:
                return y
        weight = self._describe() if traced else self.kernel_weight()
        if weight.in_rows and ops.uses_triton(x.device):
            self.codes = to_planes(self.codes, self.in_features, self.bits)
            weight = self.kernel_weight()
        return ops.matmul(x, weight, perturbation, self.out_dtype)

    def kernel_weight(self):
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

    def prepare(self):
        """Make the kernels' weight known where nothing has run yet: compiled code finds it by its tensors."""
        if self._planned is None and not self.codes.is_meta:
            self.kernel_weight()

    def _let_go(self):
        """Of all that was planned with the layer's tensors."""
        self.__dict__["_planned"] = None
        if self._siblings is not None:
            self._siblings.let_go()

    def _describe(self):
        name, books = self.arena_name, {"codebooks": self.codebooks}
        if self.trains_codebooks:
            own = codebooks_name(name)
            books = {
                "codebooks": self.arena.quads(own).view(self.codebooks.shape),
                "book4": self.arena.slots[own].base4,
            }
        return Weight(
            self.codes,
            self.arena.quads(name),
            self.in_features,
            self.group_size,
            self.zeros,
            self.bias,
            self.arena.slots[name].base4,
            self.bits,
            self.table,
            **books,
        )

    def extra_repr(self):
        form = "symmetric" if self.zeros is None else f"{str(self.zeros.dtype).removeprefix('torch.')} zeros"
        form = "table" if self.table else form if self.codebooks is None else f"{len(self.codebooks)} codebooks"
        order = "" if self.perm is None else "sorted columns, "
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, group_size={self.group_size}, {form}, {order}"
            f"{'trained' if self.trainable else 'frozen'}"
        )

    # ------------------------------------------------------------------------------------ moving and saving

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name in ("codes", "zeros", "bias", "codebooks", "arena", "perm", "table", "out_dtype"):
            self._let_go()  # or it would keep the memory of what is replaced

    def __getstate__(self):
        return self.__dict__ | {"_planned": None}  # a copy makes plans of its own

    def _apply(self, fn, recurse=True):
        if self.out_dtype is not None:
            self.out_dtype = fn(torch.empty(0, dtype=self.out_dtype, device=self.codes.device)).dtype
        self._let_go()
        codes, kept = self.codes, {name: self._buffers[name] for name in ("zeros", "codebooks")}
        self._buffers |= dict.fromkeys(kept)  # what a file has in float stays in its type, whatever the model is
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            if tensor is not None:
                self._buffers[name] = (
                    tensor.to(self.codes.device)
                    if not tensor.is_meta
                    else torch.empty_like(tensor, device=self.codes.device)
                )
        if codes.device != self.codes.device and not self.codes.is_meta and self.codebooks is None:
            form = to_rows if self.codes.device.type == "cpu" else to_planes
            self.codes = form(self.codes, self.in_features, self.bits)
        self.arena.move(fn)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        planes = to_planes(self.codes, self.in_features, self.bits)  # words of vectors are what they are
        destination[prefix + "codes"] = planes
        destination[prefix + "scales"] = self.read_scales()
        if self.zeros is not None:
            destination[prefix + "zeros"] = self.zeros
        if self.perm is not None:
            destination[prefix + "perm"] = self.perm
        if self.table is not None:
            destination[prefix + "table"] = torch.tensor(self.table)
        if self.codebooks is not None:
            destination[prefix + "codebooks"] = self.read_codebooks()
        if self.bits != 4:
            destination[prefix + "bits"] = torch.tensor(self.bits)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        own = {
            name: state_dict.pop(prefix + name, None)
            for name in ("codes", "scales", "zeros", "bits", "perm", "table", "codebooks")
        }
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing_keys += [prefix + name for name in ("codes", "scales") if own[name] is None]
        if own["codes"] is None or own["scales"] is None:
            return
        try:
            bits = 4 if own["bits"] is None else int(own["bits"])
            if bits != self.bits:
                raise ValueError(f"holds codes of {bits} bits, the layer has {self.bits}")
            loaded = PackedWeight(
                own["codes"],
                own["scales"].to(torch.float32),
                own["zeros"],
                self.in_features,
                self.bits,
                own["perm"],
                None if own["table"] is None else own["table"].tolist(),
                own["codebooks"],
            )
            if (loaded.out_features, loaded.group_size) != (self.out_features, self.group_size):
                raise ValueError(
                    f"holds {loaded.out_features} outputs in groups of {loaded.group_size}, the layer has "
                    f"{self.out_features} in groups of {self.group_size}"
                )
            if loaded.books != (0 if self.codebooks is None else len(self.codebooks)):
                raise ValueError(
                    f"holds {loaded.books} codebooks, the layer has "
                    f"{0 if self.codebooks is None else len(self.codebooks)}"
                )
        except ValueError as error:
            error_msgs.append(f"{prefix.removesuffix('.')}: {error}")
            return
        device = self.codes.device
        rows = self.codes.dtype == torch.uint8
        codes = loaded.codes.to(device)
        form = to_rows if rows else to_planes
        self.codes = form(codes, self.in_features, self.bits).clone()
        if loaded.books:
            self.codebooks.copy_(loaded.codebooks)
            if self.trains_codebooks:
                self.arena.quads(codebooks_name(self.arena_name)).copy_(loaded.codebooks.reshape(1, -1, 4))
        self.zeros = None if loaded.zeros is None else loaded.zeros.to(device, copy=True)
        self.perm = None if loaded.perm is None else loaded.perm.to(device, copy=True)
        self.table = loaded.table
        self.arena.write(self.arena_name, loaded.scales)
