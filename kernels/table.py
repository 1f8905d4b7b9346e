"""4-bit codes that stand for the entries of a table: NF4, FP4, or any other sixteen numbers.

    W[n, k] = p[g(k), n] * table[code[n, k]]

The table is rounded once, to the type of the activations; the scale meets the float32 accumulator as everywhere.
Exact tables are an option: the entries as a sum of two numbers of that type, the second for what rounding the first
left, each with a pass of its own over the tile. Of an entry 2^-22 is left in float16 (but not less than 2^-25 of 1, the
half of its smallest number), 2^-16 in bfloat16.
NF4: QLoRA, arXiv 2305.14314, appendix E; FP4 as bitsandbytes orders its codes.

Terms (codebook): docs/glossary.md.
"""
import functools

import torch
import triton
import triton.language as tl

from .codes import unpack_planes

NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
FP4 = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
       0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25)


NAMED = {"nf4": NF4, "fp4": FP4}


def named_table(table):
    """The table of a name, or the one given as sixteen numbers, or None. ValueError for another name or length."""
    if isinstance(table, str):
        if table not in NAMED:
            raise ValueError(f"table={table!r}: the named tables are {', '.join(map(repr, NAMED))}; or give 16 numbers")
        return NAMED[table]
    return None if table is None else check_table(table)


def check_table(table):
    """The table as a tuple of sixteen floats. ValueError for another length or a number that is not finite."""
    values = tuple(float(v) for v in table)
    if len(values) != 16 or not all(abs(v) < float("inf") for v in values):
        raise ValueError(f"a table has 16 finite entries, one for each 4-bit code; got {len(values)}: {values[:20]}")
    return values


# A register holds two words, a and b, of four codes each; the table's entries are looked up byte by byte:
#     prmt.b32 takes four 4-bit selectors and picks each from the eight bytes of two registers: codes 0-7, codes 8-15
#     in two goes, a mask (from each code's top bit, through the bytes 0x00 and 0xff) choosing between them
#     lop3 0xca is a ? b : c
#     low and high bytes of a's codes 0, 1 and 2, 3 are then joined (0x5140, 0x7362), and a's with b's to the two halves
#     of a plane's register (0x5410, 0x7632)
# z is zero, the one bit of a lane's mask shifted meeting it nowhere, but ptxas does not see that: it keeps l0 .. h3 in
# registers, where it would copy a constant anew for every use (112 instructions a step on sm_90, 52 on sm_80).
_PTX = """{{
.reg .b32 z, l0, l1, l2, l3, h0, h1, h2, h3, sa, sb, ta, tb, ma, mb, x, y, la, ha, lb, hb;
mov.u32 z, %lanemask_eq; shr.u32 x, z, 1; and.b32 z, z, x;
xor.b32 l0, {low[0]}, z; xor.b32 l1, {low[1]}, z; xor.b32 l2, {low[2]}, z; xor.b32 l3, {low[3]}, z;
xor.b32 h0, {high[0]}, z; xor.b32 h1, {high[1]}, z; xor.b32 h2, {high[2]}, z; xor.b32 h3, {high[3]}, z;
and.b32 sa, $4, 0x77777777; shr.u32 sb, sa, 16;
shr.u32 ta, $4, 3; and.b32 ta, ta, 0x11111111; shr.u32 tb, ta, 16;
prmt.b32 ma, 0x0000ff00, 0, ta; prmt.b32 mb, 0x0000ff00, 0, tb;
prmt.b32 x, l0, l1, sa; prmt.b32 y, l2, l3, sa; lop3.b32 la, ma, y, x, 0xca;
prmt.b32 x, h0, h1, sa; prmt.b32 y, h2, h3, sa; lop3.b32 ha, ma, y, x, 0xca;
prmt.b32 x, l0, l1, sb; prmt.b32 y, l2, l3, sb; lop3.b32 lb, mb, y, x, 0xca;
prmt.b32 x, h0, h1, sb; prmt.b32 y, h2, h3, sb; lop3.b32 hb, mb, y, x, 0xca;
prmt.b32 x, la, ha, 0x5140; prmt.b32 y, lb, hb, 0x5140;
prmt.b32 $0, x, y, 0x5410; prmt.b32 $1, x, y, 0x7632;
prmt.b32 x, la, ha, 0x7362; prmt.b32 y, lb, hb, 0x7362;
prmt.b32 $2, x, y, 0x5410; prmt.b32 $3, x, y, 0x7632;
}}"""


