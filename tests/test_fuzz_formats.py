"""Damaged files of every format: each is read or refused in one line, within the memory that its size explains.

The cases come from seeded generators and from hypothesis without a database, so that every run has the same ones.
An address-space limit while a file is read turns any absurd allocation, torch's too, into a MemoryError, which no
test expects.
"""
import contextlib
import copy
import json
import os
import random
import resource
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

import qzo
from qzo.formats import folder as folders
from qzo.formats import gguf, hqq, of_method, safetensors_file
from qzo.formats.gguf_file import GGUFFile
from qzo.formats.torch_file import TorchFile
from tests.checkpoints import TYPES, write_compressed, write_gguf

HEADROOM = 256 << 20         # bytes of address space beyond what the process has: far below any absurd size
FIXTURES = Path(__file__).parent / "fixtures"
EXAMPLES = settings(max_examples=1500, deadline=None, derandomize=True, database=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
NASTY = [0, 1, -1, 2, 3, 7, 8, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**60, 2**63 - 1, 2**63, 2**64 - 1]


@contextlib.contextmanager
def little_memory():
    """A limit of HEADROOM bytes on what the process may take from here on."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(read):
    """What one case ends in: None when it was read, else the message, which is a short line."""
    try:
        read()
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        assert message
        assert "\n" not in message, message
        assert len(message) < 1500, message
        return message
    return None


def mutated(data, rng, head):
    """`data` with one to four faults, most of them in its first `head` bytes, where the sizes stand."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(min(head, len(data)) if rng.random() < 0.9 else len(data))
        kind = rng.randrange(7)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind == 2:
            data[at:at + 8] = struct.pack("<Q", rng.choice(NASTY) % 2**64)
        elif kind == 3:
            data[at:at + 4] = struct.pack("<I", rng.choice(NASTY) % 2**32)
        elif kind == 4:
            del data[at:at + rng.choice([1, 8, 100])]
        elif kind == 5:
            data[at:at] = rng.randbytes(rng.choice([1, 8, 100]))
        else:
            del data[at:at + (1 if rng.random() < 0.7 else len(data))]
        if not data:
            return bytes(data)
    return bytes(data)


def renew(path, data):
    """Write a file anew: on some file systems to overwrite one is to wait for the disk."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def run(path, cases, read):
    """How many of the cases were read, and how many refused; `path` is the only file that stands there after."""
    with little_memory():
        messages = [outcome(lambda data=data: (renew(path, data), read(path))) for data in cases]
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return messages.count(None), len(messages) - messages.count(None)


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


SAFETENSORS = save({"a": torch.arange(6, dtype=torch.float16).view(2, 3), "b": torch.ones(4, dtype=torch.int32),
                    "c": torch.zeros(0, 5)}, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(path, TYPES.Q4_1, layers=1)
    return path.read_bytes()


@pytest.fixture(scope="module")
def small_torch(tmp_path_factory):
    path = tmp_path_factory.mktemp("torch") / "small.pt"
    torch.save({"a": torch.arange(6, dtype=torch.float16).view(2, 3), "b": torch.ones(4, dtype=torch.uint8),
                "meta": {"shape": torch.Size([2, 3]), "dtype": torch.float16, "bits": 4}}, path)
    return path.read_bytes()


def test_safetensors_bytes(tmp_path):
    rng, header = random.Random(0), SAFETENSORS.index(b"}", 8) + 200
    read, refused = run(tmp_path / "x", (mutated(SAFETENSORS, rng, header) for _ in range(3000)), read_safetensors)
    assert read > 100
    assert refused > 1000


def test_gguf_bytes(tmp_path, small_gguf):
    rng = random.Random(1)
    small = small_gguf[:small_gguf.index(b"output_norm") + 2000]     # the tensors' bytes end too early then: so pad
    padded = small + bytes(len(small_gguf) - len(small))
    read, refused = run(tmp_path / "x", (mutated(padded, rng, 1600) for _ in range(3000)), read_gguf)
    assert read > 100
    assert refused > 1000


def test_torch_bytes(tmp_path, small_torch):
    rng = random.Random(2)
    read_torch_once = tmp_path / "warm"
    read_torch_once.write_bytes(small_torch)
    read_torch(read_torch_once)                     # imports take more memory than a file may
    read_torch_once.unlink()
    read, refused = run(tmp_path / "x", (mutated(small_torch, rng, len(small_torch)) for _ in range(1500)), read_torch)
    assert read > 100
    assert refused > 500


# ------------------------------------------------------------------------------------- a header that is whole JSON

whole = st.sampled_from(NASTY)
anything = st.one_of(st.none(), st.booleans(), whole, st.floats(), st.text(max_size=5), st.lists(whole, max_size=3),
                     st.dictionaries(st.text(max_size=3), whole, max_size=2))
dtypes = st.one_of(st.sampled_from([*safetensors_file.DTYPES, "F8_E4M3", "f16", ""]), anything)
shapes = st.one_of(st.lists(whole, max_size=5), st.just([1] * 100), anything)
offsets = st.one_of(st.lists(st.sampled_from([*range(9), *NASTY]), min_size=2, max_size=2), anything)
entries = st.one_of(anything, st.fixed_dictionaries({}, optional={"dtype": dtypes, "shape": shapes,
                                                                  "data_offsets": offsets, "more": anything}))
names = st.one_of(st.sampled_from(["a", "b", "__metadata__", "", "..", "a\nb", "\x00"]), st.text(max_size=4))


@EXAMPLES
@given(st.one_of(anything, st.dictionaries(names, entries, max_size=4)), st.integers(0, 40), st.integers(-9, 9))
def test_safetensors_headers(tmp_path, header, body, longer):
    text = json.dumps(header).encode()
    renew(tmp_path / "x", struct.pack("<Q", max(0, len(text) + longer)) + text + bytes(body))
    with little_memory():
        outcome(lambda: read_safetensors(tmp_path / "x"))


@pytest.mark.parametrize(("text", "message"), [
    (b"[" * 100_000, "its header cannot be read"),
    (b'{"a":' * 100_000, "its header cannot be read"),
    (b'{"a": ' + b"9" * 5000 + b"}", "its header cannot be read"),
    (b'{"a": {}, "a": {}}', "its header cannot be read"),
    (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', r"has 4 bytes, which are not F32 \[2\]"),
    (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "the header's entry of tensor 'a' is damaged"),
    (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', "the header's entry of tensor 'a' is damaged"),
    (b'{"a\\nb": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', r"entry of tensor 'a\\nb' is damaged"),
    (b'{"a": {"dtype": "F32", "shape": [0, 4611686018427387904, 4611686018427387904], "data_offsets": [0, 0]}}',
     "the header's entry of tensor 'a' is damaged"),
    (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
     b'"b": {"dtype": "U8", "shape": [2], "data_offsets": [3, 5]}}', "tensors a and b overlap"),
])
def test_safetensors_refused(tmp_path, text, message):
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ValueError, match=message):
        read_safetensors(tmp_path / "x")


def test_a_header_longer_than_the_libraries_limit_is_not_read(tmp_path):
    with open(tmp_path / "x", "wb") as file:         # a sparse file: no disk is taken
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(1 << 30)
    with little_memory(), pytest.raises(ValueError, match="its header cannot be read"):
        safetensors_file.places(tmp_path / "x")


def gguf_header(tensors=0, keys=0, body=b""):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + body


def gguf_string(text):
    return struct.pack("<Q", len(text)) + text


def gguf_tensor(name, dims, kind=0, offset=0):
    return gguf_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


@pytest.mark.parametrize(("data", "message"), [
    (gguf_header(2**60), "is truncated"),
    (gguf_header(0, 2**60), "is truncated"),
    (gguf_header(0, 1, struct.pack("<Q", 2**60)), "is truncated"),
    (gguf_header(0, 1, gguf_string(b"a") + struct.pack("<IIQ", 9, 0, 2**60)), "is truncated"),
    (gguf_header(0, 1, gguf_string(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000),
     "metadata of unknown type 9"),
    (gguf_header(0, 2, (gguf_string(b"a") + struct.pack("<II", 4, 1)) * 2), "metadata 'a' is there twice"),
    (gguf_header(0, 1, gguf_string(b"general.alignment") + struct.pack("<II", 4, 0)), "general.alignment is 0"),
    (gguf_header(1, 0, gguf_tensor(b"a", [1] * 5)), "has 5 dimensions"),
    (gguf_header(1, 0, gguf_tensor(b"a", [0])), "none of them 0"),
    (gguf_header(1, 0, gguf_tensor(b"a", [2**62, 2**62])), "is truncated"),
    (gguf_header(2, 0, gguf_tensor(b"a", [2]) * 2), "tensor 'a' is there twice"),
    (gguf_header(2, 0, gguf_tensor(b"a", [2]) + gguf_tensor(b"b", [2], offset=4)), "tensors a and b overlap"),
])
def test_gguf_refused(tmp_path, data, message):
    (tmp_path / "x").write_bytes(data + bytes(64 if "truncated" not in message else 0))
    with little_memory(), pytest.raises(ValueError, match=message):
        read_gguf(tmp_path / "x")


# ------------------------------------------------------------------------------------- whole formats

LAYER = "model.layers.0.self_attn.v_proj"


def small_folder(source):
    """(quantization_config, tensors) of one layer and one norm of a real checkpoint."""
    tensors = {name: tensor for name, tensor in load_file(source / "model.safetensors").items()
               if name.startswith(LAYER) or name == "model.norm.weight"}
    return json.loads((source / "config.json").read_text())["quantization_config"], tensors


def spoiled_tensor(tensor, rng):
    """A tensor of another dtype, shape or content."""
    kind = rng.randrange(7)
    if kind == 0:
        return tensor.to(rng.choice([torch.float16, torch.float32, torch.int32, torch.int64, torch.uint8, torch.bool]))
    if kind == 1:
        return tensor.flatten()[:rng.choice([0, 1, 2, 7])]
    if kind == 2:
        return tensor[: len(tensor) // 2].clone() if tensor.dim() else tensor
    if kind == 3:
        return tensor.unsqueeze(rng.randrange(tensor.dim() + 1))
    if kind == 4:
        return tensor.T.contiguous() if tensor.dim() == 2 else torch.stack([tensor, tensor])
    spoiled = tensor.clone().flatten()
    at = rng.randrange(len(spoiled)) if len(spoiled) else 0
    if spoiled.dtype == torch.bool:
        spoiled[at:at + 1] ^= True
    elif spoiled.is_floating_point():
        spoiled[at:at + 1] = rng.choice([float("nan"), float("inf"), -float("inf"), 0.0, -1.0])
    else:
        limits = torch.iinfo(spoiled.dtype)
        spoiled[at:at + 1] = rng.choice([limits.min, limits.max, 0, -1 if limits.min else 1, 10**4 % (limits.max + 1)])
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


QUANTIZED = sorted(path.parent.name for path in FIXTURES.glob("*/config.json")
                   if "quantization_config" in json.loads(path.read_text()))


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


# ------------------------------------------------------------------------------------- folders of shards

INDEX = "model.safetensors.index.json"


@pytest.fixture
def shards(tmp_path):
    """A folder of two shards, beside a file that is none of its own."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, file in (("a", "1.safetensors"), ("b", "2.safetensors")):
        save_file({name: torch.ones(2)}, folder / file)
    save_file({"a": torch.ones(2)}, tmp_path / "outside.safetensors")

    def write(weight_map):
        content = weight_map if isinstance(weight_map, bytes) else json.dumps({"weight_map": weight_map}).encode()
        renew(folder / INDEX, content)
        return folder

    return write


@pytest.mark.parametrize(("weight_map", "message"), [
    ({"a": "../outside.safetensors"}, "names '../outside.safetensors', which is no file of this folder"),
    ({"a": "/etc/passwd"}, "names '/etc/passwd', which is no file of this folder"),
    ({"a": "x/../1.safetensors"}, "which is no file of this folder"),
    ({"a": ".."}, "is missing or no file"),
    ({"a": "pipe"}, "is missing or no file"),
    ({"a": "loop"}, "is missing or no file"),
    ({"a": "3.safetensors"}, "3.safetensors is missing or no file, though model.safetensors.index.json names it"),
    ({"a": "1.safetensors\n"}, "which is no file of this folder"),
    ({"a": "1.safetensors", "c": "2.safetensors"}, "2.safetensors holds no tensor 'c', though"),
    ({"a": "2.safetensors", "b": "1.safetensors"}, "holds no tensor 'a', though"),
    ({"a": "1.safetensors", "b": "twin.safetensors"}, "tensor a is in 1.safetensors and in twin.safetensors"),
    ({"a": 1}, "it has no weight_map"), ([], "it has no weight_map"), ({}, "it has no weight_map"),
    (b"[", "is not JSON: Expecting value"), (b"[]", "holds a JSON list, not an object"), (b"\xff", "is not JSON"),
    (b"[" * 100_000, "is not JSON: it is nested too deeply"),
])
def test_shards_refused(shards, weight_map, message):
    folder = shards(weight_map)
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, folder / "twin.safetensors")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        folders.tensor_places(folder)
    assert "\n" not in str(error.value)


