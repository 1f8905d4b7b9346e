"""Damaged files of every format: each is read or refused in one line (fuzzing.py)."""

import copy
import json
import random
import struct
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from qzo.checkpoints.formats import gguf, hqq, of_method, safetensors_file
from qzo.checkpoints.formats.gguf_file import GGUFFile
from qzo.checkpoints.formats.torch_file import TorchFile
from tests.support.checkpoints import TYPES, write_gguf
from tests.support.fuzzing import EXAMPLES, FIXTURES, NASTY, SAFETENSORS, little_memory, mutated, outcome, renew, run

# ------------------------------------------------------------------------------------- containers


def read_safetensors(path):
    for place in safetensors_file.places(path).values():
        safetensors_file.read(path, place)


def read_gguf(path):
    file = GGUFFile(path)
    for info in file.tensors.values():
        file.raw(info)


def read_torch(path):
    file = TorchFile(path)
    if not isinstance(file.content, dict):
        raise ValueError("no dictionary")
    for name, tensor in file.content.items():
        if isinstance(tensor, torch.Tensor):
            file.read(tensor, str(name))


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(path, TYPES.Q4_1, layers=1)
    return path.read_bytes()


@pytest.fixture(scope="module")
def small_torch(tmp_path_factory):
    path = tmp_path_factory.mktemp("torch") / "small.pt"
    torch.save(
        {
            "a": torch.arange(6, dtype=torch.float16).view(2, 3),
            "b": torch.ones(4, dtype=torch.uint8),
            "meta": {"shape": torch.Size([2, 3]), "dtype": torch.float16, "bits": 4},
        },
        path,
    )
    return path.read_bytes()


def test_safetensors_bytes(tmp_path):
    rng, header = random.Random(0), SAFETENSORS.index(b"}", 8) + 200
    read, refused = run(tmp_path / "x", (mutated(SAFETENSORS, rng, header) for _ in range(3000)), read_safetensors)
    assert read > 100
    assert refused > 1000


def test_gguf_bytes(tmp_path, small_gguf):
    rng = random.Random(1)
    small = small_gguf[: small_gguf.index(b"output_norm") + 2000]  # the tensors' bytes end too early then: so pad
    padded = small + bytes(len(small_gguf) - len(small))
    read, refused = run(tmp_path / "x", (mutated(padded, rng, 1600) for _ in range(3000)), read_gguf)
    assert read > 100
    assert refused > 1000


def test_torch_bytes(tmp_path, small_torch):
    rng = random.Random(2)
    read_torch_once = tmp_path / "warm"
    read_torch_once.write_bytes(small_torch)
    read_torch(read_torch_once)  # imports take more memory than a file may
    read_torch_once.unlink()
    read, refused = run(tmp_path / "x", (mutated(small_torch, rng, len(small_torch)) for _ in range(1500)), read_torch)
    assert read > 100
    assert refused > 500


# ------------------------------------------------------------------------------------- a header that is whole JSON

whole = st.sampled_from(NASTY)
anything = st.one_of(
    st.none(),
    st.booleans(),
    whole,
    st.floats(),
    st.text(max_size=5),
    st.lists(whole, max_size=3),
    st.dictionaries(st.text(max_size=3), whole, max_size=2),
)
dtypes = st.one_of(st.sampled_from([*safetensors_file.DTYPES, "F8_E4M3", "f16", ""]), anything)
shapes = st.one_of(st.lists(whole, max_size=5), st.just([1] * 100), anything)
offsets = st.one_of(st.lists(st.sampled_from([*range(9), *NASTY]), min_size=2, max_size=2), anything)
entries = st.one_of(
    anything,
    st.fixed_dictionaries({}, optional={"dtype": dtypes, "shape": shapes, "data_offsets": offsets, "more": anything}),
)
names = st.one_of(st.sampled_from(["a", "b", "__metadata__", "", "..", "a\nb", "\x00"]), st.text(max_size=4))


@EXAMPLES
@given(st.one_of(anything, st.dictionaries(names, entries, max_size=4)), st.integers(0, 40), st.integers(-9, 9))
def test_safetensors_headers(tmp_path, header, body, longer):
    text = json.dumps(header).encode()
    renew(tmp_path / "x", struct.pack("<Q", max(0, len(text) + longer)) + text + bytes(body))
    with little_memory():
        outcome(lambda: read_safetensors(tmp_path / "x"))


# ------------------------------------------------------------------------------------- whole formats

LAYER = "model.layers.0.self_attn.v_proj"


def small_folder(source):
    """(quantization_config, tensors) of one layer and one norm of a real checkpoint."""
    tensors = {
        name: tensor
        for name, tensor in load_file(source / "model.safetensors").items()
        if name.startswith(LAYER) or name == "model.norm.weight"
    }
    return json.loads((source / "config.json").read_text())["quantization_config"], tensors


