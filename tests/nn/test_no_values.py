"""What stands for a quantized layer's weight: it tells what it is like, and nothing can be computed with it."""

import pytest
import torch

from qzo.nn.no_values import NoValues


@pytest.fixture
def weight():
    return NoValues(8, 64, torch.float16, torch.device("cpu"))


def test_what_it_is_like_can_be_asked(weight):
    assert isinstance(weight, torch.Tensor)
    assert (weight.shape, weight.dtype, weight.device.type) == ((8, 64), torch.float16, "cpu")
    assert (weight.size(0), weight.size(-1), weight.dim(), weight.numel()) == (8, 64, 2, 512)
    assert weight.is_floating_point()
    assert not weight.requires_grad
    assert repr(weight) == "weight of a QZOLinear: [8, 64], torch.float16, no values (see dequantize)"


def test_it_takes_no_memory():
    """Rows times columns would be 2 EiB."""
    assert NoValues(1 << 30, 1 << 30, torch.float16, torch.device("cpu")).shape == (1 << 30, 1 << 30)


@pytest.mark.parametrize(
    "compute",
    [
        lambda w: torch.ones(1, 64) @ w.T,
        lambda w: torch.nn.functional.linear(torch.ones(1, 64), w),
        lambda w: w * 2,
        lambda w: w.to(torch.float32),
        lambda w: w.cpu().numpy(),
        lambda w: w[0],
        lambda w: w.tolist(),
        lambda w: w.copy_(torch.ones(8, 64)),
        lambda w: torch.save(w, "/dev/null"),
    ],
)
def test_nothing_can_be_computed_with_it(weight, compute):
    with pytest.raises(RuntimeError, match=r"weight of a QZOLinear .*no values of its own.*dequantize\(\)"):
        compute(weight)


def test_an_operator_that_is_reached_past_the_function_says_the_same(weight):
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError, match="has no values of its own"):
        weight + 1