@functools.cache
def ptx(table, dtype):
    """The lookup as inline PTX: a register of two words -> four registers of two entries in `dtype`, 16 bits each."""
    halves = torch.tensor(table, dtype=torch.float64).to(dtype).view(torch.uint8).view(4, 4, 2)     # little-endian
    low, high = ([f"0x{int.from_bytes(bytes(four), 'little'):08x}" for four in halves[:, :, i].tolist()]
                 for i in (0, 1))
    return _PTX.format(low=low, high=high)


@functools.cache
def parts(table, dtype, exact=False):
    """The table rounded to `dtype`, as a tuple; exact: and what that left of each entry, rounded to it too."""
    wanted = torch.tensor(table, dtype=torch.float64)
    high = wanted.to(dtype).to(torch.float64)
    low = (wanted - high).to(dtype)
    return (tuple(high.tolist()), tuple(low.tolist())) if exact and dtype != torch.float32 else (tuple(high.tolist()),)


def table_texts(table, dtype, exact=False):
    """What a kernel is compiled with, a text for each pass: "" without a table, a mark where it reads one."""
    if table is None:
        return ("",)
    return tuple("read" if dtype == torch.float32 else ptx(part, dtype) for part in parts(table, dtype, exact))


@functools.cache
def on_device(table, dtype, exact, device):
    """float32 [16] or, exact, [2, 16]: the table's parts."""
    return torch.tensor(parts(table, dtype, exact), dtype=torch.float32, device=device)


def _sums(table, dtype, exact, device):
    """float32 [16]: what the kernel's passes add up to."""
    return on_device(table, dtype, exact, device).sum(0)


@functools.cache
def _of_bytes(table, dtype, exact, device):
    """int64 [256]: the float32 entries of both codes of a byte, in one number: torch then copies it at once."""
    entries, every = _sums(table, dtype, exact, device), torch.arange(256, device=device)
    return torch.stack([entries[every & 15], entries[every >> 4]], 1).view(torch.int64).flatten()


def table_entries(codes, k, start, stop, table, dtype, exact=False):
    """float32 [stop - start, K]: the entries, rounded to dtype or, if exact, nearly not, of output rows start..stop of
    4-bit rows or planes."""
    if codes.dtype == torch.uint8:
        body = codes[start:stop, :-4].to(torch.int32)
        pairs = _of_bytes(table, dtype, exact, codes.device).index_select(0, body.flatten())
        return pairs.view(torch.float32).view(len(body), -1)[:, :k]
    entries = _sums(table, dtype, exact, codes.device)
    return entries[unpack_planes(codes[:, start:stop], k).to(torch.int64)]


@triton.jit
def look_up(q, table_ptr, DT: tl.constexpr, PTX: tl.constexpr, ASM: tl.constexpr):
    """int16 words [n, 32] -> the four planes [n, 32] of table entries in DT.

    PTX: the table as `ptx` writes it; table_ptr: float32 [16], exact in DT, read where there is no inline assembly.
    """
    if not ASM:
        return (tl.load(table_ptr + (q & 15)).to(DT), tl.load(table_ptr + ((q >> 4) & 15)).to(DT),
                tl.load(table_ptr + ((q >> 8) & 15)).to(DT), tl.load(table_ptr + ((q >> 12) & 15)).to(DT))
    elif DT == tl.bfloat16:
        return tl.inline_asm_elementwise(PTX, "=&r,=&r,=&r,=&r,r", [q], is_pure=True, pack=2,
                                         dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16))
    else:
        return tl.inline_asm_elementwise(PTX, "=&r,=&r,=&r,=&r,r", [q], is_pure=True, pack=2,
                                         dtype=(tl.float16, tl.float16, tl.float16, tl.float16))
