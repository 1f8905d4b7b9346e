"""No step allocates a tensor shaped like a layer's weight or as large as the arena.

Two recorders: the profiler sees every call of torch's CPU allocator, also those inside operators, and gives
bytes; a dispatch mode sees the result of every operator, and gives shapes.
"""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import qzo
from qzo.kernels import noise, qmm_torch, update
from qzo.kernels.codes import pack_rows
from qzo.nn import ops
from tests.support.aqlm_checkpoints import a_layer
from tests.support.matmuls import Matmul

LARGE_K, LARGE_N = 1024, 2560  # the CPU's chunks of 1 MB stay below one byte for each of its weights


def allocations(function):
    """Bytes of every allocation that torch's CPU allocator makes while `function` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    found, events = [], list(record.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if hasattr(event.extra_fields, "alloc_size"):
            found.append(event.extra_fields.alloc_size)
    return [size for size in found if size > 0]


class Shapes(TorchDispatchMode):
    """Collects the shape of every tensor that an operator returns in memory of its own."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {
            t.untyped_storage().data_ptr()
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.seen.append(tuple(t.shape))
        return result


def layer_and_batch(k=LARGE_K, n=LARGE_N):
    """One layer in a model, a stacked batch of 2 evaluations of 2 rows, and the evaluations."""
    model = torch.nn.Sequential(torch.nn.Linear(k, n))
    qzo.quantize_(model, group_size=64)
    evaluations = qzo.Evaluations([1, 1], [0.1, -0.1], noise="ih4")
    return model, torch.randn(2, k).repeat(2, 1), evaluations


def step(model, x, evaluations):
    with qzo.evaluating(model, evaluations):
        model(x)
    arena = model[0].arena.data
    ops.update_op(arena, evaluations.seeds, evaluations.kernel_coefs, 0, noise.IH4, True, 0.0)


@pytest.mark.parametrize(("backend", "k", "n"), [("torch", LARGE_K, LARGE_N), ("triton", 256, 192)])
def test_no_step_allocates_a_weight(backend, k, n):
    """Not even one byte for each of its numbers."""
    model, x, evaluations = layer_and_batch(k, n)
    with qzo.backend(backend):
        step(model, x, evaluations)  # codes may change their layout once
        sizes = allocations(lambda: step(model, x, evaluations))
    assert len(x) * n * 4 in sizes, "the layer's own output has to be among what is recorded"
    assert max(sizes) < k * n


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("backend", "k", "n"), [("torch", LARGE_K, LARGE_N), ("triton", 256, 192)])
def test_no_step_allocates_a_weight_of_vectors(backend, k, n, train):
    """Neither do codebooks that train: what is held of them is as large as they are."""
    layer = a_layer(2, 4, n, k)
    if train:
        qzo.train_codebooks_(layer)
    model, x = torch.nn.Sequential(layer), torch.randn(2, k).repeat(2, 1)
    evaluations = qzo.Evaluations([1, 1], [0.1, -0.1], noise="ih4")
    with qzo.backend(backend):
        sizes = allocations(lambda: step(model, x, evaluations))
    assert len(x) * n * 4 in sizes
    assert (layer.codebooks.nbytes in sizes) == train
    assert max(sizes) < k * n


@pytest.mark.parametrize(
    ("function", "scales"), [(update.update_torch, 200), (update.update_torch, 1 << 19), (update.launch, 8192)]
)
def test_an_update_allocates_less_than_the_arena(function, scales):
    arena = torch.ones(scales)
    seeds, coefs = torch.tensor([1, 2]), torch.tensor([0.1, 0.2])
    numbers = dict(base4=0, law=noise.IH4, relative=True, floor=0.0)
    sizes = allocations(lambda: function(arena, seeds, coefs, **numbers))
    assert max(sizes, default=0) < arena.nbytes


@pytest.mark.parametrize("zeros", [None, "uint8", "float32"])
@pytest.mark.parametrize("group", [32, 0])
@pytest.mark.parametrize(("k", "n"), [(576, 192), (640, 700), (32, 33)])
def test_no_operator_of_the_cpu_backend_returns_a_whole_weight(zeros, group, k, n):
    matmul = Matmul(k=k, n=n, rows=2, group=group, zeros=zeros, dtype=torch.float32)
    (weight, perturbation), y = matmul.operands(form=pack_rows), torch.empty(len(matmul.x), n)
    with Shapes() as shapes:
        qmm_torch.qmm_torch(matmul.x, weight, perturbation, y)
    sizes = [torch.Size(shape).numel() for shape in shapes.seen]
    assert len(sizes) > 10
    assert max(sizes) < k * n


# ----------------------------------------------------------------------------------- the recorders see things


def test_a_planted_dequantization_is_recorded(monkeypatch):
    model, x, evaluations = layer_and_batch()
    step(model, x, evaluations)
    assert max(allocations(model[0].dequantize)) >= 4 * LARGE_K * LARGE_N
    monkeypatch.setattr(qmm_torch, "chunk_rows", lambda n, k: n)
    assert max(allocations(lambda: step(model, x, evaluations))) >= 4 * LARGE_K * LARGE_N


def test_a_planted_dequantization_shows_its_shape():
    model, _, _ = layer_and_batch(256, 64)
    with Shapes() as shapes:
        model[0].dequantize()
    assert (64, 256) in shapes.seen


def test_the_noise_of_a_whole_arena_is_recorded(monkeypatch):
    arena = torch.ones(1 << 19)
    monkeypatch.setattr(update, "BLOCK_QUADS", 1 << 30)
    monkeypatch.setattr(update, "min", lambda *sizes: sizes[0], raising=False)
    sizes = allocations(
        lambda: update.update_torch(
            arena, torch.tensor([1]), torch.tensor([0.1]), base4=0, law=noise.IH4, relative=True, floor=0.0
        )
    )
    assert max(sizes) >= arena.nbytes
