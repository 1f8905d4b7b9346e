"""PackedWeight: the one in-memory form of a quantized matrix, whatever file it came from.

    W[n, perm[j]] = scales[g, n] * (code[n, j] - zero[g, n]),   g = j // group_size

With a table (NF4, FP4) the code stands for an entry: W[n, k] = scales[g, n] * table[code[n, k]]. With codebooks (AQLM)
codes stand for eight weights: W[n, 8j + i] = scales[0, n] * sum over c of codebooks[c, code[n, j, c], i].
perm is there for codes whose columns were sorted by group (GPTQ's act-order), else column j is input j.
Readers (formats/) and the quantizer (quantize.py) make it, QZOLinear runs it, writers take it back.
"""

import dataclasses
from collections.abc import Sequence

import torch

from ..kernels.codes import BITS, middle, pack_planes, pack_rows, plane_shape, row_shape, unpack_planes, unpack_rows
from ..kernels.forms import form_of
from ..kernels.table import check_table
from ..kernels.tiles import GROUPS
from ..kernels.vectors import LENGTH, MOST_BITS, in_range, pack_vectors, unpack_vectors, vector_rows, vector_shape


def check_bits(bits: int) -> None:
    """ValueError unless codes of so many bits can be held."""
    if bits not in BITS:
        raise ValueError(
            f"bits={bits}: codes have {', '.join(map(str, BITS))} bits here (a 3-bit checkpoint's codes are held in 4)"
        )


def check_group_size(group_size: int, in_features: int) -> int:
    """The number of inputs that share a scale: `group_size`, or in_features for -1. ValueError if it does not fit."""
    if group_size in (-1, in_features):
        return in_features
    if group_size not in GROUPS:
        raise ValueError(f"group_size={group_size}: use one of {', '.join(map(str, GROUPS))}, or -1 for the whole row")
    if in_features % group_size:
        fits = [g for g in GROUPS if in_features % g == 0]
        raise ValueError(
            f"group_size={group_size} does not divide in_features={in_features}; "
            f"use {', '.join(map(str, [*fits, -1]))} (-1: the whole row)"
        )
    return group_size


