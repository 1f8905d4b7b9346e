"""What a layer holds where it does not hold all of its codes: a Part of them, one of several ranks'; or none, where
they are only on their way through its device (Stored, which streaming/offload.py has).

The scales of a layer in parts lie in the arena as ever, all of them on every rank: they are a small part of its bytes,
their indices, and so their noise and the update, are those of the whole layer, and no rank has to be told of them.

Of W [N, K] over R ranks:

    style                    a rank multiplies by                    its input             its output
    colwise                  N / R outputs                           whole                 its own
    colwise_gather_output    N / R outputs                           whole                 whole
    rowwise                  K / R inputs, the sums then added       its own               whole
    rowwise_split_input      K / R inputs, the sums then added       whole                 whole

A part by inputs begins where a quad of groups does, and ends where a group does: where K / R has no whole quads it
holds some of the neighbours' codes too, which are multiplied by zeros. Its sums are float32 and added in the order of
the ranks, on each: all have the same bits, which are not those of one sum over all of K.

Terms (part, quad, rank): docs/glossary.md.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch

from ..kernels.codes import pack_planes, pack_rows
from ..kernels.operands import Weight
from ..kernels.vectors import LENGTH, pack_vectors, unpack_vectors
from ..system.ranks import Ranks
from .weights import unpack_codes

STYLES = ("colwise", "colwise_gather_output", "rowwise", "rowwise_split_input")

Product = Callable[[torch.Tensor, torch.dtype | None], torch.Tensor]  # x, dtype of the output (None: of x)


class Stored(Protocol):
    """Where the codes of a layer are, if they are only on their way through its device (streaming/offload.py)."""

    def read(self, what: str) -> torch.Tensor | None:
        """A copy of the "codes" or "zeros" on the layer's device; None where it has none."""


