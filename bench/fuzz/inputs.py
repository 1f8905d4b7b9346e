"""What a run is given or has left, with faults in it, and what reads it: journals, results, data, pictures, caches."""

import functools
import io
import json
import struct
from collections.abc import Callable

import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from safetensors.torch import save
from torch import nn

from ...diffusion import cache, images
from ...diffusion.pipeline import open_pipeline
from ...diffusion.schedulers import shift_of
from ...nn.choice import quantize_
from ...nn.layers import arena_of
from ...optim import journal, pieces
from ...optim.replay import journal_header, replay
from ...system.as_yaml import read_mapping
from ...training import folder as run_folder
from ...training.chats import conversation
from ...training.records import read_data
from ...training.settings import Settings
from . import mutations

# ------------------------------------------------------------------------------------------------ journals


@functools.cache
def _base():
    linear = nn.Linear(64, 32, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.linspace(-1, 1, 2048).view(32, 64))
    return quantize_(nn.Sequential(linear), group_size=32)


@functools.cache
def _journal():
    """(header, records) of a run of three steps."""
    law = {"noise": "ih4", "relative": True, "sharing": "group", "eps": 0.01, "clip": 5.0, "directions": 2}
    header = journal_header(_base(), law | {"seed": 7, "floor": 2.0**-24}, {"batch_size": 4, "data": "sha256:0"})
    records = [journal.Record(i // 2, i % 2, 7 * i - 9, 1e-4, 1.0, 0.5, i == 2) for i in range(6)]
    return header, records


def journals(random):
    """A journal: a fault in its bytes, its header or a record, the checksums of the last two made right."""
    header, records = _journal()
    kind = random.choice(["bytes", "header", "header", "record"])
    body = [record.pack() for record in records]
    if kind == "record":
        at = random.randrange(len(body))
        packed = mutations.data(body[at][:-4], random)[: journal.RECORD.size].ljust(journal.RECORD.size, b"\0")
        body[at] = mutations.checked(packed)
    text = mutations.text(header, random) if kind == "header" else json.dumps(header, sort_keys=True).encode()
    start = journal.PREAMBLE.pack(journal.MAGIC, journal.VERSION, len(text))
    whole = mutations.checked(start) + mutations.checked(text) + b"".join(body)
    return {"x.qzo": mutations.data(whole, random, 400) if kind == "bytes" else whole}


def read_journal(folder):
    path, base = folder / "x.qzo", _base()
    found = pieces.contents(path)
    pieces.header_differences(found, found)
    arena = arena_of(base)
    before = arena.data.clone()
    try:
        pieces.cut(path, folder / "cut", None, found.first + len(found.steps) // 2)
        pieces.concat([path], folder / "joined")
        replay(base, path)
    finally:
        arena.data.copy_(before)


# ------------------------------------------------------------------------------------------------ what a run has left


def results(random):
    """run.json and metrics.jsonl."""
    told = {"settings": {"max_steps": 2, "seed": 0}, "steps": 2, "model_step": 2, "label_bias": [[5, 0.25], [7, -1.0]]}
    lines = [{"step": i, "loss": 1.0, "valid": {"loss": 0.5, "accuracy": None}} for i in range(3)]
    spoiled = random.randrange(len(lines))
    text = b"".join(
        (mutations.text(line, random) if i == spoiled else _line(line)) + b"\n" for i, line in enumerate(lines)
    )
    return {"run.json": mutations.text(told, random), "metrics.jsonl": text}


def _line(record):
    return json.dumps(record).encode()


def read_results(folder):
    run_folder.Metrics(folder / "metrics.jsonl", 3)
    run_folder.fitted_biases(folder / "run.json")


YAML = """max_steps: 20
learning-rate: 1e-2
resume: true
data: [a, &x {b: 2001-01-01}, *x]
noise: !!str ih4
seed: !!int "5"
"""
YAML_TEXTS = [
    "!!int ''",
    "!!float ''",
    "!!bool x",
    "!!timestamp x",
    "!!binary x",
    "!!python/object:os.system [x]",
    "*x",
]
YAML_TEXTS += ["&x [*x]", "? [a]\n: b", "1e999", "0x", "2001-99-99", "{" * 2000, "- " * 2000, "9" * 5000, "<<: 1", "\t"]


def settings(random):
    """A YAML file of options, and JSON with Settings."""
    lines = YAML.splitlines()
    for _i in range(random.choice([1, 2])):
        at = random.randrange(len(lines))
        key = lines[at].split(":")[0]
        lines[at] = random.choice([f"{key}: {random.choice(YAML_TEXTS)}", random.choice(YAML_TEXTS)])
    text = "\n".join(lines).encode()
    fields = {"max_steps": 20, "learning_rate": 0.01, "eps": 0.01, "noise": "ih4", "relative": True, "seed": 5}
    spoiled = mutations.data(text, random) if random.random() < 0.4 else text
    return {"x.yaml": spoiled, "x.json": mutations.text(fields, random)}


def read_settings(folder):
    try:
        fields = json.loads((folder / "x.json").read_bytes())
    except (ValueError, RecursionError):
        fields = None
    if isinstance(fields, dict) and fields.keys() <= Settings.__dataclass_fields__.keys():
        Settings(**fields)
    read_mapping(folder / "x.yaml")


# ------------------------------------------------------------------------------------------------ data

RECORDS = [
    {"prompt": "a", "completion": "b"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]},
    {"text": "a"},
    {"prompt": "a", "options": ["b", "c"], "label": 1},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": '{"name": "f"}'}]},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]},
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    },
]


def records(random):
    """A file of JSON lines, a JSON array or a CSV."""
    kind = random.choice(["jsonl", "jsonl", "json", "csv"])
    if kind == "csv":
        text = b'prompt;options;label\n"a";"[""b"", ""c""]";1\n"x\ny";"[""b"", ""c""]";b\n'
        return {"x.csv": mutations.data(text, random)}
    record = random.choice(RECORDS)
    if kind == "json":
        return {"x.json": mutations.text([record, random.choice(RECORDS)], random)}
    lines = [mutations.text(record, random), _line(record)]
    random.shuffle(lines)
    return {"x.jsonl": b"\n".join(lines)}


def read_records(folder):
    [path] = folder.iterdir()
    _use(read_data(path))


def _use(found):
    for lines in found.values():
        for line in lines:
            if {"messages", "conversations", "instruction"} & line.keys():
                conversation(line)


@functools.cache
def _table():
    columns = {
        "messages": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 3,
        "text": ["a", "b", None],
        "when": pyarrow.array([0, 10**15, None], pyarrow.timestamp("us")),
    }
    return pyarrow.table(columns)


@functools.cache
def _columnar(kind):
    stream = io.BytesIO()
    if kind == "parquet":
        pyarrow.parquet.write_table(_table(), stream)
    else:
        make = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
        with make(stream, _table().schema) as writer:
            writer.write_table(_table())
    return stream.getvalue()


def tables(random):
    """A Parquet file, an Arrow file, or a dataset as save_to_disk writes it."""
    kind = random.choice(["parquet", "file", "dataset", "dataset"])
    whole = _columnar(kind)
    if kind != "dataset":
        name = "x.parquet" if kind == "parquet" else "x.arrow"
        return {name: mutations.data(whole, random)}
    state = {"_data_files": [{"filename": "data.arrow"}], "_split": "train"}
    if random.random() < 0.3:
        return {"state.json": mutations.text(state, random), "data.arrow": whole}
    return {"state.json": _line(state), "data.arrow": mutations.data(whole, random)}


def read_tables(folder):
    files = list(folder.iterdir())
    _use(read_data(files[0] if len(files) == 1 else folder))


# ------------------------------------------------------------------------------------------------ pictures


@functools.cache
def _picture(form):
    stream = io.BytesIO()
    picture = Image.new("RGB", (24, 16), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(stream, form, **({"exif": exif} if form != "BMP" else {}))
    return stream.getvalue()


def pictures(random):
    """A folder of one picture and its caption; its size now and then absurd."""
    form = random.choice(["PNG", "JPEG", "WEBP", "BMP"])
    name, data = f"p.{form.lower()}", bytearray(_picture(form))
    if form == "PNG" and random.random() < 0.3:
        data[16:24] = struct.pack(">II", *(random.choice([1, 9000, 20000, 10**5, 2**31 - 1]) for _ in range(2)))
        data[29:33] = mutations.checked(bytes(data[12:29]))[-4:][::-1]
    elif random.random() < 0.8:
        data = bytearray(mutations.data(bytes(data), random, 120))
    if random.random() < 0.5:
        return {name: bytes(data), "p.txt": mutations.data(b"a cat", random)}
    told = {"file_name": name, "text": "a cat"}
    return {name: bytes(data), "metadata.jsonl": mutations.text(told, random) + b"\n" + _line(told)}


def read_pictures(folder):
    for _, place in images.splits_of(folder).items():
        for picture in images.read_pictures(place):
            images.pixels(picture, 8)


# ------------------------------------------------------------------------------------------------ pipelines

PIPELINE = {
    "model_index.json": {
        "_class_name": "StableDiffusion3Pipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder_3": [None, None],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    },
    "transformer/config.json": {
        "_class_name": "SD3Transformer2DModel",
        "patch_size": 2,
        "pos_embed_max_size": 12,
        "in_channels": 4,
        "sample_size": 8,
    },
    "scheduler/scheduler_config.json": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "use_dynamic_shifting": True,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    },
    "vae/config.json": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [8, 8],
        "shift_factor": 0.06,
        "scaling_factor": 1.5,
    },
}


