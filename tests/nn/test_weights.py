"""PackedWeight: the matrix that it stands for, how codes come in and out of it, and what does not fit together."""

import dataclasses

import pytest
import torch

from qzo.kernels.codes import pack_planes, pack_rows
from qzo.kernels.table import NF4
from qzo.nn.weights import PackedWeight, check_bits, check_group_size, to_planes, to_rows, unpack_codes
from tests.support.close import assert_same_bits

N, K = 5, 192  # a row of codes is no whole number of tiles of 128
ZEROS = {"none": None, "integer": torch.uint8, "float": torch.float32}


def plain(bits=4, group=32, zeros="none", seed=0):
    """(codes uint8 [N, K], scales [G, N], zeros or None), as a file has them."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (N, K), generator=random).to(torch.uint8)
    scales = torch.randn(K // group, N, generator=random)
    points = (((1 << bits) - 1) * torch.rand(K // group, N, generator=random)).to(ZEROS[zeros] or torch.uint8)
    return codes, scales, None if zeros == "none" else points


def vectors(books=2, bits=8):
    """(codes [N, K/8, C], scales [N], codebooks)."""
    random = torch.Generator().manual_seed(books)
    codes = torch.randint(0, 1 << bits, (N, K // 8, books), generator=random)
    return codes, torch.rand(N, generator=random), torch.randn(books, 1 << bits, 8, generator=random).half()


# ---------------------------------------------------------------------------------------------- what it stands for


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("group", [32, K])
def test_the_matrix_is_the_formula(bits, zeros, group):
    codes, scales, points = plain(bits, group, zeros)
    packed = PackedWeight.from_codes(codes, scales, points, bits)
    assert (packed.out_features, packed.in_features, packed.group_size, packed.books) == (N, K, group, 0)
    assert torch.equal(packed.unpacked(), codes)
    middle = torch.full_like(scales, 1 << bits - 1) if points is None else points.float()
    want = torch.stack([scales[k // group] * (codes[:, k].float() - middle[k // group]) for k in range(K)], 1)
    assert_same_bits(packed.dequantize(), want)
    in_planes = dataclasses.replace(packed, codes=pack_planes(codes, bits))
    assert in_planes.out_features == N
    assert_same_bits(in_planes.dequantize(), want)


def test_codes_of_a_table_stand_for_its_entries():
    codes, scales, _ = plain(group=64)
    packed = PackedWeight.from_codes(codes, scales, table=list(NF4))
    assert packed.table == NF4, "a tuple, which can be hashed"
    want = torch.tensor(NF4)[codes.long()] * scales.T.repeat_interleave(64, 1)
    assert_same_bits(packed.dequantize(), want)


@pytest.mark.parametrize(("books", "bits"), [(2, 8), (1, 12)])
def test_codes_of_codebooks_stand_for_sums_of_vectors(books, bits):
    codes, scales, codebooks = vectors(books, bits)
    packed = PackedWeight.from_vectors(codes, scales, codebooks)
    assert (packed.out_features, packed.in_features, packed.group_size) == (N, K, K)
    assert (packed.books, packed.bits, list(packed.scales.shape)) == (books, bits, [1, N])
    assert torch.equal(packed.unpacked(), codes.int())
    summed = sum(codebooks[c].float()[codes[:, :, c]] for c in range(books)).flatten(1)
    torch.testing.assert_close(packed.dequantize(), scales[:, None] * summed, rtol=1e-6, atol=0)


def test_columns_that_were_sorted_go_back_to_their_inputs():
    codes, scales, _ = plain()
    perm = torch.randperm(K, generator=torch.Generator().manual_seed(1))
    packed = PackedWeight.from_codes(codes, scales, perm=perm)
    stored = PackedWeight.from_codes(codes, scales).dequantize()
    assert_same_bits(packed.dequantize()[:, perm], stored)
    assert torch.equal(packed.by_input(codes)[:, perm], codes)
    assert torch.equal(packed.unpacked(), codes), "codes stay as they are stored"
    assert PackedWeight.from_codes(codes, scales).by_input(codes) is codes


# ---------------------------------------------------------------------------------------------- in and out


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_and_planes_hold_the_same_codes(bits):
    codes = plain(bits)[0]
    rows, planes = pack_rows(codes, bits), pack_planes(codes, bits)
    assert torch.equal(to_planes(rows, K, bits), planes)
    assert torch.equal(to_rows(planes, K, bits), rows)
    assert torch.equal(unpack_codes(rows, K, bits), codes)
    assert torch.equal(unpack_codes(planes, K, bits), codes)
    assert to_planes(planes, K, bits) is planes
    assert to_rows(rows, K, bits) is rows


def test_zero_points_that_are_the_middle_are_not_kept():
    codes, scales, _ = plain()
    middle = torch.full_like(scales, 8)
    assert PackedWeight.from_codes(codes, scales, middle.to(torch.int32)).zeros is None
    floats = PackedWeight.from_codes(codes, scales, middle.half()).zeros
    assert floats is not None, "floats may train so"
    assert floats.dtype == torch.float32
    one_other = middle.to(torch.int32)
    one_other[0, 0] = 7
    kept = PackedWeight.from_codes(codes, scales, one_other).zeros
    assert kept is not None
    assert kept.dtype == torch.uint8


def test_16_bit_scales_are_kept_in_float32_with_their_sign():
    codes, scales, _ = plain()
    packed = PackedWeight.from_codes(codes, scales.half())
    assert_same_bits(packed.scales, scales.half().float())
    assert (packed.scales < 0).any()


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("kind", ["integers", "table", "vectors"])
def test_without_values_it_has_the_shapes_of_the_real_one(rows, kind):
    if kind == "vectors":
        real = PackedWeight.from_vectors(*vectors())
        assert real.codebooks is not None
        made = PackedWeight.on_meta((N, K), K, 8, rows=rows, codebooks=real.codebooks.to("meta"))
    else:
        table = NF4 if kind == "table" else None
        codes, scales, zeros = plain(group=64, zeros="none" if table else "float")
        real = PackedWeight.from_codes(codes, scales, zeros, table=table)
        if not rows:
            real.codes = pack_planes(codes)
        made = PackedWeight.on_meta((N, K), 64, 4, None if table else torch.float32, rows, table)
    for name in ("codes", "scales", "zeros", "codebooks"):
        want, got = getattr(real, name), getattr(made, name)
        assert (got is None) == (want is None), name
        if want is not None:
            assert (got.shape, got.dtype, got.is_meta) == (want.shape, want.dtype, True), name
    assert (made.in_features, made.bits, made.table, made.perm) == (real.in_features, real.bits, real.table, None)
    assert (made.out_features, made.group_size, made.books) == (real.out_features, real.group_size, real.books)


# ---------------------------------------------------------------------------------------------- what does not fit


def test_bits_and_group_sizes():
    for bits in (2, 4, 8):
        check_bits(bits)
    with pytest.raises(ValueError, match=r"bits=3: codes have 2, 4, 8 bits here \(a 3-bit checkpoint's .* in 4\)"):
        check_bits(3)
    assert [check_group_size(size, 96) for size in (-1, 96, 32)] == [96, 96, 32]
    with pytest.raises(ValueError, match=r"group_size=48: use one of 32, 64, 128, or -1 for the whole row"):
        check_group_size(48, 96)
    with pytest.raises(ValueError, match=r"group_size=128 does not divide in_features=192; use 32, 64, -1"):
        check_group_size(128, 192)
    with pytest.raises(ValueError, match=r"group_size=32 does not divide in_features=5; use -1 "):
        check_group_size(32, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(bits=3), "bits=3"),
        (
            dict(scales=torch.ones(6, N).double()),
            r"scales must be float32 \[G, N\] with G dividing in_features=192, got",
        ),
        (dict(scales=torch.ones(5, N)), r"G dividing in_features=192, got torch.float32 \[5, 5\]"),
        (dict(scales=torch.ones(0, N)), r"got torch.float32 \[0, 5\]"),
        (dict(scales=torch.ones(4, N)), "group_size=48: use one of"),
        (dict(scales=torch.full((6, N), torch.inf)), "scales hold NaN or infinity: the checkpoint is damaged"),
        (dict(scales=torch.ones(6, N + 1)), "codes hold 5 output rows, scales 6"),
        (dict(zeros=torch.ones(6, N + 1)), r"zeros must be uint8 or float32 \[6, 5\], got torch.float32 \[6, 6\]"),
        (dict(zeros=torch.ones(6, N).half()), r"zeros must be uint8 or float32 \[6, 5\], got torch.float16"),
        (
            dict(codes=torch.zeros(2, N, 32, dtype=torch.int32)),
            r"must be uint8 .* or int16 .*, got torch.int32 \[2, 5, 32\]",
        ),
        (dict(codes=torch.zeros(N, 90, dtype=torch.uint8)), r"codes of 4 bits for 5 x 192 weights must be .*\[5, 90\]"),
        (dict(bits=8), r"codes of 8 bits for 5 x 192 weights must be uint8 .* or int16 .*, got torch.uint8"),
        (dict(perm=torch.zeros(K, dtype=torch.int64)), r"perm must be int64 \[192\] that holds 0\.\.191 once each"),
        (
            dict(table=NF4, zeros=torch.ones(6, N)),
            "a table goes with 4-bit codes and no zero points, got 4 bits and ze",
        ),
        (dict(table=NF4[:15]), "a table has 16 finite entries, one for each 4-bit code; got 15"),
    ],
)
def test_fields_that_do_not_fit_one_another(change, message):
    codes, scales, _ = plain()
    packed = PackedWeight.from_codes(codes, scales)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(packed, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(scales=torch.ones(6, N)), r"codebooks go with one scale .* no perm, got scales \[6, 5\]$"),
        (dict(zeros=torch.ones(1, N)), r"got scales \[1, 5\], zeros$"),
        (dict(perm=torch.arange(K)), r"got scales \[1, 5\], perm$"),
        (dict(bits=7), r"codebooks must be floats \[C, 2\^bits, 8\] with 1 to 16 bits, got .* for 7 bits"),
        (dict(codebooks=torch.full((2, 256, 8), torch.nan)), "codebooks hold NaN or infinity"),
        (dict(codebooks=torch.zeros(3, 256, 8)), r"codes of 3 codebooks of 8 bits for 5 x 192 weights must be int16"),
    ],
)
def test_fields_that_do_not_fit_codebooks(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PackedWeight.from_vectors(*vectors()), **change)


def test_a_code_that_no_codebook_has():
    codes, scales, codebooks = vectors(1, 12)
    packed = PackedWeight.from_vectors(codes, scales, codebooks)
    words = packed.codes.clone()
    words[0, 0, 0] = 1 << 12
    with pytest.raises(ValueError, match="a code is beyond the 4096 entries of a codebook: the checkpoint is damaged"):
        dataclasses.replace(packed, codes=words)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (
            torch.full((N, K), 16, dtype=torch.uint8),
            r"codes must be uint8 \[N, K\] in 0\.\.15, got torch.uint8 \[5, 192\]",
        ),
        (torch.zeros(N, K, dtype=torch.int64), r"in 0\.\.15, got torch.int64"),
        (torch.zeros(K, dtype=torch.uint8), r"got torch.uint8 \[192\]"),
    ],
)
def test_plain_codes_that_do_not_fit(codes, message):
    with pytest.raises(ValueError, match=message):
        PackedWeight.from_codes(codes, torch.ones(6, N))


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, torch.zeros(N, K // 8, 2), r"codes must be integers \[N, K/8, 2\], got torch.float32 \[5, 24, 2\]"),
        (0, torch.zeros(N, K // 8, 3, dtype=torch.int64), r"integers \[N, K/8, 2\], got torch.int64 \[5, 24, 3\]"),
        (0, torch.full((N, K // 8, 2), 256), r"codes must be in 0\.\.255, the entries of a codebook; got 256 to 256"),
        (0, torch.arange(2 * N * K // 8).view(N, -1, 2) % 200 - 1, "got -1 to 198"),
        (1, torch.ones(N + 1), r"scales must be floats \[5\], got torch.float32 \[6\]"),
        (1, torch.ones(N, dtype=torch.int32), r"scales must be floats \[5\], got torch.int32"),
        (2, torch.zeros(2, 200, 8), r"codebooks must be floats .*\[2, 200, 8\] for 7 bits"),
    ],
)
def test_plain_vectors_that_do_not_fit(index, wrong, message):
    given = list(vectors())
    given[index] = wrong
    with pytest.raises(ValueError, match=message):
        PackedWeight.from_vectors(*given)
