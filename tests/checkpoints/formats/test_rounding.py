"""Scales back into a file's dtype: rounded once, never to zero, refused where they do not fit."""

import pytest
import torch

from qzo.checkpoints.formats.rounding import new_scales, stored_scales


@pytest.mark.parametrize(("dtype", "tiny"), [(torch.float16, 2.0**-24), (torch.bfloat16, 2.0**-133)])
def test_rounding(dtype, tiny):
    stored = torch.tensor([0.1, -0.1, 0.1, -0.1, 0.1, 0.0]).to(dtype)
    scales = torch.cat([stored[:1].float(), torch.tensor([-0.3, 1e-42, -1e-42, 0.0, 0.0])])
    expected = torch.tensor([float(stored[0]), -0.3, tiny, -tiny, 0.0, 0.0]).to(dtype)
    assert torch.equal(stored_scales(scales, stored, "x"), expected)


def test_rounding_keeps_the_bits_of_an_unchanged_zero():
    assert torch.signbit(stored_scales(torch.tensor([0.0]), torch.tensor([-0.0]).half(), "x"))


@pytest.mark.parametrize("value", [65520.0, -1e9, float("nan"), float("-inf")])
def test_rounding_refuses(value):
    with pytest.raises(ValueError, match=r"x: a scale of .* does not fit float16"):
        stored_scales(torch.tensor([1.0, value]), torch.ones(2).half(), "x")


def test_a_new_file_rounds_as_an_old_one_does():
    scales = torch.tensor([[0.1, -1e-12], [0.0, -3.0]])
    assert torch.equal(new_scales(scales, torch.float16, "x"), torch.tensor([[0.1, -(2.0**-24)], [0.0, -3.0]]).half())
    assert new_scales(scales, torch.float32, "x").dtype == torch.float32
    with pytest.raises(ValueError, match=r"layer: a scale of 70000 does not fit float16 \(largest 65504\); the run"):
        new_scales(torch.tensor([7e4]), torch.float16, "layer")