@dataclasses.dataclass
class PackedWeight:
    """A matrix [N, K] of 2-, 4- or 8-bit codes in groups along K, or of codes for vectors of eight.

    W[n, perm[j]] = scales[g, n] * (code[n, j] - zero[g, n]), g = j // group_size; with a table (NF4: arXiv 2305.14314,
    appendix E) scales[g, n] * table[code[n, j]]; with codebooks (AQLM: arXiv 2401.06118, section 3) W[n, 8j + i] =
    scales[0, n] * the sum over c of codebooks[c, code[n, j, c], i].

    Parameters
    ----------
    codes
        uint8 rows (CPU) or int16 planes (GPU): kernels/codes.py tells their shapes; int16 words, on every device, with
        codebooks: kernels/vectors.py.
    scales
        float32 [G, N], in the sign of the file.
    zeros
        None (every zero point is 2^(bits - 1)), uint8 [G, N], or float32 [G, N] (a float minimum m is
        zero = -m / scale).
    in_features
        K, which the padded codes do not tell.
    bits
        Of a code: 2, 4 or 8; with codebooks that of an index, up to 16.
    perm
        int64 [K], the input that column j of the codes belongs to, or None: j.
    table
        Sixteen floats that 4-bit codes stand for, or None; there are no zero points then.
    codebooks
        float [C, 2^bits, 8], or None; there are no zero points and no table then, and one scale to an output.

    Raises
    ------
    ValueError
        Shapes, dtypes or values that do not fit one another: what was given and what is wanted are named.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    in_features: int
    bits: int = 4
    perm: torch.Tensor | None = None
    table: tuple[float, ...] | None = None
    codebooks: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.codebooks is None:
            check_bits(self.bits)
        else:
            check_codebooks(self.codebooks, self.bits)
        groups, n = self.scales.shape
        if self.scales.dtype != torch.float32 or groups == 0 or self.in_features % groups:
            raise ValueError(
                f"scales must be float32 [G, N] with G dividing in_features={self.in_features}, got "
                f"{self.scales.dtype} {list(self.scales.shape)}"
            )
        check_group_size(self.group_size, self.in_features)
        if self.zeros is not None and (
            self.zeros.shape != self.scales.shape or self.zeros.dtype not in (torch.uint8, torch.float32)
        ):
            raise ValueError(
                f"zeros must be uint8 or float32 {list(self.scales.shape)}, got {self.zeros.dtype} "
                f"{list(self.zeros.shape)}"
            )
        if self.out_features != n:
            raise ValueError(f"codes hold {self.out_features} output rows, scales {n}")
        check_codes(self.codes, n, self.in_features, self.bits, self.books)
        if self.perm is not None:
            check_perm(self.perm, self.in_features)
        if self.table is not None:
            self.table = check_table(self.table)
            if self.bits != 4 or self.zeros is not None:
                raise ValueError(
                    f"a table goes with 4-bit codes and no zero points, got {self.bits} bits"
                    + (" and zeros" if self.zeros is not None else "")
                )
        if self.books and (groups > 1 or self.zeros is not None or self.table is not None or self.perm is not None):
            raise ValueError(
                "codebooks go with one scale to an output row, no zero points, no table and no perm, got "
                f"scales {list(self.scales.shape)}"
                + ("" if self.zeros is None else ", zeros")
                + ("" if self.table is None else ", a table")
                + ("" if self.perm is None else ", perm")
            )
        if not bool(torch.isfinite(self.scales).all()):
            raise ValueError("scales hold NaN or infinity: the checkpoint is damaged")

    @classmethod
    def from_codes(
        cls,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None = None,
        bits: int = 4,
        perm: torch.Tensor | None = None,
        table: Sequence[float] | None = None,
    ) -> "PackedWeight":
        """From plain codes, one a byte.

        Parameters
        ----------
        codes : torch.Tensor
            uint8 [N, K], below 2^bits.
        scales : torch.Tensor
            [G, N], of any float dtype; kept in float32.
        zeros : torch.Tensor or None
            [G, N], integers or floats; None, or all of them 2^(bits - 1): none are kept.
        bits : int
            Of a code: 2, 4 or 8.
        perm : torch.Tensor or None
            int64 [K], the input that each column of `codes` belongs to.
        table : sequence of float or None
            Sixteen numbers that 4-bit codes stand for.

        Returns
        -------
        PackedWeight
            Rows on a CPU, planes elsewhere.

        Raises
        ------
        ValueError
            Codes of another dtype, shape or range; what the class refuses.
        """
        check_bits(bits)
        if codes.dtype != torch.uint8 or codes.dim() != 2 or (codes.numel() and int(codes.max()) >> bits):
            raise ValueError(
                f"codes must be uint8 [N, K] in 0..{(1 << bits) - 1}, got {codes.dtype} {list(codes.shape)}"
            )
        if zeros is not None:
            zeros = zeros.to(torch.float32 if zeros.is_floating_point() else torch.uint8).contiguous()
            if zeros.dtype == torch.uint8 and bool((zeros == middle(bits)).all()):
                zeros = None
        pack = pack_rows if codes.device.type == "cpu" else pack_planes
        entries = None if table is None else tuple(table)
        return cls(pack(codes, bits), scales.to(torch.float32).contiguous(), zeros, codes.shape[1], bits, perm, entries)

    @classmethod
    def from_vectors(cls, codes: torch.Tensor, scales: torch.Tensor, codebooks: torch.Tensor) -> "PackedWeight":
        """From plain codes that stand for vectors of eight weights (AQLM).

        Parameters
        ----------
        codes : torch.Tensor
            Integers [N, K/8, C], below the codebooks' 2^bits entries.
        scales : torch.Tensor
            [N], of any float dtype; kept in float32.
        codebooks : torch.Tensor
            float [C, 2^bits, 8].

        Returns
        -------
        PackedWeight
            With one scale to an output.

        Raises
        ------
        ValueError
            A code that is out of the codebook's range; shapes or dtypes that do not fit.
        """
        bits = codebooks.shape[1].bit_length() - 1 if codebooks.dim() == 3 else 0
        check_codebooks(codebooks, bits)
        integers = codes.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
        if not integers or codes.dim() != 3 or codes.shape[2] != len(codebooks) or not codes.numel():
            raise ValueError(
                f"codes must be integers [N, K/{LENGTH}, {len(codebooks)}], got {codes.dtype} {list(codes.shape)}"
            )
        least, most = (int(m) for m in codes.aminmax())
        if least < 0 or most >> bits:
            raise ValueError(f"codes must be in 0..{(1 << bits) - 1}, the entries of a codebook; got {least} to {most}")
        if not scales.is_floating_point() or scales.numel() != len(codes):
            raise ValueError(f"scales must be floats [{len(codes)}], got {scales.dtype} {list(scales.shape)}")
        return cls(
            pack_vectors(codes, bits),
            scales.to(torch.float32).reshape(1, -1).contiguous(),
            None,
            codes.shape[1] * LENGTH,
            bits,
            codebooks=codebooks,
        )

    @classmethod
    def on_meta(
        cls,
        shape: Sequence[int],
        group: int,
        bits: int = 4,
        zeros: torch.dtype | None = None,
        rows: bool = False,
        table: tuple[float, ...] | None = None,
        codebooks: torch.Tensor | None = None,
    ) -> "PackedWeight":
        """Of an [N, K] shape without values, which nothing checks. zeros: None or their dtype; rows: codes as a CPU
        keeps them; codebooks: on the meta device too."""
        packed = cls.__new__(cls)
        n, k = shape
        kind = torch.uint8 if rows and codebooks is None else torch.int16
        packed.codes = torch.empty(form_of(bits, table, codebooks).shape(n, k, rows), dtype=kind, device="meta")
        packed.codebooks = codebooks
        packed.scales = torch.empty(k // group, n, device="meta")
        packed.zeros = None if zeros is None else torch.empty(k // group, n, dtype=zeros, device="meta")
        packed.in_features, packed.bits, packed.perm, packed.table = k, bits, None, table
        return packed

    @property
    def out_features(self) -> int:
        return self.codes.shape[0] if self.codes.dtype == torch.uint8 else self.codes.shape[1]

    @property
    def group_size(self) -> int:
        return self.in_features // self.scales.shape[0]

    @property
    def books(self) -> int:
        """Number of codebooks."""
        return 0 if self.codebooks is None else len(self.codebooks)

    def unpacked(self) -> torch.Tensor:
        """The codes as uint8 [N, K], columns as they are stored, or int32 [N, K/8, C]."""
        if self.books:
            return unpack_vectors(self.codes, self.in_features, self.books, self.bits)
        return unpack_codes(self.codes, self.in_features, self.bits)

    def dequantize(self) -> torch.Tensor:
        """The matrix: scale * (code - zero), the subtraction first; scale * table[code]; or scale * sum of vectors.

        Returns
        -------
        torch.Tensor
            float32 [N, K], columns in the order of the inputs.
        """
        if self.codebooks is not None:
            n, k = self.out_features, self.in_features
            return self.scales.T * vector_rows(self.codes, k, 0, n, self.codebooks.float(), torch.float32)
        g = self.group_size
        codes = self.unpacked()
        if self.table is not None:
            values = torch.tensor(self.table, device=codes.device)[codes.to(torch.int64)].unflatten(1, (-1, g))
        else:
            zeros = middle(self.bits) if self.zeros is None else self.zeros.to(torch.float32).T.unsqueeze(2)
            values = codes.to(torch.float32).unflatten(1, (-1, g)) - zeros
        return self.by_input((values * self.scales.T.unsqueeze(2)).flatten(1))

    def by_input(self, columns: torch.Tensor) -> torch.Tensor:
        """[N, K] in the order of the codes' columns -> in the order of the inputs."""
        return columns if self.perm is None else torch.empty_like(columns).index_copy_(1, self.perm, columns)