def test_a_shard_may_be_a_link(shards, tmp_path):
    """The download cache of the Hub is made of links."""
    folder = shards({"a": "linked.safetensors", "b": "2.safetensors"})
    (folder / "linked.safetensors").symlink_to(tmp_path / "outside.safetensors")
    places = folders.tensor_places(folder)
    assert {name: file.name for name, (file, _) in places.items()} == {"a": "linked.safetensors", "b": "2.safetensors"}


def test_index_bytes(shards):
    rng, weight_map = random.Random(5), {"a": "1.safetensors", "b": "2.safetensors"}
    text = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    messages = [outcome(lambda data=data: folders.tensor_places(shards(data)))
                for data in (mutated(text, rng, len(text)) for _ in range(1000))]
    assert messages.count(None) > 20
    assert len(set(messages)) > 30


@pytest.mark.parametrize(("config", "message"), [
    (b"[]", "holds a JSON list"), (b"3", "holds a JSON int"), (b"{", "is not JSON"), (b"\xff\xfe", "is not JSON"),
    (b"[" * 100_000, "is not JSON: it is nested too deeply"),
    (b'{"quantization_config": []}', "names no quant_method"),
    (b'{"quantization_config": "x"}', "names no quant_method"),
    (b'{"quantization_config": {"quant_method": ["gptq"]}}', "names no quant_method"),
    (b'{"model_type": "llama", "quantization_config": {"quant_method": "compressed-tensors"}}', "has no config_groups"),
])
def test_configs_refused(tmp_path, config, message):
    (tmp_path / "config.json").write_bytes(config)
    (tmp_path / "model.safetensors").write_bytes(SAFETENSORS)
    with pytest.raises(ValueError, match=message) as error:
        qzo.from_pretrained(tmp_path, device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("depth", [10**6, 2**40])
def test_more_layers_than_the_files_can_hold(tmp_path, depth):
    write_compressed(tmp_path, {"": (4, 32, True)}, {"a": {"targets": ["Linear"], "weights": {
        "num_bits": 4, "group_size": 32, "strategy": "group"}}})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": depth, "layer_types": None}))
    with little_memory(), pytest.raises(ValueError, match=f"num_hidden_layers is {depth}, the files have"):
        qzo.from_pretrained(tmp_path, device="cpu")


# ------------------------------------------------------------------------------------- what Python itself takes

@pytest.mark.parametrize(("make", "read"), [
    (lambda path: save_file({"a": torch.zeros(1 << 20)}, path), safetensors_file.places),
    (lambda path: torch.save({"a": torch.zeros(1 << 20)}, path), TorchFile),
])
def test_a_header_takes_no_more_than_its_own_bytes(tmp_path, make, read):
    make(tmp_path / "x")
    read(tmp_path / "x")                             # imports
    tracemalloc.start()
    try:
        read(tmp_path / "x")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 18
