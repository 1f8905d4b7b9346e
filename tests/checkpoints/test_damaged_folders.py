"""Float folders whose config, tensors or tokenizer are missing, damaged or of another model."""

import json
import shutil
from importlib import metadata
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qzo
from qzo.cli.main import main
from qzo.nn.layers import layers
from tests.support import tiny
from tests.support.gptq_checkpoints import load as load_gptq
from tests.support.gptq_checkpoints import write_gptq

ANGLES = "model.layers.0.self_attn.rotary_emb.inv_freq"
NO_NAME = (  # of an architecture that is a number: refused by huggingface_hub's first version, or later by the loading
    "Invalid item at index 0 in list 'architectures'"
    if metadata.version("huggingface_hub").startswith("1.")
    else "its config makes no model: TypeError"
)


@pytest.fixture
def base(tmp_path):
    return tiny.save_checkpoint(tmp_path / "base")


def said(folder, **changes):
    """Change config.json."""
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(content))


def tensors(folder, change):
    """Change the dictionary of the folder's tensors."""
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors", {"format": "pt"})


def load(folder):
    return qzo.from_pretrained(folder, device="cpu", group_size=32)


def refused_everywhere(folder, tmp_path, capsys, message, inspected=False):
    """One line of `message`, exit status 2 and nothing written, whatever the command."""
    commands = [
        ["quantize", str(folder), "--output-dir", str(tmp_path / "out")],
        ["export", str(folder), "--to", "gptq", "--output-dir", str(tmp_path / "out"), "--group-size", "32"],
    ]
    for command in [*commands, *([["inspect", str(folder), "--device", "cpu"]] if inspected else [])]:
        capsys.readouterr()
        assert main(command) == 2, command
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "9 tensors are missing, the first is model.layers.2.input_layernorm.weight"),
        (
            {"vocab_size": 64},
            "tensor lm_head.weight has shape [30, 64], which LlamaForCausalLM of its config.json needs as [64, 64]",
        ),
        ({"num_key_value_heads": 2}, "tensor model.layers.0.self_attn.k_proj.weight has shape [32, 64], which"),
    ],
)
def test_a_config_of_another_model(base, tmp_path, capsys, changes, message):
    """transformers would fill what is missing with random numbers."""
    said(base, **changes)
    refused_everywhere(base, tmp_path, capsys, message)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_missing_tensor(base, tmp_path, capsys, name):
    tensors(base, lambda found: found.pop(name))
    refused_everywhere(base, tmp_path, capsys, f"1 tensors are missing, the first is {name}")


def test_a_missing_head_that_is_tied_is_the_embedding(base, tmp_path):
    said(base, tie_word_embeddings=True)
    tensors(base, lambda found: found.pop("lm_head.weight"))
    model = load(base)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert main(["quantize", str(base), "--output-dir", str(tmp_path / "q")]) == 0
    assert torch.equal(load(tmp_path / "q").lm_head.weight, model.lm_head.weight)


def test_tensors_that_no_part_takes_are_told(base, tmp_path, capsys):
    said(base, num_hidden_layers=1)
    tensors(base, lambda found: found.update({ANGLES: torch.ones(16)}))
    line = (
        "LlamaForCausalLM of its config.json has no place for 9 tensors of the files (the first: "
        "model.layers.1.input_layernorm.weight); they are left out"
    )
    with pytest.warns(UserWarning, match="has no place for 9 tensors"):
        assert len(layers(load(base))) == 7
    assert main(["quantize", str(base), "--output-dir", str(tmp_path / "q")]) == 0
    assert line in capsys.readouterr().err
    assert len(layers(load(tmp_path / "q"))) == 7