@dataclasses.dataclass(frozen=True)
class Part:
    """The part of one of `ranks` in a layer W [outputs, inputs], cut in a way of STYLES.

    group : inputs that share a scale
    bits, books : of a code; codebooks, 0 of other codes
    rank : whose; that of this process

    ValueError for a layer that cannot be cut so: both numbers are named.
    """

    outputs: int
    inputs: int
    group: int
    style: str
    ranks: Ranks
    rank: int
    bits: int = 4
    books: int = 0

    def __post_init__(self) -> None:
        count, what = self.ranks.count, "inputs" if self.by_inputs else "outputs"
        size = self.inputs if self.by_inputs else self.outputs
        if size % count:
            raise ValueError(f"{size} {what} ({self.style}) cannot be divided over {count} ranks: start as many as do")
        if self.by_inputs and self.books and size // count % LENGTH:
            raise ValueError(
                f"{size} inputs ({self.style}) over {count} ranks are {size // count} each, but codes stand for "
                f"vectors of {LENGTH}: start as many ranks as leave whole ones"
            )

    @property
    def by_inputs(self) -> bool:
        return self.style.startswith("rowwise")

    @property
    def own(self) -> slice:
        """The inputs, or outputs, that are this rank's alone."""
        size = (self.inputs if self.by_inputs else self.outputs) // self.ranks.count
        return slice(self.rank * size, (self.rank + 1) * size)

    @property
    def whole_row(self) -> bool:
        return self.group == self.inputs

    @property
    def cuts_rows(self) -> bool:
        """Whether ranks hold different groups of an output row."""
        return self.by_inputs and not self.whole_row

    @property
    def columns(self) -> slice:
        """The inputs whose codes are held."""
        if not self.by_inputs or self.whole_row:
            return self.own if self.by_inputs else slice(0, self.inputs)
        return slice(self.own.start // (4 * self.group) * 4 * self.group, -(-self.own.stop // self.group) * self.group)

    @property
    def rows(self) -> slice:
        """The outputs whose codes are held."""
        return slice(0, self.outputs) if self.by_inputs else self.own

    @property
    def width(self) -> int:
        """Inputs whose codes are held."""
        return self.columns.stop - self.columns.start

    @property
    def groups(self) -> slice:
        """The groups of those inputs."""
        return (
            slice(0, 1) if self.whole_row else slice(self.columns.start // self.group, self.columns.stop // self.group)
        )

    # ------------------------------------------------------------------------------------------ cutting, and back

    def codes_of(self, codes: torch.Tensor) -> torch.Tensor:
        """This part of the codes of the whole layer, in the form that they have."""
        return self._packed(self._unpacked(codes, self.inputs)[self.rows, self._units(self.columns)], codes.dtype)

    def zeros_of(self, zeros: torch.Tensor | None) -> torch.Tensor | None:
        """This part of the zero points [G, N] of the whole layer."""
        return None if zeros is None else zeros[self.groups, self.rows].clone()

    def whole_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """The codes of the whole layer; every rank has to ask at the same time."""
        mine = self._units(slice(self.own.start - self.columns.start, self.own.stop - self.columns.start))
        plain = self._unpacked(codes, self.width)
        every = self.ranks.exchange(plain[:, mine] if self.by_inputs else plain)
        return self._packed(torch.cat(every, int(self.by_inputs)), codes.dtype)

    def whole_zeros(self, zeros: torch.Tensor | None) -> torch.Tensor | None:
        """The zero points of the whole layer; every rank has to ask at the same time."""
        if zeros is None or (self.by_inputs and self.whole_row):
            return zeros
        if not self.by_inputs:
            return torch.cat(self.ranks.exchange(zeros), 1)
        parts = [dataclasses.replace(self, rank=rank).groups for rank in range(self.ranks.count)]
        padded = zeros.new_zeros(max(part.stop - part.start for part in parts), self.outputs)
        padded[: len(zeros)] = zeros
        whole = zeros.new_empty(self.inputs // self.group, self.outputs)
        for part, found in zip(parts, self.ranks.exchange(padded), strict=True):
            whole[part] = found[: part.stop - part.start]
        return whole

    def _units(self, inputs: slice) -> slice:
        """What of unpacked codes belongs to these inputs."""
        return slice(inputs.start // LENGTH, inputs.stop // LENGTH) if self.books else inputs

    def _unpacked(self, codes: torch.Tensor, inputs: int) -> torch.Tensor:
        if self.books:
            return unpack_vectors(codes, inputs, self.books, self.bits)
        return unpack_codes(codes, inputs, self.bits)

    def _packed(self, plain: torch.Tensor, form: torch.dtype) -> torch.Tensor:
        if self.books:
            return pack_vectors(plain, self.bits)
        return (pack_rows if form == torch.uint8 else pack_planes)(plain.contiguous(), self.bits)

    # ---------------------------------------------------------------------------------------------- multiplying

    def weight_of(self, layer: Weight) -> Weight:
        """What this rank multiplies by: this part's codes and zero points, which `layer` has, and of its scales and
        bias, which are the whole layer's, those that belong to them."""
        first = self.groups.start // 4
        return dataclasses.replace(
            layer,
            scales=layer.scales[first : -(-self.groups.stop // 4), self.rows],
            in_features=self.width,
            group=min(self.group, self.width),
            bias=None if layer.bias is None or self.by_inputs else layer.bias[self.rows],
            base4=layer.base4 + first * self.outputs + self.rows.start,
            plans={},
        )

    def forward(
        self, x: torch.Tensor, product: Product, dtype: torch.dtype | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """y of x by `product` with this part's weight, in dtype (None: that of x), and what the style asks for."""
        if self.style == "colwise":
            return product(x, dtype)
        if not self.by_inputs:
            return torch.cat(self.ranks.exchange(product(x, dtype)), -1)
        total, *others = self.ranks.exchange(product(self._own_inputs(x), torch.float32))
        for other in others:
            total += other
        if bias is not None:
            total += bias
        return total.to(dtype or x.dtype)

    def _own_inputs(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., width] of the inputs whose codes are held, zeros where they are a neighbour's."""
        own, held = self.own, self.columns
        wanted = self.inputs if self.style == "rowwise_split_input" else own.stop - own.start
        if x.shape[-1] != wanted:
            raise ValueError(
                f"x has {x.shape[-1]} columns, this part of a {self.style} layer of {self.inputs} inputs over "
                f"{self.ranks.count} ranks takes {wanted}: what feeds it has to be cut by the same plan"
            )
        if self.style == "rowwise_split_input":
            x = x[..., own]
        return torch.nn.functional.pad(x, (own.start - held.start, held.stop - own.stop)) if held != own else x
