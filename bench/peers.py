"""Peers that are timed where they are installed: their own kernels, on scales that nothing perturbs.

Each is given the weight of a case in its own way: some take the codes and scales as they are, others quantize the
dense weight by themselves and are compared with it within what four bits cost. Rows of both signs go through one call.
"""

import functools
import importlib

import torch

from ..nn.weights import unpack_codes
from .providers import EVERY, EXACT, Built, Provider

# relative RMS error allowed: of the very weight, however it is multiplied; and what rounding it to 4 bits costs
SAME_CODES = 4 * EXACT["bfloat16"]
REQUANTIZED = 0.2


def _peer(problem, make, allowed, bytes_per_weight=0.5):
    """make(problem, packed, k, n) -> function of x."""
    shapes, passes = problem.shapes(bytes_per_weight)
    packed = [(problem.packed(k, n), k, n) for k, n in shapes]
    forwards = [(make(problem, p, k, n), k) for p, k, n in packed]
    first, k, _ = packed[0]
    want = problem.truth(first, first.scales, first.scales)

    def run(part=EVERY):
        return [forward(problem.x[k]) for forward, k in forwards[part]]

    return Built(run, passes, lambda: forwards[0][0](problem.x[k]), want, allowed)


def _gemlite(problem, packed, k, n):
    core = importlib.import_module("gemlite.core")
    kind = core.TORCH_TO_DTYPE[problem.dtype]
    layer = core.GemLiteLinearTriton(
        4, group_size=problem.case.group, in_features=k, out_features=n, input_dtype=kind, output_dtype=kind
    )
    scales = packed.scales.T.reshape(-1, 1).to(problem.dtype)
    layer.pack(unpack_codes(packed.codes, k), scales, torch.full_like(scales, 8), None)
    return layer


def _float_linear(problem, packed, k, n):
    layer = torch.nn.Linear(k, n, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(packed.dequantize().to(problem.dtype), requires_grad=False)
    return layer


def _torchao(problem, packed, k, n):
    quantization = importlib.import_module("torchao.quantization")
    layer = torch.nn.Sequential(_float_linear(problem, packed, k, n))
    quantization.quantize_(layer, quantization.Int4WeightOnlyConfig(group_size=problem.case.group))
    return layer


def _bitsandbytes(problem, packed, k, n):
    """Its own NF4 of the weight: where that is NF4 in blocks of 64, it finds codes and absmax again."""
    bnb = importlib.import_module("bitsandbytes")
    weight, state = bnb.functional.quantize_4bit(packed.dequantize().to(problem.dtype), blocksize=64, quant_type="nf4")
    return lambda x: bnb.matmul_4bit(x, weight.t(), quant_state=state)


def _hqq(problem, packed, k, n):
    quantize = importlib.import_module("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=problem.case.group, axis=1)
    return quantize.HQQLinear(
        _float_linear(problem, packed, k, n), quant_config=config, compute_dtype=problem.dtype, device=problem.device
    )


def _gptqmodel(problem, packed, k, n, kernel, kind):
    module = importlib.import_module(f"gptqmodel.nn_modules.qlinear.{kernel}")
    layer = getattr(module, kind)(
        bits=4,
        group_size=problem.case.group,
        desc_act=False,
        sym=True,
        in_features=k,
        out_features=n,
        bias=False,
        pack_dtype=torch.int32,
    ).to(problem.device)
    codes = unpack_codes(packed.codes, k).to(torch.int32).T.reshape(k // 8, 8, n)  # eight along k a word
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=problem.device)
    layer.qweight.data = (codes << shifts[None, :, None]).sum(1, dtype=torch.int32)
    layer.scales.data = packed.scales.to(problem.dtype)
    if getattr(layer, "qzeros", None) is not None:
        layer.qzeros.data.fill_(-2004318072)  # 0x88888888
    layer.post_init()
    return layer


def _provider(name, make, package, allowed=REQUANTIZED, codes=("int4",)):
    def build(problem):
        return _peer(problem, make, allowed if problem.case.codes == "int4" else SAME_CODES)

    return Provider(name, build, package, ("linear",), True, codes)


PROVIDERS = (
    _provider("gemlite", _gemlite, "gemlite", SAME_CODES),
    _provider("torchao", _torchao, "torchao"),
    _provider("bitsandbytes", _bitsandbytes, "bitsandbytes", codes=("int4", "nf4")),
    _provider(
        "gptqmodel-marlin",
        functools.partial(_gptqmodel, kernel="marlin", kind="MarlinQuantLinear"),
        "gptqmodel",
        SAME_CODES,
    ),
    _provider(
        "gptqmodel-triton",
        functools.partial(_gptqmodel, kernel="tritonv2", kind="TritonV2QuantLinear"),
        "gptqmodel",
        SAME_CODES,
    ),
    _provider("hqq", _hqq, "hqq"),
)