def test_computed_tensors_of_older_files_need_no_place(tmp_path):
    """The angles of rotary embeddings, in a quantized folder: AutoGPTQ's first ones have them."""
    plain = load_gptq(write_gptq(tmp_path / "plain"))
    older = load_gptq(write_gptq(tmp_path / "older", change=lambda found: found.update({ANGLES: torch.ones(8)})))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(older(ids).logits, plain(ids).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": "30"}, "its config.json cannot be read: "),
        ({"num_hidden_layers": 2.0}, "expected int, got float"),
        ({"num_attention_heads": 0}, "its config.json cannot be read: ZeroDivisionError"),
        ({"num_attention_heads": 3}, "The hidden size (64) is not a multiple of the number of attention heads"),
        (
            {"dtype": "float7"},
            "its config.json cannot be read: AttributeError: module 'torch' has no attribute 'float7'",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, "Missing required keys in `rope_parameters`"),
        ({"rope_parameters": {"rope_type": "x", "rope_theta": 1e4}}, "its config makes no model: KeyError: 'x'"),
        ({"hidden_act": "x"}, "its config makes no model: KeyError: 'x'"),
        ({"vocab_size": -3}, "its config makes no model: RuntimeError"),
        ({"pad_token_id": 999}, "its config makes no model: AssertionError: Padding_idx must be within num_embeddings"),
        ({"architectures": [5]}, NO_NAME),
        ({"model_type": "x"}, "model type `x` but"),
    ],
)
def test_a_config_that_makes_no_model(base, tmp_path, capsys, changes, message):
    said(base, **changes)
    refused_everywhere(base, tmp_path, capsys, message, inspected=True)
    with pytest.raises(ValueError, match=r"base: its config") as caught:
        load(base)
    assert caught.value.__cause__ is not None  # Python shows where
    for source in (["--config", str(base / "config.json")], ["--model", str(base)]):
        if changes != {"architectures": [5]} or "--model" in source:  # random weights have no architecture
            assert main(["memory", *source, "--seq-len", "8", "--device", "cpu"]) == 2
            assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("qzo memory: ")]) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "its tokenizer cannot be read: "),
        ("generation_config.json", "[1", "its generation_config.json cannot be read: "),
    ],
)
@pytest.mark.parametrize("quantized", [False, True])
def test_a_damaged_companion(base, tmp_path, capsys, name, content, message, quantized):
    folder = tmp_path / "in"
    if quantized:
        qzo.save_pretrained(load(base), folder)
    else:
        shutil.copytree(base, folder)
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    data = tiny.write_jsonl(tmp_path / "t.jsonl", tiny.RECORDS)
    assert (
        main(
            [
                "train",
                "--model",
                str(folder),
                "--data",
                str(data),
                "--output-dir",
                str(tmp_path / "o"),
                "--max-steps",
                "1",
                "--batch-size",
                "2",
                "--group-size",
                "32",
                "--device",
                "cpu",
            ]
        )
        == 2
    )
    assert f"{folder}: {message}" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "o").exists()


def test_a_tokenizer_of_another_model(base, tmp_path, capsys):
    """On a GPU a token without a row would end the process."""
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["warm"] = 77
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    kinds: list[list[dict[str, Any]]] = [
        tiny.RECORDS,
        [{"text": "red warm up"}],
        [{"prompt": "red", "completion": " warm"}],
    ]
    for index, records in enumerate(kinds):
        data = tiny.write_jsonl(tmp_path / f"{index}.jsonl", records * 2)
        assert (
            main(
                [
                    "train",
                    "--model",
                    str(base),
                    "--data",
                    str(data),
                    "--output-dir",
                    str(tmp_path / "o"),
                    "--max-steps",
                    "1",
                    "--batch-size",
                    "2",
                    "--group-size",
                    "32",
                    "--device",
                    "cpu",
                ]
            )
            == 2
        )
        assert (
            "has the token 77, LlamaForCausalLM knows 30: the tokenizer is another model's"
        ) in capsys.readouterr().err.splitlines()[-1]
    assert main(["inspect", str(base), "--device", "cpu", "--signal", "--data", str(data)]) == 2
    assert "knows 30: the tokenizer is another model's" in capsys.readouterr().err.splitlines()[-1]
