"""ScaleArena, the one flat tensor of all scales that train: only it knows where a layer's lie.

Terms (arena, base4, slot): docs/glossary.md.
"""

import dataclasses
from collections.abc import Callable, Mapping

import torch


@dataclasses.dataclass(frozen=True)
class Slot:
    """A layer's place in the arena: quads base4 .. base4 + ceil(groups / 4) * outputs."""

    base4: int
    groups: int
    outputs: int

    @property
    def quads(self) -> int:
        return -(-self.groups // 4) * self.outputs


def codebooks_name(name: str) -> str:
    """Name of the slot that a layer's codebooks have in an arena, where they train."""
    return f"{name}.codebooks"


class ScaleArena:
    """Every trained scale in one flat float32 tensor; layer by layer in the sorted order of names, [ceil(G/4), N, 4].

    Scale (g, n) of a layer has the global index 4 * (base4 + (g // 4) * N + n) + g % 4: what the noise law sees. One
    launch updates everything, and traversal order, tiles and devices cannot change a scale's noise.

    Parameters
    ----------
    slots
        name of a layer -> its place; places follow one another from quad 0 on.
    device
        Where the scales lie. Their values are not set: `write` does it, layer by layer.

    Attributes
    ----------
    data : torch.Tensor
        float32 [4 * quads], contiguous; quads of all slots, four scales each.
    """

    def __init__(self, slots: dict[str, Slot], device: torch.device | str) -> None:
        self.slots = slots
        quads = sum(slot.quads for slot in slots.values())
        # every slot is written next; zeros would take the memory before the layers' own scales have left
        self.data = torch.empty(4 * quads, dtype=torch.float32, device=device)
        self._layers: torch.Tensor | None = None

    @classmethod
    def of_shapes(cls, shapes: Mapping[str, tuple[int, int]], device: torch.device | str) -> "ScaleArena":
        """An arena of layers of these shapes, in the sorted order of their names.

        Parameters
        ----------
        shapes
            name -> (groups, outputs), of scales [G, N].
        device
            Where the scales lie.

        Returns
        -------
        ScaleArena
            Its values are not set.
        """
        slots: dict[str, Slot] = {}
        base4 = 0
        for name in sorted(shapes):
            slots[name] = Slot(base4, *shapes[name])
            base4 += slots[name].quads
        return cls(slots, device)

    def quads(self, name: str) -> torch.Tensor:
        """The layer's scales as the kernels read them.

        Parameters
        ----------
        name
            Of the layer, as in `slots`; KeyError for another.

        Returns
        -------
        torch.Tensor
            A view, float32 [ceil(G/4), N, 4]; what pads G to a multiple of 4 is in no layer's scales.
        """
        slot = self.slots[name]
        return self.data[4 * slot.base4 : 4 * (slot.base4 + slot.quads)].view(-1, slot.outputs, 4)

    def read(self, name: str) -> torch.Tensor:
        """The layer's scales.

        Parameters
        ----------
        name
            Of the layer, as in `slots`; KeyError for another.

        Returns
        -------
        torch.Tensor
            A copy, float32 [G, N].
        """
        slot = self.slots[name]
        return self.quads(name).permute(0, 2, 1).reshape(-1, slot.outputs)[: slot.groups].clone()

    def write(self, name: str, scales: torch.Tensor) -> None:
        """Set the layer's scales.

        Parameters
        ----------
        name
            Of the layer, as in `slots`; KeyError for another.
        scales
            [G, N], of any float dtype; they are kept in float32.
        """
        slot = self.slots[name]
        padded = torch.zeros(-(-slot.groups // 4) * 4, slot.outputs, dtype=torch.float32, device=self.data.device)
        padded[: slot.groups] = scales
        self.quads(name).copy_(padded.view(-1, 4, slot.outputs).permute(0, 2, 1))

    def index(self, name: str) -> torch.Tensor:
        """The global indices by which the noise law knows the layer's scales.

        Parameters
        ----------
        name
            Of the layer, as in `slots`; KeyError for another.

        Returns
        -------
        torch.Tensor
            int64 [G, N], on the arena's device.
        """
        slot = self.slots[name]
        g = torch.arange(slot.groups, device=self.data.device)[:, None]
        n = torch.arange(slot.outputs, device=self.data.device)
        return 4 * (slot.base4 + (g // 4) * slot.outputs + n) + g % 4

    def layers(self) -> torch.Tensor:
        """Where each layer lies, for noise shared by rows.

        Returns
        -------
        torch.Tensor
            int64 [L, 3] on the arena's device: first quad, end and outputs of each layer.
        """
        if self._layers is None or self._layers.device != self.data.device:
            rows = [(slot.base4, slot.base4 + slot.quads, slot.outputs) for slot in self.slots.values()]
            self._layers = torch.tensor(rows, dtype=torch.int64, device=self.data.device)
        return self._layers

    def move(self, apply: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Follow nn.Module._apply to another device, but never to another dtype: the masters stay float32.

        Parameters
        ----------
        apply
            What `_apply` is given: a tensor -> the tensor where, and as, the module wants it.
        """
        device = apply(torch.empty(0, device=self.data.device)).device
        if device == self.data.device:
            return
        if self.data.is_meta:
            self.data = torch.empty_like(self.data, device=device)
        else:
            self.data = self.data.to(device)