def spoiled_tensor(tensor, rng):
    """A tensor of another dtype, shape or content."""
    kind = rng.randrange(7)
    if kind == 0:
        return tensor.to(rng.choice([torch.float16, torch.float32, torch.int32, torch.int64, torch.uint8, torch.bool]))
    if kind == 1:
        return tensor.flatten()[: rng.choice([0, 1, 2, 7])]
    if kind == 2:
        return tensor[: len(tensor) // 2].clone() if tensor.dim() else tensor
    if kind == 3:
        return tensor.unsqueeze(rng.randrange(tensor.dim() + 1))
    if kind == 4:
        return tensor.T.contiguous() if tensor.dim() == 2 else torch.stack([tensor, tensor])
    spoiled = tensor.clone().flatten()
    at = rng.randrange(len(spoiled)) if len(spoiled) else 0
    if spoiled.dtype == torch.bool:
        spoiled[at : at + 1] ^= True
    elif spoiled.is_floating_point():
        spoiled[at : at + 1] = rng.choice([float("nan"), float("inf"), -float("inf"), 0.0, -1.0])
    else:
        limits = torch.iinfo(spoiled.dtype)
        spoiled[at : at + 1] = rng.choice(
            [limits.min, limits.max, 0, -1 if limits.min else 1, 10**4 % (limits.max + 1)]
        )
    return spoiled.view(tensor.shape)


def spoiled_tree(tree, rng):
    """A JSON tree with one value replaced or removed."""
    tree = copy.deepcopy(tree)
    here = tree
    while True:
        key = rng.choice(list(here) if isinstance(here, dict) else range(len(here)))
        if isinstance(here[key], dict | list) and here[key] and rng.random() < 0.8:
            here = here[key]
            continue
        if rng.random() < 0.2:
            del here[key]
        else:
            here[key] = rng.choice([None, True, [], {}, [[]], [None], "", "x", "re:(", "Linear", 1e308, *NASTY])
        return tree


def spoil(config, tensors, rng):
    """One to three faults in the config or the tensors."""
    config, tensors = copy.deepcopy(config), dict(tensors)
    for _ in range(rng.choice([1, 1, 2, 3])):
        name = rng.choice(list(tensors) or ["x"])
        kind = rng.randrange(5)
        if kind == 0 and config:
            config = spoiled_tree(config, rng)
        elif kind == 1:
            tensors.pop(name, None)
        elif kind == 2 and name in tensors:
            tensors[name + rng.choice(["_g_idx", "_zero_point", ".x", ""])] = tensors.pop(name)
        elif name in tensors:
            tensors[name] = spoiled_tensor(tensors[name], rng)
    return config, tensors


QUANTIZED = sorted(
    path.parent.name for path in FIXTURES.glob("*/config.json") if "quantization_config" in json.loads(path.read_text())
)


@pytest.mark.parametrize("fixture", QUANTIZED)
def test_folders(tmp_path, fixture):
    rng, (config, tensors) = random.Random(fixture), small_folder(FIXTURES / fixture)
    form = of_method(config["quant_method"], fixture)
    messages = []
    for _ in range(1000):
        quantization, spoiled = spoil(config, tensors, rng)
        renew(tmp_path / "model.safetensors", save(spoiled))
        with little_memory():
            messages.append(outcome(lambda q=quantization: list(form.weights(tmp_path, q, torch.half))))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert messages.count(None) > 50
    assert len(set(messages)) > 40


def small_modules():
    modules = torch.load(FIXTURES / "hqq-own-g64" / "qmodel.pt", weights_only=True)
    return {name: modules[name] for name in (LAYER, "model.norm")}


def test_hqq(tmp_path):
    rng, modules = random.Random(3), small_modules()
    messages = []
    for _ in range(500):
        spoiled = {name: dict(state) for name, state in modules.items()}
        for _ in range(rng.choice([1, 1, 2])):
            state = spoiled[rng.choice(list(spoiled))]
            field = rng.choice(list(state))
            if rng.random() < 0.15:
                del state[field]
            elif isinstance(state[field], torch.Tensor) and rng.random() < 0.7:
                state[field] = spoiled_tensor(state[field].data, rng)
            else:
                state[field] = rng.choice([None, True, 1, "x", [], {}, (), torch.ones(1), torch.Size([3]), *NASTY])
            if not state:
                break
        (tmp_path / "qmodel.pt").unlink(missing_ok=True)
        torch.save(spoiled, tmp_path / "qmodel.pt")
        with little_memory():
            messages.append(outcome(lambda: list(hqq.weights(tmp_path, None, torch.half))))
    assert [path.name for path in tmp_path.iterdir()] == ["qmodel.pt"]
    assert messages.count(None) > 50
    assert len(set(messages)) > 40


def test_gguf_models(tmp_path, small_gguf):
    rng = random.Random(4)
    head = small_gguf.index(b"output_norm") + 1500
    read, refused = run(tmp_path / "x", (mutated(small_gguf, rng, head) for _ in range(500)), read_gguf_model)
    assert read > 20
    assert refused > 200


def read_gguf_model(path):
    file = GGUFFile(path)
    gguf.config(file)
    for _ in gguf.weights(file, torch.half):
        pass


# ------------------------------------------------------------------------------------- what Python itself takes


@pytest.mark.parametrize(
    ("make", "read"),
    [
        (lambda path: save_file({"a": torch.zeros(1 << 20)}, path), safetensors_file.places),
        (lambda path: torch.save({"a": torch.zeros(1 << 20)}, path), TorchFile),
    ],
)
def test_a_header_takes_no_more_than_its_own_bytes(tmp_path, make, read):
    make(tmp_path / "x")
    read(tmp_path / "x")  # imports
    tracemalloc.start()
    try:
        read(tmp_path / "x")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 18
