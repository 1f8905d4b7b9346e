"""What a run is told whose losses mean little."""

import warnings

import pytest
import torch

from qzo.nn.layers import arena_of
from qzo.optim.advice import against_nan, warn_if_rounded_away
from tests.support.small_layers import block

GROUP = {"lr": 0.1, "eps": 1e-2}


def test_float16_is_blamed_where_it_is_used():
    assert against_nan(block(), GROUP).startswith("lower lr (0.1) or eps (0.01), or check the data")
    assert against_nan(block().half(), GROUP).startswith("float16 activations end at 65504: load the model in bfloat16")


@pytest.mark.parametrize(
    ("dtype", "eps", "relative", "said"),
    [
        (torch.bfloat16, 1e-3, True, r"eps=0.001 is too small for bfloat16 activations.*use eps >= 0.01"),
        (torch.float16, 1e-3, True, None),
        (torch.float16, 1e-6, False, "eps=1e-06 is too small for float16"),
        (torch.float32, 1e-6, True, None),
    ],
)
def test_an_eps_that_rounding_drowns_is_warned_of(dtype, eps, relative, said):
    """Absolute eps is measured by the scales, here near 0.01."""
    model = block().to(dtype)
    arena = arena_of(model, exact=True)
    if said is not None:
        with pytest.warns(UserWarning, match=said):
            warn_if_rounded_away(model, arena, eps, relative)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_rounded_away(model, arena, eps, relative)
