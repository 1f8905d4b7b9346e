"""One launch for several weights has the bits of several: the kernel, a model's steps, and on a GPU."""
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import qzo
from qzo.kernels import plan, tiles
from qzo.nn.layers import arena_of
from tests.support.close import assert_same_bits
from tests.support.matmuls import TILE, Matmul

MEMBERS = ((33, 1000), (20, 5), (7, 1 << 20))           # outputs and first quads of three weights
PAIRED = dict(seeds=(5, 5, 9, 9), coefs=(0.1, -0.1, 0.0, 0.02), pair=True)
FORMS: dict[str, dict[str, Any]] = {
    "three evaluations": {}, "two": dict(seeds=(1, 2), coefs=(0.1, 0.0)), "one": dict(seeds=(4,), coefs=(0.1,)),
    "pairs": PAIRED, "none": dict(law=None), "gaussian, the whole row": dict(law="gaussian", group=0),
    "absolute": dict(relative=False, coefs=(0.001, -0.001, 0.0)), "noise of rows": dict(shared=True, **PAIRED),
    "integer zeros, bias": dict(zeros="uint8", bias=True), "float zeros": dict(zeros="float32", bias=True, k=448),
    "float zeros, the whole row": dict(zeros="float32", group=0, relative=False), "int2": dict(bits=2, group=32),
    "table": dict(table=tuple(i / 8 - 1 for i in range(16))), "float32": dict(dtype=torch.float32)}


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_one_launch_has_the_bits_of_several(form, splits, nan_poison, monkeypatch):
    kept, scratch = [], plan.Plan.scratch
    monkeypatch.setattr(plan.Plan, "scratch", lambda self, shape: kept.append(scratch(self, shape)) or kept[-1])
    summed, sums = [], plan.Plan._sum_groups
    monkeypatch.setattr(plan.Plan, "_sum_groups", lambda *a: (summed.append(1), sums(*a))[1])
    matmuls = [Matmul(**{"k": 512, **FORMS[form]}, n=n, base4=base4) for n, base4 in MEMBERS]
    weights, perturbation, x = [m.operands()[0] for m in matmuls], matmuls[0].operands()[1], matmuls[0].x
    how = dict(tile=dataclasses.replace(TILE, splits=splits), asm=False)

    def empty():
        return [torch.empty(len(x), weight.out_features) for weight in weights]
    alone = empty()
    for weight, y in zip(weights, alone, strict=True):
        plan.launch(x, weight, perturbation, y, **how)
    for count in (2, 3) if form == "pairs" else (3,):
        together = empty()[:count]
        summed.clear()
        kept.clear()
        plan.launch(x, weights[0], perturbation, *together, others=weights[1:count], **how)
        assert len(summed) == (matmuls[0].zeros == "float32"), "the sums of x are the same for all"
        assert not any(part.isnan().any() for part in kept), "every part has a place of its own"
        for y, want in zip(together, alone, strict=False):
            assert_same_bits(y, want)


def test_what_differs_in_more_than_its_outputs_needs_a_launch_of_its_own():
    first = Matmul().operands()[0]
    assert plan.together(first, Matmul(n=20, base4=7).operands()[0])
    for form in (dict(k=512), dict(group=32), dict(group=0), dict(zeros="uint8"), dict(bias=True), dict(bits=8),
                 dict(table=(0.5,) * 16), dict(base4=1 << 32)):
        assert not plan.together(first, Matmul(**form).operands()[0]), form
    vectors = Matmul(group=0, books=2, bits=8).operands()[0]
    assert not plan.together(vectors, vectors)
    half, single = (dataclasses.replace(first, bias=torch.zeros(33, dtype=t)) for t in (torch.float16, torch.float32))
    assert not plan.together(half, single)


# ------------------------------------------------------------------------------------------- a model of transformers

def llama(kv_heads):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=kv_heads, vocab_size=40, max_position_embeddings=32)
    return qzo.quantize_(LlamaForCausalLM(config), group_size=32)


@pytest.mark.parametrize(("kv_heads", "a_block"), [(4, [3, 1, 2, 1]), (2, [1, 2, 1, 2, 1])])
def test_steps_of_a_llama_have_the_same_bits(kv_heads, a_block, launches, monkeypatch, tmp_path):
    pick = tiles.pick
    monkeypatch.setattr(tiles, "pick", lambda p: dataclasses.replace(pick(p), splits=1 + (p.n < 64)))
    ids = torch.arange(16).view(2, 8) + 3
    found = []
    for shared in (True, False):
        model, path = llama(kv_heads), tmp_path / f"{shared}.qzo"
        optimizer = qzo.QZO(model, lr=1e-2, directions=1, seed=5, journal=path)
        with qzo.backend("triton", shared_launches=shared):
            losses = qzo.losses(model, {"input_ids": ids, "labels": ids}, 1)
            launches.clear()
            for _ in range(2):
                optimizer.step(lambda model=model: qzo.losses(model, {"input_ids": ids, "labels": ids}, 2))
        assert launches == (a_block if shared else [1] * 7) * 4
        found.append((losses, arena_of(model).data, path.read_bytes()))
    (losses, scales, journal), (plain_losses, plain_scales, plain_journal) = found
    assert_same_bits(losses, plain_losses)
    assert_same_bits(scales, plain_scales)
    assert journal == plain_journal


def test_a_mixtures_experts_share_launches(launches):
    from qzo.nn.experts import Expert

    torch.manual_seed(0)
    expert = Expert(torch.randn(128, 64), torch.randn(64, 64), nn.SiLU())
    qzo.quantize_(expert, group_size=32)
    x = torch.randn(4, 5, 64).half()
    with qzo.backend("triton"):
        want = expert(x)
        launches.clear()
        assert_same_bits(expert(x), want)
    assert launches == [2, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 64, 128])
def test_compiled_launches_that_are_shared_have_the_same_bits(rows, zeros, launches):
    """Sizes of Llama-2 and of grouped queries: bits of the tiles, splits and alignments that a chip really has."""
    for kv in (2048, 512):
        model = nn.ModuleDict({name: nn.Linear(2048, n) for name, n in (("q", 2048), ("k", kv), ("v", kv))})
        model = qzo.quantize_(model, symmetric=not zeros).cuda().half()
        found = []
        with qzo.evaluating(model, qzo.Evaluations([3, 3], [0.01, -0.01])):
            for shared in (False, True, True, True):
                x = torch.randn(2 * rows, 2048, generator=torch.Generator().manual_seed(1)).half().cuda()
                launches.clear()
                with qzo.backend(shared_launches=shared):
                    found.append([layer(x) for layer in model.values()])
        assert max(launches) > 1
        for ys in found:
            for y, want in zip(ys, found[0], strict=True):
                assert_same_bits(y.cpu(), want.cpu())
