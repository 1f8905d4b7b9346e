"""A layer's codebooks under each evaluation, for codebooks that train (off by default).

    out[e] = p of qmm.py for every entry, with the noise of its place in the arena

Unlike weights, codebooks are small beside the codes that choose from them, and each entry is multiplied in thousands of
places: its noise is made once a layer, not once a place. One layer's are held at a time, an entry in the type of the
activations.
"""
import torch
import triton
import triton.language as tl

from .noise import BLOCK_QUADS, ROUNDS, quad_noise, raw_noise
from .qmm import WIDE_FROM, perturb
from .qmm_torch import perturb_torch

BLOCK = 256          # quads of a program


@triton.jit(do_not_specialize=["base4", "quads"])
def _perturb_kernel(values_ptr, out_ptr, seeds_ptr, coefs_ptr, base4: tl.int64, quads: tl.int32,
                    LAW: tl.constexpr, RELATIVE: tl.constexpr, WIDE: tl.constexpr, ROUNDS_: tl.constexpr,
                    BLOCK_: tl.constexpr):
    """out [E, quads, 4] from values [quads, 4]; grid = (cdiv(quads, BLOCK_), E)."""
    i = tl.program_id(0) * BLOCK_ + tl.arange(0, BLOCK_)
    live = (i < quads)[:, None]
    at = 4 * i[:, None] + tl.arange(0, 4)[None, :]
    k0, k1, k2, k3 = quad_noise(tl.load(seeds_ptr + tl.program_id(1)), base4 + i, LAW, WIDE, ROUNDS_)
    k = tl.reshape(tl.join(tl.join(k0, k2), tl.join(k1, k3)), (BLOCK_, 4))
    p = perturb(tl.load(values_ptr + at, mask=live, other=0.0), k, tl.load(coefs_ptr + tl.program_id(1)), RELATIVE)
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * quads * 4 + at, p.to(out_ptr.dtype.element_ty), mask=live)


def launch(values, seeds, coefs, out, *, base4, law, relative):
    """Fill out [E, quads, 4] from float32 values [quads, 4], whose first quad has the number base4."""
    quads = len(values)
    _perturb_kernel[(triton.cdiv(quads, BLOCK), len(seeds))](
        values, out, seeds, coefs, base4, quads, LAW=law, RELATIVE=bool(relative), WIDE=base4 + quads > WIDE_FROM,
        ROUNDS_=ROUNDS, BLOCK_=BLOCK, num_warps=4, enable_fp_fusion=False)


def perturb_codebooks_torch(values, seeds, coefs, out, *, base4, law, relative):
    """Twin of launch, on any device; the same bits for the integer laws."""
    for start in range(0, len(values), BLOCK_QUADS):
        some = values[start:start + BLOCK_QUADS]
        quads = torch.arange(base4 + start, base4 + start + len(some), device=values.device)
        for e, coef in enumerate(coefs):
            out[e, start:start + BLOCK_QUADS] = perturb_torch(some, raw_noise(law, seeds[e], quads), coef, relative)
