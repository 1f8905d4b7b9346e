"""Codes in 32-bit words: streams of bits, held against Python's own long integers."""

import pytest
import torch

from qzo.checkpoints.formats import words
from tests.support.checkpoints import pack_stream, unpack_stream


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 7, 8, 10, 11, 21, 32, 33, 95, 96, 100])
def test_streams_of_codes(bits, count):
    codes = torch.randint(2**bits, (5, count), generator=torch.Generator().manual_seed(count))
    packed = pack_stream(codes, bits)
    assert torch.equal(words.unpack(packed, count, bits).long(), codes)
    assert torch.equal(unpack_stream(packed, bits, count), codes)
    if bits != 3:
        assert torch.equal(words.pack(codes.to(torch.uint8), bits), packed)


@pytest.mark.parametrize(
    ("count", "bits", "wanted"), [(8, 4, 1), (9, 4, 2), (32, 3, 3), (33, 3, 4), (1, 2, 1), (0, 8, 0)]
)
def test_the_words_that_codes_take(count, bits, wanted):
    assert words.word_count(count, bits) == wanted


def test_words_of_any_stride_are_read():
    """What has one column counts as contiguous, and cannot be seen as bytes."""
    packed = pack_stream(torch.arange(8).repeat(5, 1), 4).as_strided((5, 1), (1, 7))
    assert packed.is_contiguous()
    assert words.unpack(packed, 8).tolist() == [list(range(8))] * 5