def pipelines(random):
    """The four configs of a diffusers pipeline; a fault in one."""
    spoiled = random.choice(list(PIPELINE))
    return {name: mutations.text(said, random) if name == spoiled else _line(said) for name, said in PIPELINE.items()}


def read_pipeline(folder):
    pipeline = open_pipeline(folder)
    shift_of(pipeline.scheduler, pipeline.tokens(pipeline.resolution()))
    assert all((folder / part).resolve().is_relative_to(folder.resolve()) for part in pipeline.parts)


def caches(random):
    """A cache of one picture: its header, its latent and its encoded prompt, a fault in one of them."""
    latent = {"latent": torch.ones(4, 2, 2)}
    prompt = {"encoder_hidden_states": torch.ones(3, 8), "pooled_projections": torch.ones(8)}
    header = {"version": 1, "vae": "0", "texts": "1", "resolution": 4, "prompt_tokens": 3, "files": {"vae": []}}
    found = {"cache.json": _line(header), "latents/p.safetensors": save(latent), "prompts/q.safetensors": save(prompt)}
    spoiled = random.choice(list(found))
    if spoiled == "cache.json":
        found[spoiled] = mutations.text(header, random)
    elif random.random() < 0.5:
        found[spoiled] = mutations.data(found[spoiled], random, 150)
    else:
        found[spoiled] = save(mutations.tensors(latent if "latent" in spoiled else prompt, random))
    return found


def read_cache(folder):
    header = cache.read_header(folder)
    held = cache.Latents(folder, [cache.Example("p", "q")], header)
    held.latent(0)
    held.prompt(0)


# name -> (what makes the files of a case with a random.Random, what reads them in their folder)
PARSERS: dict[str, tuple[Callable, Callable]] = {
    "journal": (journals, read_journal),
    "run.json": (results, read_results),
    "settings": (settings, read_settings),
    "records": (records, read_records),
    "tables": (tables, read_tables),
    "pictures": (pictures, read_pictures),
    "pipeline": (pipelines, read_pipeline),
    "latent cache": (caches, read_cache),
}
