"""A layer's codebooks under an evaluation, for codebooks that train (off by default).

    out = p of qmm.py for every entry, with the noise of its place in the arena

Unlike weights, codebooks are small beside the codes that choose from them, and each entry is multiplied in thousands of
places: its noise is made once, not once a place. Those of one layer under one evaluation are held at a time, in the
type of the activations.
"""
import torch
import triton
import triton.language as tl

from .constants import WIDE_FROM
from .noise import BLOCK_QUADS, RAW_BYTES, quad_noise, raw_noise
from .qmm_torch import perturb_torch
from .scales import perturb

BLOCK = 256          # quads of a program


@triton.jit(do_not_specialize=["base4", "quads"], do_not_specialize_on_alignment=["seed_ptr", "coef_ptr"])
def _perturb_kernel(values_ptr, out_ptr, seed_ptr, coef_ptr, base4: tl.int64, quads: tl.int32,
                    LAW: tl.constexpr, RELATIVE: tl.constexpr, WIDE: tl.constexpr, BLOCK_: tl.constexpr):
    """out [quads, 4] from values [quads, 4]; grid = (cdiv(quads, BLOCK_),)."""
    i = tl.program_id(0) * BLOCK_ + tl.arange(0, BLOCK_)
    live = (i < quads)[:, None]
    at = 4 * i[:, None] + tl.arange(0, 4)[None, :]
    k0, k1, k2, k3 = quad_noise(tl.load(seed_ptr), base4 + i, LAW, WIDE)
    k = tl.reshape(tl.join(tl.join(k0, k2), tl.join(k1, k3)), (BLOCK_, 4))
    p = perturb(tl.load(values_ptr + at, mask=live, other=0.0), k, tl.load(coef_ptr), RELATIVE)
    tl.store(out_ptr + at, p.to(out_ptr.dtype.element_ty), mask=live)


def launch(values, seed, coef, out, *, base4, law, relative):
    """Fill out [quads, 4] from float32 values [quads, 4], whose first quad has the number base4; seed, coef: [1]."""
    quads = len(values)
    _perturb_kernel[(triton.cdiv(quads, BLOCK),)](
        values, out, seed, coef, base4, quads, LAW=law, RELATIVE=bool(relative), WIDE=base4 + quads > WIDE_FROM,
        BLOCK_=BLOCK, num_warps=4, enable_fp_fusion=False)


def scratch_bytes(quads):
    """Bytes that perturb_codebooks_torch holds for a while: a block's numbers, noise and result."""
    return min(BLOCK_QUADS, quads) * (8 + RAW_BYTES + 16)


def perturb_codebooks_torch(values, seed, coef, out, *, base4, law, relative):
    """Reference implementation of launch, on any device; the same bits for the integer laws."""
    for start in range(0, len(values), BLOCK_QUADS):
        some = values[start:start + BLOCK_QUADS]
        quads = torch.arange(base4 + start, base4 + start + len(some), device=values.device)
        out[start:start + BLOCK_QUADS] = perturb_torch(some, raw_noise(law, seed[0], quads), coef[0], relative)
