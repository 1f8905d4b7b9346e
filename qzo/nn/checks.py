"""What a matmul is asked for has to fit: shapes, dtypes and devices, each fault named with what to do."""

import torch

from ..kernels import vectors
from ..kernels.operands import Perturbation, Weight


def check_matmul(x: torch.Tensor, weight: Weight, perturbation: Perturbation) -> None:
    """Shapes, dtypes and devices of a matmul, once for each plan; the operator's fake asks the same."""
    if x.dim() < 1 or not x.is_floating_point() or x.dtype == torch.float64:
        raise TypeError(f"x must be float16, bfloat16 or float32 [.., in_features], got {x.dtype} {list(x.shape)}")
    k = x.shape[-1]
    codes, scales, zeros, bits, group = weight.codes, weight.scales, weight.zeros, weight.bits, weight.group
    n = codes.shape[0] if codes.dtype == torch.uint8 else codes.shape[1]
    seeds, coefs = perturbation.seeds, perturbation.coefs
    if weight.codebooks is not None:
        _check_codebooks(weight, weight.codebooks, k, perturbation.shared)
    wanted = weight.form.shape(n, k, weight.in_rows)
    if codes.dtype not in (torch.uint8, torch.int16) or list(codes.shape) != wanted or k != weight.in_features:
        raise ValueError(
            f"x has {k} columns, which does not fit {bits}-bit codes {codes.dtype} {list(codes.shape)}: "
            "in_features of the layer and the last dimension of its input must agree"
        )
    if k % group:
        raise ValueError(f"group_size {group} does not divide in_features {k}; use one that does, or -1 (whole row)")
    groups = k // group
    if scales.dtype != torch.float32 or list(scales.shape) != [-(-groups // 4), n, 4]:
        raise ValueError(f"scales must be float32 {[-(-groups // 4), n, 4]}, got {scales.dtype} {list(scales.shape)}")
    if zeros is not None and (zeros.dtype not in (torch.uint8, torch.float32) or list(zeros.shape) != [groups, n]):
        raise ValueError(f"zeros must be uint8 or float32 {[groups, n]}, got {zeros.dtype} {list(zeros.shape)}")
    if weight.table is not None and (len(weight.table) != 16 or bits != 4 or zeros is not None):
        raise ValueError(
            f"a table of 16 entries goes with 4-bit codes and no zeros, got {len(weight.table)} entries, "
            f"{bits} bits" + ("" if zeros is None else " and zeros")
        )
    if weight.bias is not None and list(weight.bias.shape) != [n]:
        raise ValueError(f"bias must have shape {[n]}, got {list(weight.bias.shape)}")
    if seeds.numel() != coefs.numel() or seeds.numel() == 0:
        raise ValueError(
            f"{seeds.numel()} seeds and {coefs.numel()} coefficients: one of each per evaluation is wanted"
        )
    check_rows(x, perturbation)
    for name, t in (*weight.tensors().items(), ("seeds", seeds), ("coefs", coefs)):
        if t.device != x.device:
            raise ValueError(
                f"x is on {x.device} but the layer's {name} on {t.device}: move the whole model with model.to(device)"
            )


def check_rows(x: torch.Tensor, perturbation: Perturbation) -> None:
    """ValueError unless the first dimension holds as many rows of each evaluation."""
    rows, count = (x.shape[0] if x.dim() > 1 else 1), len(perturbation)
    if rows % count:
        raise ValueError(
            f"{rows} rows do not divide into {count} evaluations: stack the batch {count} times along its "
            "first dimension (qzo.pair does it)"
        )


def _check_codebooks(weight: Weight, books: torch.Tensor, k: int, shared: bool) -> None:
    """ValueError unless they are [C, 2^bits, 8], one scale to an output; if they train, with noise for each number."""
    bits, zeros, table = weight.bits, weight.zeros, weight.table
    if books.dim() != 3 or list(books.shape[1:]) != [1 << bits, vectors.LENGTH]:
        raise ValueError(
            f"codebooks must be [C, {1 << bits}, {vectors.LENGTH}] for codes of {bits} bits, got {list(books.shape)}"
        )
    if weight.group != k or zeros is not None or table is not None:
        also = ("" if zeros is None else ", zeros") + ("" if table is None else ", a table")
        raise ValueError(
            f"x has {k} columns, and codebooks go with one scale to an output row of as many, no zeros "
            f"and no table; got a group_size of {weight.group}{also}: in_features of the layer and the "
            "last dimension of its input must agree"
        )
    if weight.book4 >= 0 and (shared or books.dtype != torch.float32 or not books.is_contiguous()):
        raise ValueError(
            "codebooks that train are contiguous float32 with noise for each number, got "
            f"{books.dtype}" + (" and noise shared by rows" if shared else "")
        )
