"""GGUF's blocks to codes and floats, beside the gguf package's own."""

from importlib import metadata

import gguf
import numpy as np
import pytest
import torch

from qzo.checkpoints.formats import gguf_blocks
from tests.support.checkpoints import HALVES, TYPES, blocks
from tests.support.close import assert_same_bits


@pytest.mark.parametrize("kind", [TYPES(kind) for kind in gguf_blocks.BLOCKS], ids=lambda kind: kind.name)
def test_dequantize(kind):
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    assert gguf_blocks.BLOCKS[kind] == (weights, size)
    raw = np.random.default_rng(3).integers(0, 256, (9, 4096 // weights * size), dtype=np.uint8)
    for at in HALVES.get(kind, (0,)):  # both signs, all exponents but the largest half
        raw.reshape(-1, size)[:, at + 1 + 2 * (kind == TYPES.F32)] &= 0xBF
    ours = gguf_blocks.values(torch.from_numpy(raw), int(kind)).float()
    assert_same_bits(ours, torch.from_numpy(gguf.dequantize(raw, kind).astype(np.float32)))


@pytest.mark.parametrize("kind", [TYPES.Q4_0, TYPES.Q4_1, TYPES.Q8_0], ids=lambda kind: kind.name)
def test_codes_of_the_types_that_train(kind):
    """With the block's d (and m) they give the package's floats."""
    shape = (5, 96)
    raw = blocks(shape, kind, np.random.default_rng(0))
    parts = torch.from_numpy(raw).view(5, 3, -1)
    codes = gguf_blocks.codes(parts, int(kind))
    assert (codes.dtype, codes.shape) == (torch.uint8, shape)
    d = gguf_blocks.halves(parts, 0).float().repeat_interleave(32, 1)
    middle = {TYPES.Q4_0: 8, TYPES.Q4_1: 0, TYPES.Q8_0: 128}[kind]
    found = d * (codes.float() - middle)
    if kind == TYPES.Q4_1:
        found += gguf_blocks.halves(parts, 2).float().repeat_interleave(32, 1)
    assert_same_bits(found, torch.from_numpy(gguf.dequantize(raw, kind).astype(np.float32)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_block_that_is_not_finite_is_refused_and_a_float_is_not(bad):
    raw = torch.zeros(1, 18, dtype=torch.uint8)
    raw[0, 2:] = 0x99
    raw[0, :2] = torch.tensor([bad]).half().view(torch.uint8)
    with pytest.raises(ValueError, match="a block holds NaN or infinity: the file is damaged"):
        gguf_blocks.values(raw, gguf_blocks.Q4_0)
    floats = gguf_blocks.values(raw[:, :2].contiguous(), gguf_blocks.F16)
    assert floats.dtype == torch.float16
    assert not torch.isfinite(floats).any()


def test_every_type_has_the_packages_name_and_number():
    known = {int(kind): kind.name for kind in TYPES}
    assert {kind: known.get(kind, name) for kind, name in gguf_blocks.NAMES.items()} == gguf_blocks.NAMES
    later = {39} if metadata.version("gguf") == "0.17.0" else set()  # MXFP4
    assert gguf_blocks.NAMES.keys() - known == later
    assert set(gguf_blocks.BLOCKS) <= set(gguf_blocks.NAMES)
