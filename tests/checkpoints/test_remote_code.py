"""--trust-remote-code: config, model and tokenizer of a folder with code of its own, in every command that loads."""

import json
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, dynamic_module_utils

import qzo
from qzo.cli.main import main
from qzo.nn.layers import layers
from tests.support import tiny

TOKENIZER = """
from transformers import PreTrainedTokenizer


class LettersTokenizer(PreTrainedTokenizer):
    NAMES = ["<unk>", "<s>", "</s>"]
    vocab_size = property(lambda self: 40)

    def __init__(self, **kwargs):
        super().__init__(**({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | kwargs))

    def get_vocab(self):
        return {self._convert_id_to_token(i): i for i in range(40)}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.NAMES.index(token) if token in self.NAMES else 3 + ord(token[0]) % 30

    def _convert_id_to_token(self, index):
        return self.NAMES[index] if index < 3 else f"t{index}"

    def save_vocabulary(self, folder, filename_prefix=None):
        return ()
"""
MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM


class LettersConfig(LlamaConfig):
    model_type = "letters"


class LettersForCausalLM(LlamaForCausalLM):
    config_class = LettersConfig
"""


@pytest.fixture(params=["tokenizer", "model"])
def folder(request, tmp_path, monkeypatch):
    """A float checkpoint that brings code for its tokenizer, or for its model too."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "m"
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=64,
        )
    ).save_pretrained(path)
    (path / "letters_tokens.py").write_text(TOKENIZER)
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LettersTokenizer",
                "auto_map": {"AutoTokenizer": ["letters_tokens.LettersTokenizer", None]},
            }
        )
    )
    if request.param == "model":
        (path / "letters_model.py").write_text(MODEL)
        config = json.loads((path / "config.json").read_text()) | {
            "model_type": "letters",
            "architectures": ["LettersForCausalLM"],
            "auto_map": {
                "AutoConfig": "letters_model.LettersConfig",
                "AutoModelForCausalLM": "letters_model.LettersForCausalLM",
            },
        }
        (path / "config.json").write_text(json.dumps(config))
    return path


def test_every_command_that_loads(folder, tmp_path, capsys):
    data = tiny.write_jsonl(tmp_path / "t.jsonl", [{"prompt": "ab", "completion": "c"}] * 2)
    trust = ["--device", "cpu", "--group-size", "64", "--trust-remote-code"]
    train = [
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
        "1",
    ]
    assert main([*train, *trust]) == 0
    tuned, journal = tmp_path / "o/model", tmp_path / "o/journal.qzo"
    assert (tuned / "letters_tokens.py").read_text() == TOKENIZER
    assert main(["replay", str(folder), str(journal), "--output-dir", str(tmp_path / "r"), *trust]) == 0
    assert main(["export", str(tuned), "--to", "gptq", "--output-dir", str(tmp_path / "g"), *trust]) == 0
    assert (
        main(["inspect", str(tuned), "--signal", "--signal-directions", "1", "--device", "cpu", "--trust-remote-code"])
        == 0
    )
    assert main(["memory", "--model", str(folder), "--seq-len", "8", *trust]) == 0
    assert main(["quantize", str(folder), "--output-dir", str(tmp_path / "q"), "--trust-remote-code"]) == 0
    for path in (tuned, tmp_path / "r", tmp_path / "g", tmp_path / "q"):
        assert type(qzo.load_tokenizer(path, trust_remote_code=True)).__name__ == "LettersTokenizer"
        assert len(layers(qzo.from_pretrained(path, device="cpu", trust_remote_code=True))) == 7
    assert "Traceback" not in capsys.readouterr().err


def test_without_the_flag_it_is_asked_for(folder, tmp_path, capsys):
    data = tiny.write_jsonl(tmp_path / "t.jsonl", [{"prompt": "ab", "completion": "c"}] * 2)
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
                "--device",
                "cpu",
                "--group-size",
                "64",
            ]
        )
        == 2
    )
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qzo train")]
    assert f"{folder} brings code of its own" in line
    assert "--trust-remote-code" in line


def test_the_class_that_auto_map_puts_it_under(folder, tmp_path):
    """A vision-language model's own code is no AutoModelForCausalLM."""
    if not (folder / "letters_model.py").exists():
        (folder / "letters_model.py").write_text(MODEL)
    code = MODEL + "\n\nclass LettersForConditionalGeneration(LettersForCausalLM):\n    pass\n"
    (folder / "letters_model.py").write_text(code)
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "letters",
        "architectures": ["LettersForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": "letters_model.LettersConfig",
            "AutoModelForImageTextToText": "letters_model.LettersForConditionalGeneration",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    model = qzo.from_pretrained(folder, device="cpu", group_size=64, trust_remote_code=True)
    qzo.save_pretrained(model, tmp_path / "q")
    for found in (model, qzo.from_pretrained(tmp_path / "q", device="cpu", trust_remote_code=True)):
        assert type(found).__name__ == "LettersForConditionalGeneration"
        assert len(layers(found)) == 7


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import nosuchpackage", "ImportError: This modeling file requires the following packages that were not found"),
        ("no python", "SyntaxError"),
    ],
)
def test_code_that_fails_is_one_line(folder, capsys, line, message):
    name = "letters_model.py" if (folder / "letters_model.py").exists() else "letters_tokens.py"
    (folder / name).write_text(f"{(folder / name).read_text()}\n{line}\n")
    data = tiny.write_jsonl(folder.parent / "t.jsonl", [{"prompt": "ab", "completion": "c"}] * 2)
    assert (
        main(
            [
                "train",
                "--model",
                str(folder),
                "--data",
                str(data),
                "--output-dir",
                str(folder.parent / "o"),
                "--batch-size",
                "2",
                "--device",
                "cpu",
                "--group-size",
                "64",
                "--trust-remote-code",
            ]
        )
        == 2
    )
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"{folder}: its " in last
    assert message in last
