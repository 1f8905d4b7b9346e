"""Offloaded, a run has the bits it has without, whatever the copies do; what goes over the bus is counted."""

import copy
import functools
import gc
import pickle

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import qzo
from qzo.nn.layers import arena_of, layers
from qzo.nn.streaming import offload as streaming
from qzo.nn.streaming.slots import Slots
from qzo.nn.streaming.stores import FileStore, HostStore
from tests.support import offloads, small_layers
from tests.support.journals import read_whole


@pytest.fixture(scope="module")
def base():
    return offloads.tower()


@pytest.fixture(scope="module")
def wanted(base):
    return offloads.run(copy.deepcopy(base))


# ---------------------------------------------------------------------------------------------- whole runs


def journalled(model, path, steps, directions, losses):
    """The arena after a run of losses(step, evaluations) that goes on where its journal ends, up to so many steps."""
    optimizer = qzo.QZO(model, lr=0.02, directions=directions, journal=path, resume=path.exists())
    for step in range(optimizer.param_groups[0]["step"], steps):
        optimizer.step(functools.partial(losses, step, 2 * directions))
    optimizer.close()
    return arena_of(model).data


@pytest.mark.parametrize("directions", [1, 2])
def test_fifty_steps_have_the_bits_of_the_resident_run_and_go_on_in_any_mode(base, tmp_path, directions):
    def run(name, steps, to=None):
        model = copy.deepcopy(base)
        if to is not None:
            qzo.offload(model, to, folder=tmp_path)

        def losses(step, count):
            x = torch.randn(3, 64, generator=torch.Generator().manual_seed(step))
            return model(x.repeat(count, 1)).square().mean(1).view(count, -1).mean(1)

        return journalled(model, tmp_path / name, steps, directions, losses)

    resident = run("resident", 50)
    for steps, to in ((20, "cpu"), (35, "disk"), (40, None), (50, "cpu")):
        mixed = run("mixed", steps, to)
    assert torch.equal(mixed, resident)
    assert (tmp_path / "mixed").read_bytes() == (tmp_path / "resident").read_bytes()
    assert len(read_whole(tmp_path / "mixed")[1]) == 50
    gc.collect()
    assert not list(tmp_path.glob("offload*")), "files go with their models"


def test_the_decoder_of_transformers_needs_no_forward_of_its_own(tmp_path):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, vocab_size=40
    )
    base = qzo.quantize_(LlamaForCausalLM(config).eval().requires_grad_(False), group_size=32)
    ids = torch.arange(12).view(2, 6)

    def run(name, to=None):
        model = copy.deepcopy(base)
        if to is not None:
            assert len(qzo.offload(model, to, folder=tmp_path, slots=2).blocks) == 4

        def losses(step, count):
            parts = [qzo.pair({"input_ids": part + step, "labels": part + step}, count) for part in ids.chunk(2)]
            return sum(qzo.together(model, [functools.partial(qzo.losses, model, part, count) for part in parts]))

        return journalled(model, tmp_path / name, 3, 1, losses), (tmp_path / name).read_bytes()

    resident = run("resident")
    for to in ("cpu", "disk"):
        arena, journal = run(to, to)
        assert torch.equal(arena, resident[0])
        assert journal == resident[1]


def test_twenty_schedules_of_delays_change_no_bit(base, wanted, monkeypatch):
    for seed in range(20):
        offloads.delayed(monkeypatch, seed)
        model = copy.deepcopy(base)
        qzo.offload(model, slots=2 + seed % 2)
        assert offloads.same(offloads.run(model), wanted), seed


@pytest.mark.parametrize("slots", [2, 3])
def test_poison_in_a_slot_from_the_first_moment_of_its_copy_changes_no_bit(base, wanted, monkeypatch, slots):
    offloads.through(monkeypatch, offloads.LateCopier)
    model = copy.deepcopy(base)
    qzo.offload(model, slots=slots)
    assert offloads.same(offloads.run(model), wanted)


def test_a_slot_that_is_reused_too_early_is_seen_by_its_poison(base, wanted, monkeypatch):
    class Hasty(Slots):
        def _fetch_ahead(self, block):
            for _ in range(3):  # one more than there are slots beside the one in use
                block = self._next[block]
                self._fetch(block)

    offloads.through(monkeypatch, offloads.LateCopier)
    monkeypatch.setattr(streaming, "Slots", Hasty)
    model = copy.deepcopy(base)
    qzo.offload(model)
    with pytest.warns(UserWarning, match="NaN or infinite loss"):
        assert not offloads.same(offloads.run(model), wanted)


@pytest.mark.parametrize(("directions", "paired", "parts"), [(1, False, 1), (2, False, 2), (1, True, 3)])
def test_forwards_side_by_side_have_the_bits_of_one_after_another(base, monkeypatch, directions, paired, parts):
    offloads.through(monkeypatch, offloads.LateCopier)
    way = {"directions": directions, "paired": paired, "parts": parts}
    model = copy.deepcopy(base)
    qzo.offload(model)
    assert offloads.same(offloads.run(model, **way), offloads.run(copy.deepcopy(base), **way))


# ---------------------------------------------------------------------------------------------- the bus


