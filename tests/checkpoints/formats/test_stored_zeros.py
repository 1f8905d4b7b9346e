"""Which version of GPTQ's zero points a layer is stored in: what the config says, what the numbers say, who wins."""

import warnings

import pytest
import torch

from qzo.checkpoints.formats.stored_zeros import StoredZeros


def fields(*values):
    return torch.tensor([values, values], dtype=torch.uint8)


def version(said, stored, bits=4, sym=True, unsure=False):
    """(the version that is read, the texts of the warnings)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = StoredZeros(said, unsure).version("layer", stored, bits, sym)
    return found, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("sym", [True, None])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("stored", [1, 2])
@pytest.mark.parametrize("said", [1, 2])
def test_symmetric_zero_points_tell_their_version(said, stored, bits, sym):
    middle = 2 ** (bits - 1)
    found, told = version(said, fields(*[middle - 2 + stored] * 3), bits, sym)
    assert found == stored
    assert len(told) == (said != stored)
    if told:  # the zero point as the config would have it
        read = middle - 2 + stored + 2 - said
        name, other = ("gptq", "gptq_v2")[said - 1], ("gptq", "gptq_v2")[stored - 1]
        assert told[0].startswith(f"checkpoint_format {name!r} would read")
        assert f"as {read}, not {middle}: they are stored as {other!r} has them" in told[0]


@pytest.mark.parametrize(
    ("stored", "sym"), [(fields(8, 8), False), (fields(7, 8), None), (fields(7, 8), False), (fields(3, 3), None)]
)
@pytest.mark.parametrize("said", [1, 2])
def test_asymmetric_ones_tell_nothing(said, stored, sym):
    assert version(said, stored, 4, sym) == (said, [])


@pytest.mark.parametrize(
    ("stored", "unsure", "sym", "message"),
    [
        (
            fields(7, 8),
            False,
            True,
            r"for which all zero points of 4 bits are stored as 7 \(gptq\) or 8 \(gptq_v2\), and"
            " these are numbers from 7 to 8; if they are what is meant, set sym to false",
        ),
        (fields(3, 3), False, True, "these are all 3; if"),
        (
            fields(3, 3),
            True,
            None,
            "checkpoint_format and format .* read its zero points differently; remove the wrong",
        ),
        (fields(8, 8), True, False, "checkpoint_format and format"),
    ],
)
def test_numbers_that_mean_nothing(stored, unsure, sym, message):
    with pytest.raises(ValueError, match=message):
        version(1, stored, 4, sym, unsure)


def test_a_config_that_says_both_is_settled_by_the_numbers():
    assert version(2, fields(8, 8), unsure=True) == (2, [])
    assert version(1, fields(7, 7), unsure=True) == (1, [])


def test_layers_of_two_versions_are_of_two_checkpoints_and_one_warning_is_enough():
    zeros = StoredZeros(1)
    with pytest.warns(UserWarning, match="would read"):
        assert zeros.version("first", fields(8, 8), 4, True) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert zeros.version("second", fields(8, 8), 4, True) == 2
    with pytest.raises(
        ValueError, match="stored as checkpoint_format 'gptq' has them and those of first as 'gptq_v2', so it cannot be"
    ):
        zeros.version("third", fields(7, 7), 4, True)
