"""`generating`: a few rows of a layer on a CPU, and all that stays as it is outside."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import qzo
from qzo import PackedWeight, QZOLinear
from qzo.kernels import qmm_torch
from qzo.kernels.few_rows import MOST_ROWS
from qzo.nn import ops
from tests.support import tiny
from tests.support.close import assert_close, assert_same_bits
from tests.support.small_layers import asymmetric, block, linear

K = 128


def layer(bits=4, zeros=None, perm=False, bias=True, n=33, top=None):
    """Of random codes below `top`, with scales of both signs."""
    random = torch.Generator().manual_seed(bits + n)
    codes = torch.randint(top or 1 << bits, (n, K), generator=random).to(torch.uint8)
    points = None if zeros is None else (torch.rand(K // 32, n, generator=random) * (1 << bits)).to(zeros)
    order = torch.randperm(K, generator=random) if perm else None
    packed = PackedWeight.from_codes(codes, torch.randn(K // 32, n, generator=random), points, bits, order)
    return QZOLinear.from_packed(packed, torch.randn(n, generator=random) if bias else None)


LAYERS = {
    "2 bits": lambda: layer(2, torch.uint8),
    "3 bits, held in 4": lambda: layer(4, torch.uint8, top=8),
    "4 bits": lambda: layer(),
    "4 bits, float zero points, no bias": lambda: layer(4, torch.float32, bias=False),
    "8 bits": lambda: layer(8, torch.float32),
    "columns sorted by group": lambda: layer(4, torch.uint8, perm=True),
    "a whole row to a scale": lambda: QZOLinear.from_linear(linear(), group_size=-1),
}


def unit_of(quantized, x):
    """What an output adds up; a rounding of float32 or of the result's type is to be 2^-20 of it at the most."""
    size = x.double().abs() @ quantized.dequantize().double().abs().T
    return size * max(2.0**-20, torch.finfo(x.dtype).eps) + 1e-6


def x_of(rows, dtype=torch.float32):
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.fixture
def no_chunks(monkeypatch):
    """A product by chunks of W fails."""

    def refuse(*arguments, **options):
        raise AssertionError("W was made in chunks")

    monkeypatch.setattr(qmm_torch, "qmm_torch", refuse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_a_few_rows_are_those_of_the_dequantized_weight(name, dtype, no_chunks):
    made = LAYERS[name]().to(dtype)
    bias = 0.0 if made.bias is None else made.bias.double()
    with qzo.generating(made):
        for rows in (1, 3, MOST_ROWS):
            x = x_of(rows, dtype)
            want = x.double() @ made.dequantize().double().T + bias
            assert_close(made(x), want, unit_of(made, x) + want.abs() * torch.finfo(dtype).eps, 1)


def test_more_rows_and_other_codes_have_the_bits_that_they_have_outside():
    vectors = PackedWeight.from_vectors(torch.randint(0, 256, (12, K // 8, 2)), torch.rand(12), torch.randn(2, 256, 8))
    model = nn.ModuleList(
        [layer(), QZOLinear.from_linear(linear(), 4, 32, table="nf4"), QZOLinear.from_packed(vectors)]
    )
    many, few = x_of(MOST_ROWS + 1), x_of(1)
    runs = [(model[0], many), (model[1], few), (model[1], many), (model[2], few), (model[2], many)]
    outside = [made(x) for made, x in runs]
    with qzo.generating(model):
        inside = [made(x) for made, x in runs]
    for got, want in zip(inside, outside, strict=True):
        assert_same_bits(got, want)


def written_and_broken_off(made, x):
    """y of x inside, and a weak reference to what was held there; an error ended it."""
    found: list[Any] = []

    def write():
        with qzo.generating(made):
            found.extend((made(x), weakref.ref(made.kernel_weight().turned)))
            raise KeyError

    with pytest.raises(KeyError):
        write()
    return found


def test_outside_nothing_is_left_of_it():
    made, x = layer(4, torch.float32), x_of(1)
    before = made(x)
    inside, held = written_and_broken_off(made, x)
    gc.collect()
    assert held() is None, "its memory is kept"
    assert not torch.equal(inside, before), "it did nothing"
    assert_same_bits(made(x), before)


def test_no_step_can_run_inside():
    model = block()
    evaluations = qzo.Evaluations([1, 1], [0.1, -0.1])
    x = torch.randn(2, 64)
    with qzo.evaluating(model, evaluations):
        before = model(x)
    refused = pytest.raises(RuntimeError, match=r"leave generating\(\) before a step")
    with qzo.generating(model), refused, qzo.evaluating(model, evaluations):
        model(x)
    with qzo.evaluating(model, evaluations):
        with pytest.raises(RuntimeError, match="leave evaluating"), qzo.generating(model):
            model(x)
        assert_same_bits(model(x), before)


@pytest.mark.parametrize("count", [1, 2])
def test_a_perturbed_product_runs_as_outside(count):
    made, x = layer(4, torch.float32), x_of(2)
    perturbation = qzo.Evaluations([7, 7][:count], [0.1, -0.1][:count]).perturbation
    outside = ops.matmul(x, made.kernel_weight(), perturbation)
    with qzo.generating(made):
        assert_same_bits(ops.matmul(x, made.kernel_weight(), perturbation), outside)
    assert not torch.equal(outside, made(x))


def test_one_inside_another_ends_with_the_outer_one(no_chunks):
    made, x = layer(), x_of(1)
    with qzo.generating(made):
        want = made(x)
        with qzo.generating(made):
            assert_same_bits(made(x), want)
        assert_same_bits(made(x), want)


def test_new_scales_and_new_codes_are_followed():
    made, other, x = asymmetric(K, 24), asymmetric(K, 24, float_zeros=False), x_of(1)
    other.codes[:, 0] ^= 0x55
    with qzo.generating(made):
        first = made(x)
        made.arena.data.mul_(-2.0)
        assert_close(made(x) - made.bias, -2 * (first - made.bias), unit_of(made, x), 1)
        made.load_state_dict(other.state_dict())
        assert_close(made(x), x @ other.dequantize().T + other.bias, unit_of(other, x), 1)
    assert not torch.equal(made.dequantize(), asymmetric(K, 24).dequantize())


def test_a_copy_and_a_move_made_inside_are_as_any_other():
    made, x = layer(), x_of(1)
    outside = made(x)
    with qzo.generating(made):
        copied, half = copy.deepcopy(made), copy.deepcopy(made).half()
        assert half(x.half()).dtype == torch.float16
    assert_same_bits(copied(x), outside)


def test_who_follows_operators_gets_the_same(no_chunks):
    made, x = layer(), x_of(2)
    with qzo.generating(made):
        want = made(x)
        assert_same_bits(made(x.clone().requires_grad_()).detach(), want)
        with torch.inference_mode():
            assert_same_bits(made(x), want)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("llama"))


def test_a_model_writes_the_same_words(folder):
    model = qzo.from_pretrained(folder, group_size=32)
    assert isinstance(model, LlamaForCausalLM)
    start = torch.tensor([[5, 9, 12, 4]])
    options = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(start))
    want = model.generate(start, **options)
    with qzo.generating(model):
        got = model.generate(start, **options)
    assert got.tolist() == want.tolist()
    assert len(got[0]) == 16