def check_codebooks(codebooks: torch.Tensor, bits: int) -> None:
    """ValueError unless they are floats [C, 2^bits, 8] that a code of so many bits can choose from."""
    shape = list(codebooks.shape)
    floats = codebooks.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if not floats or not 1 <= bits <= MOST_BITS or len(shape) != 3 or shape[1:] != [1 << bits, LENGTH] or not shape[0]:
        raise ValueError(
            f"codebooks must be floats [C, 2^bits, {LENGTH}] with 1 to {MOST_BITS} bits, got "
            f"{codebooks.dtype} {shape} for {bits} bits"
        )
    if not bool(torch.isfinite(codebooks).all()):
        raise ValueError("codebooks hold NaN or infinity: the checkpoint is damaged")


def check_codes(codes: torch.Tensor, n: int, k: int, bits: int, books: int = 0) -> None:
    """ValueError unless `codes` are the rows or planes, or with codebooks the words, of an [n, k] matrix."""
    if books:
        if codes.dtype != torch.int16 or k % LENGTH or list(codes.shape) != vector_shape(n, k, books, bits):
            raise ValueError(
                f"codes of {books} codebooks of {bits} bits for {n} x {k} weights must be int16 "
                f"{vector_shape(n, k, books, bits)} and {LENGTH} divide {k}, got {codes.dtype} "
                f"{list(codes.shape)}"
            )
        if not in_range(codes, books, bits):
            raise ValueError(f"a code is beyond the {1 << bits} entries of a codebook: the checkpoint is damaged")
        return
    want = row_shape(n, k, bits) if codes.dtype == torch.uint8 else plane_shape(n, k, bits)
    if codes.dtype not in (torch.uint8, torch.int16) or list(codes.shape) != want:
        raise ValueError(
            f"codes of {bits} bits for {n} x {k} weights must be uint8 {row_shape(n, k, bits)} or int16 "
            f"{plane_shape(n, k, bits)}, got {codes.dtype} {list(codes.shape)}"
        )


def check_perm(perm: torch.Tensor, k: int) -> None:
    """ValueError unless `perm` names every one of k columns once."""
    every = torch.arange(k, device=perm.device)
    if perm.dtype != torch.int64 or perm.shape != every.shape or not torch.equal(perm.sort().values, every):
        raise ValueError(
            f"perm must be int64 [{k}] that holds 0..{k - 1} once each, got {perm.dtype} {list(perm.shape)}"
        )


def unpack_codes(codes: torch.Tensor, k: int, bits: int = 4) -> torch.Tensor:
    """uint8 [N, K] from rows or planes."""
    return unpack_rows(codes, k, bits) if codes.dtype == torch.uint8 else unpack_planes(codes, k, bits)


def to_planes(codes: torch.Tensor, k: int, bits: int = 4) -> torch.Tensor:
    """Codes as int16 planes; the same tensor if they are already."""
    return pack_planes(unpack_rows(codes, k, bits), bits) if codes.dtype == torch.uint8 else codes


def to_rows(codes: torch.Tensor, k: int, bits: int = 4) -> torch.Tensor:
    """Codes as uint8 rows; the same tensor if they are already."""
    return codes if codes.dtype == torch.uint8 else pack_rows(unpack_planes(codes, k, bits), bits)