@pytest.mark.parametrize(
    ("directions", "paired", "parts"), [(1, True, 1), (4, True, 1), (4, False, 1), (1, True, 5), (2, False, 2)]
)
def test_a_step_sends_codes_and_zeros_once_and_nothing_back(base, directions, paired, parts):
    model = copy.deepcopy(base)
    raw, offloaded = offloads.streamed_bytes(model), qzo.offload(model)
    assert isinstance(offloaded.store, HostStore)
    before = offloaded.store.memory.clone()
    sent = []
    for _ in range(3):
        at = offloaded.slots.copied_bytes
        offloads.run(model, 1, directions, paired, parts)
        sent.append(offloaded.slots.copied_bytes - at)
    assert sent[0] < 1.5 * raw  # and the first blocks of the next step
    for of_step in sent[1:]:
        assert raw <= of_step <= 1.02 * raw
    assert torch.equal(offloaded.store.memory, before)


def test_nothing_is_planned_again_and_no_tensor_moves(base):
    model = copy.deepcopy(base)
    qzo.offload(model)
    offloads.run(model, 1)
    found = layers(model)
    before = {name: (layer.codes.data_ptr(), id(layer.kernel_weight())) for name, layer in found.items()}
    offloads.run(model, 2)
    assert {name: (layer.codes.data_ptr(), id(layer.kernel_weight())) for name, layer in found.items()} == before


# ---------------------------------------------------------------------------------------------- what else is asked


def test_the_model_is_read_and_saved_as_if_it_were_not_offloaded(base):
    model = copy.deepcopy(base)
    offloaded = qzo.offload(model)
    offloads.run(model, 1)
    offloads.run(resident := copy.deepcopy(base), 1)
    small_layers.assert_same(model, small_layers.bits(resident))
    state = resident.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(RuntimeError, match=r"blocks\.0\.up: the codes are offloaded.*restore"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="the codes are offloaded"):
        model.to("meta")
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            copied(model)
    x = torch.randn(2, 64)
    with qzo.generating(model):
        torch.testing.assert_close(model(x), resident(x))
    offloaded.restore()
    small_layers.assert_same(model, small_layers.bits(resident))
    sent = offloaded.slots.copied_bytes
    assert offloads.same(offloads.run(model), offloads.run(resident))
    assert offloaded.slots.copied_bytes == sent


def test_the_triton_kernels_read_planes_from_slots():
    x = torch.randn(1, 64)
    with qzo.backend("triton"):
        model, resident = offloads.tower(3), offloads.tower(3)
        qzo.offload(model, slots=2)
        assert model.blocks[0].up.codes.dtype == torch.int16
        assert torch.equal(model(x), resident(x))


def test_a_call_that_fails_ends_the_others_and_the_next_step_is_whole(base, wanted):
    model = copy.deepcopy(base)
    qzo.offload(model)
    x = torch.randn(4, 64)

    def fails():
        model.blocks[0](x)
        raise OSError("on the way")

    with pytest.raises(OSError, match="on the way"):
        qzo.together(model, [lambda: model(x), fails, lambda: model(x)])
    assert all(layer.evaluations is None for layer in layers(model).values())
    assert offloads.same(offloads.run(model), wanted)


def test_a_list_may_be_named(base):
    model = copy.deepcopy(base)
    pairs = nn.ModuleList([model.blocks, nn.ModuleList([model.head])])
    outer = nn.Module()
    outer.lists, outer.other = pairs, nn.Linear(2, 2)
    assert len(qzo.offload(outer, blocks=[model.blocks]).blocks) == offloads.COUNT
    assert model.head.stored is None


def test_what_cannot_be_offloaded_is_refused(base, tmp_path):
    model = copy.deepcopy(base)
    for given, told in (({"to": "gpu"}, "'cpu', 'disk' or 'auto'"), ({"slots": 4}, "2 or 3"), ({"slots": 1}, "2 or 3")):
        with pytest.raises(ValueError, match=told):
            qzo.offload(model, **given)
    qzo.offload(model)
    with pytest.raises(ValueError, match="offloaded already"):
        qzo.offload(model)
    with pytest.raises(ValueError, match="on the meta device"):
        qzo.offload(offloads.tower().to("meta"))


def test_too_little_memory_names_what_is_needed_and_there_or_takes_the_disk(base, monkeypatch, tmp_path):
    monkeypatch.setattr("qzo.nn.streaming.stores.free_bytes", lambda device: 5)
    model = copy.deepcopy(base)
    most = max(block.nbytes for block in streaming.blocks_of(model))
    with pytest.raises(ValueError, match=f"needs {most:,} bytes.*5 are available.*disk"):
        qzo.offload(model)  # the layers' own memory is freed as it goes
    assert offloads.same(offloads.run(model, 1), offloads.run(copy.deepcopy(base), 1)), "nothing has changed"
    store = qzo.offload(model, "auto", folder=tmp_path).store
    assert isinstance(store, FileStore)
    assert store.path.parent == tmp_path


def test_a_model_that_could_not_be_offloaded_is_as_it_was(base, wanted, monkeypatch):
    def refused(store, slots):
        raise ValueError("not registered")

    offloads.through(monkeypatch, refused)
    model = copy.deepcopy(base)
    with pytest.raises(ValueError, match="not registered"):
        qzo.offload(model)
    assert offloads.same(offloads.run(model), wanted)


def test_graphs_are_off_with_a_reason(base):
    model = copy.deepcopy(base)
    qzo.offload(model)
    optimizer = qzo.QZO(model, lr=0.1, cuda_graph=True)
    with pytest.warns(UserWarning, match="the model is offloaded.*run without a graph"):
        optimizer.step(lambda: model(torch.randn(2, 64)).mean(1))
