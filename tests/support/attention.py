"""What a CPU's attention rounds alike, which older versions of torch do not."""

import functools

import torch
from torch.nn.functional import scaled_dot_product_attention


@functools.cache
def shared_heads_round_alike() -> bool:
    """Whether heads that share keys give the bits of heads that have copies of them. Not with torch 2.8, where rows
    without padding (shared keys) so get other bits than the same rows beside padded ones (copies)."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 7, 32, generator=generator) for heads in (2, 1, 1))
    shared = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    key, value = (one.repeat_interleave(2, 1) for one in (key, value))
    return torch.equal(shared, scaled_dot_product_attention(query, key, value, is_causal=True))


def key_heads() -> int:
    """Of tiny models with two heads whose rows are to have the same bits whatever stands beside them."""
    return 1 if shared_heads_round_alike() else 2
