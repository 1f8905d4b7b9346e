"""The arena of scales: where each scale lies, what is read and written there, and what a move leaves as it was."""

import pytest
import torch

from qzo.nn.arena import ScaleArena, Slot, codebooks_name
from tests.support.close import assert_same_bits

SHAPES = {"b": (5, 3), "a.10": (1, 7), "a.9": (4, 2)}  # 1, 4 and 5 groups: a quad is part full, full, and begun anew


def filled(device="cpu"):
    """(arena, the scales that were written to it, by name)."""
    arena = ScaleArena.of_shapes(SHAPES, device)
    scales = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    for name, values in scales.items():
        arena.write(name, values)
    return arena, scales


def test_it_is_laid_out_by_name_whatever_the_order_it_is_given():
    slots = ScaleArena.of_shapes(SHAPES, "cpu").slots
    assert list(slots) == ["a.10", "a.9", "b"]
    assert {name: slot.base4 for name, slot in slots.items()} == {"a.10": 0, "a.9": 7, "b": 9}


def test_a_slot_has_a_quad_for_each_four_groups_begun():
    assert [Slot(0, groups, 3).quads for groups in (1, 4, 5, 8)] == [3, 3, 6, 6]
    assert ScaleArena.of_shapes(SHAPES, "cpu").data.numel() == 4 * (7 + 2 + 6)


def test_what_is_written_is_read_and_lies_at_its_index():
    arena, scales = filled()
    for name, want in scales.items():
        assert_same_bits(arena.read(name), want)
        assert_same_bits(arena.data[arena.index(name)], want)
        slot, index = arena.slots[name], arena.index(name)
        assert index.dtype == torch.int64
        for g in range(slot.groups):
            for n in range(slot.outputs):
                assert index[g, n] == 4 * (slot.base4 + (g // 4) * slot.outputs + n) + g % 4
                assert arena.quads(name)[g // 4, n, g % 4] == want[g, n]


def test_writing_a_layer_leaves_the_others_and_fills_its_last_quads_with_zeros():
    arena, scales = filled()
    arena.data[arena.slots["b"].base4 * 4 :] = torch.nan
    arena.write("b", scales["b"].double())
    assert_same_bits(arena.read("b"), scales["b"])
    assert (arena.quads("b")[1, :, 1:] == 0).all(), "groups 5 to 7 of a layer that has five"
    for name in ("a.10", "a.9"):
        assert_same_bits(arena.read(name), scales[name])


def test_16_bit_scales_are_held_in_float32():
    arena = ScaleArena.of_shapes({"a": (2, 3)}, "cpu")
    arena.write("a", torch.full((2, 3), 0.1, dtype=torch.float16))
    assert_same_bits(arena.read("a"), torch.full((2, 3), 0.1, dtype=torch.float16).float())


def test_what_is_read_is_a_copy_and_quads_are_the_arena():
    arena, scales = filled()
    arena.read("a.9").zero_()
    assert_same_bits(arena.read("a.9"), scales["a.9"])
    arena.quads("a.9").zero_()
    assert (arena.read("a.9") == 0).all()


def test_places_of_layers_for_noise_that_rows_share():
    arena, _ = filled()
    assert arena.layers().tolist() == [[0, 7, 7], [7, 9, 2], [9, 15, 3]]
    assert arena.layers().dtype == torch.int64
    assert arena.layers() is arena.layers(), "made once"
    arena.move(lambda tensor: tensor.to("meta"))
    assert arena.layers().is_meta, "on the arena's device"


def test_a_move_changes_the_device_and_never_the_dtype():
    arena, scales = filled()
    before = arena.data
    arena.move(lambda tensor: tensor.half())
    assert arena.data is before
    arena.move(lambda tensor: tensor.to("meta", torch.float16))
    assert (arena.data.device.type, arena.data.dtype, arena.data.numel()) == ("meta", torch.float32, before.numel())
    arena.move(lambda tensor: torch.empty_like(tensor, device="cpu"))  # what to_empty does: there is nothing to copy
    arena.write("b", scales["b"])
    assert_same_bits(arena.read("b"), scales["b"])


def test_a_layer_that_it_does_not_hold():
    arena, _ = filled()
    for ask in (arena.read, arena.quads, arena.index, lambda name: arena.write(name, torch.zeros(1, 1))):
        with pytest.raises(KeyError, match="c"):
            ask("c")
    assert codebooks_name("model.q") == "model.q.codebooks"
