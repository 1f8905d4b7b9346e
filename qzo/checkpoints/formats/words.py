"""Codes in 32-bit words: one stream of bits along a row, lowest bits first. 3-bit codes cross words."""

import functools

import torch


def word_count(count: int, bits: int) -> int:
    """32-bit words that hold so many codes."""
    return -(-count * bits // 32)


def unpack(words: torch.Tensor, count: int, bits: int = 4) -> torch.Tensor:
    """int32 [rows, W] -> the first `count` codes of each row, uint8."""
    # flat first: a contiguous [rows, 1] may have any stride; little-endian, so the low byte comes first
    data = words.reshape(-1).view(torch.uint8).view(words.shape[0], -1)
    if bits == 3:  # eight codes in three bytes
        data = torch.nn.functional.pad(data, (0, -data.shape[1] % 3)).unflatten(1, (-1, 3)).to(torch.int32)
        data, per = data[..., 0] | data[..., 1] << 8 | data[..., 2] << 16, 8
    else:
        per = 8 // bits
    codes = torch.stack([data >> bits * j & (1 << bits) - 1 for j in range(per)], -1)
    return codes.to(torch.uint8).flatten(1)[:, :count]


def pack(codes: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """uint8 [rows, count] of 2, 4 or 8 bits -> int32 [rows, ceil(count * bits / 32)], padded with zeros."""
    per = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % (4 * per))).unflatten(1, (-1, per))
    data = functools.reduce(torch.bitwise_or, [padded[..., j] << bits * j for j in range(per)])
    return data.reshape(-1).view(torch.int32).view(len(codes), -1)
