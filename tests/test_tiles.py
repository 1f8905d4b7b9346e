"""tiles.pick: a pure function of the rows of one evaluation, the layer and the chip."""

import inspect
import itertools

import pytest
import torch

from qzo.kernels import tiles

ARCHES = (*tiles.PROCESSORS, "interpreter")
ROWS = (1, 16, 17, 32, 33, 64, 65, 128, 129, 8192)
SHAPES = ((4096, 4096, 128), (192, 576, 64), (14336, 4096, 32), (4096, 14336, 14336))  # n, k, group


def every_pick():
    for arch, rows, (n, k, group), zeros in itertools.product(
        ARCHES, ROWS, SHAPES, (None, torch.uint8, torch.float32)
    ):
        yield arch, rows, n, k, group, tiles.pick(rows, n, k, group, torch.float16, arch, zeros)


def test_the_number_of_evaluations_is_no_argument():
    assert set(inspect.signature(tiles.pick).parameters) == {
        "rows",
        "n",
        "k",
        "group",
        "dtype",
        "arch",
        "zeros",
        "bits",
        "lookup",
    }


def test_equal_arguments_give_equal_tiles_without_a_device(monkeypatch):
    def no_device(*_):
        raise AssertionError("pick asked a device")

    first = list(every_pick())
    monkeypatch.setattr(torch.cuda, "get_device_properties", no_device)
    monkeypatch.setattr(torch.cuda, "is_available", no_device)
    assert list(every_pick()) == first


def test_tiles_are_powers_of_two_that_a_dot_takes():
    for *_, tile in every_pick():
        for size in (tile.rows, tile.outputs, tile.warps, tile.splits):
            assert size & (size - 1) == 0
        assert min(tile.rows, tile.outputs) >= 16


def test_each_split_has_a_quad_of_groups():
    for _, _, _, k, group, tile in every_pick():
        work = k // 512 + (k % 512 > 0) if group == k else -(-k // (4 * group))
        assert 1 <= tile.splits <= work


def test_splits_fill_at_most_two_programs_a_multiprocessor():
    for arch, rows, n, _, _, tile in every_pick():
        programs = -(-n // tile.outputs) * -(-rows // tile.rows)
        if tile.splits > 1:
            assert tile.splits * programs <= 2 * tiles.PROCESSORS[arch]


@pytest.mark.parametrize(
    ("rows", "n", "zeros", "wanted"),
    [
        (8192, 4096, None, 256),
        (512, 4096, None, 256),
        (512, 4096, torch.uint8, 128),  # 256 rows would spill
        (512, 4096, torch.float32, 64),
        (256, 4096, None, 128),
        (128, 4096, None, 64),
        (512, 1024, None, 64),  # 32 or 64 programs would leave most of the chip idle
        (8192, 1024, None, 256),
    ],
)
def test_many_rows_take_the_largest_tile_that_fills_the_chip(rows, n, zeros, wanted):
    assert tiles.pick(rows, n, 4096, 128, torch.bfloat16, "sm_90", zeros).rows == wanted


def test_a_single_row_of_a_narrow_layer_splits_k():
    assert tiles.pick(1, 4096, 11008, 128, torch.bfloat16, "sm_90").splits == 8


def test_many_rows_do_not_split_k():
    assert {
        tiles.pick(rows, 192, 4096, 128, torch.bfloat16, arch).splits
        for rows in (65, 512)
        for arch in tiles.PROCESSORS
    } == {1}


@pytest.mark.parametrize(
    ("arch", "elder"),
    [
        ("sm_87", "sm_86"),
        ("sm_103", "sm_100"),
        ("sm_121", "sm_120"),
        ("gfx1100", "gfx942"),
        ("gfx950", "gfx942"),
    ],
)
def test_an_unlisted_chip_runs_as_its_elder(arch, elder):
    for rows in ROWS:
        assert tiles.pick(rows, 4096, 4096, 128, torch.float16, arch) == tiles.pick(
            rows, 4096, 4096, 128, torch.float16, elder
        )


def test_a_chip_without_bf16_tensor_cores_is_refused():
    with pytest.raises(ValueError, match=r"sm_75 has no bf16 tensor cores.*sm_80 or newer"):
        tiles.pick(1, 4096, 4096, 128, torch.float16, "sm_75")


@pytest.mark.parametrize("group", [0, 16, 48, 256, 2048])
def test_a_group_that_no_kernel_has_is_refused(group):
    with pytest.raises(
        ValueError, match=rf"group_size={group}: .*\(32, 64, 128\) or the whole row \(4096 here\)"
    ):
        tiles.pick(1, 4096, 4096, group, torch.float16, "sm_90")


def test_float32_runs_without_tensor_core_tiles():
    for arch in tiles.PROCESSORS:
        tile = tiles.pick(512, 4096, 4096, 128, torch.float32, arch)
        assert (tile.deep, tile.ratio, tile.outputs) == (False, False, 32)
