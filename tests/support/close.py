"""Error measures: largest and RMS error in units that the caller derives; the worst entry is printed."""

import torch

ULP = 2.0**-24  # half a unit in the last place of float32, relative


def errors(got, want, unit):
    """(largest, RMS) of |got - want| / unit; `unit` is a number or a tensor shaped like both, never 0."""
    error = (got.double() - want.double()).abs() / unit
    return error.max().item(), error.square().mean().sqrt().item()


def assert_close(got, want, unit, largest, rms=None):
    """Fail unless |got - want| <= largest * unit everywhere, and in the mean <= rms * unit if given.

    Infinities and NaN have to stand in the same places. The message names the worst entry.
    """
    assert got.shape == want.shape, f"shape {list(got.shape)}, wanted {list(want.shape)}"
    if got.numel() == 0:
        return
    assert_same_places(got, want)
    finite = torch.isfinite(want)
    unit = torch.as_tensor(unit, dtype=torch.float64).expand(want.shape)
    error = torch.where(finite, (got.double() - want.double()).abs() / unit, 0.0)
    at = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    worst, mean = errors(got[finite], want[finite], unit[finite]) if finite.any() else (0.0, 0.0)
    message = (
        f"worst entry {at}: got {got[at].item():.9g}, wanted {want[at].item():.9g}; error in units: "
        f"largest {worst:.3g} (allowed {largest:.3g}), RMS {mean:.3g} (allowed {rms})"
    )
    assert worst <= largest, message
    assert rms is None or mean <= rms, message


def assert_same_places(got, want):
    """NaN and both infinities stand in the same places."""
    for name, where in (("NaN", torch.isnan), ("infinity", torch.isposinf), ("-infinity", torch.isneginf)):
        differ = (where(got) != where(want)).nonzero()
        first = tuple(differ[0].tolist()) if len(differ) else None
        assert first is None, f"{len(differ)} entries differ in being {name}, first at {first}"


def assert_same_bits(got, want):
    """Bit for bit, the sign of zero included; the message names the first entry that differs."""
    assert got.shape == want.shape, f"shape {list(got.shape)}, wanted {list(want.shape)}"
    assert got.dtype == want.dtype, f"{got.dtype}, wanted {want.dtype}"
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    differ = (got.contiguous().view(integer) != want.contiguous().view(integer)).nonzero()
    if len(differ):
        at = tuple(differ[0].tolist())
        raise AssertionError(
            f"{len(differ)} of {got.numel()} entries differ, first at {at}: "
            f"got {got[at].item()!r}, wanted {want[at].item()!r}"
        )
