"""A few small layers and models of QZOLinear, and what is the same of two."""

import torch
from torch import nn

import qzo
from qzo import PackedWeight, QZOLinear
from qzo.nn.layers import digest_parts
from tests.support.close import assert_same_bits


def linear(k=128, n=24, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(k, n, bias=bias)


class Block(nn.Module):
    """Three Linears whose definition is not in the order of their names, one of which has more groups."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.up = nn.Linear(64, 160)
        self.act = nn.SiLU()
        self.down = nn.Linear(160, 8, bias=False)
        self.lm_head = nn.Linear(8, 5)

    def forward(self, x):
        return self.lm_head(self.down(self.act(self.up(x))))


def block(**options):
    return qzo.quantize_(Block(), **{"group_size": 32, **options})


def asymmetric(k=128, n=6, float_zeros=False):
    """A layer with distinct scales, of both signs, and zero points."""
    random = torch.Generator().manual_seed(k + n)
    scales = torch.randn(k // 32, n, generator=random)
    zeros = 15 * torch.rand(k // 32, n, generator=random)
    codes = torch.randint(0, 16, (n, k), generator=random).to(torch.uint8)
    packed = PackedWeight.from_codes(codes, scales, zeros if float_zeros else zeros.to(torch.uint8))
    return QZOLinear.from_packed(packed, torch.randn(n, generator=random))


def bits(module):
    """Everything quantized in a module, by name."""
    return {(name, what): tensor.clone() for name, what, tensor in digest_parts(module)}


def assert_same(module, before):
    now = bits(module)
    assert now.keys() == before.keys()
    for name, tensor in before.items():
        assert_same_bits(now[name], tensor)
