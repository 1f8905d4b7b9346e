"""`qzo train` on float folders of many makes: it trains and saves what loads again, or refuses the model by name."""

import json
import warnings

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

import qzo
from qzo.checkpoints.quantize_folder import quantize_folder
from qzo.cli.main import main
from qzo.nn.layers import layers
from tests.support.gptq_checkpoints import contents
from tests.support.tiny import RECORDS, WORDS, save_checkpoint, write_jsonl

VOCABULARY = len(WORDS) + 3
BERT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
GPT2 = {"n_layer": 1, "n_embd": 64, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 64}
MAMBA = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": VOCABULARY, "state_size": 8, "time_step_rank": 4}
SPEECH = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 64,
}


def llama():
    return t.LlamaForCausalLM(t.LlamaConfig(**BERT))


def whisper():
    return t.WhisperForConditionalGeneration(t.WhisperConfig(**SPEECH))


def mixtral():
    return t.MixtralForCausalLM(t.MixtralConfig(**BERT, num_local_experts=4, num_key_value_heads=1))


# make -> how many layers train
TRAIN = {
    "llama": (llama, 7),
    "bin": (llama, 7),
    "mixtral": (mixtral, 4 + 4 * 3),
    "bert-decoder": (lambda: t.BertLMHeadModel(t.BertConfig(**BERT, is_decoder=True)), 7),
    "gpt2": (lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT2)), 4),
    "mamba": (lambda: t.MambaForCausalLM(t.MambaConfig(**MAMBA)), 3),
}
COMPLETIONS = [{"prompt": r["prompt"], "completion": ("warm", "cold")[r["label"] == 1]} for r in RECORDS]
REFUSED = {
    "bert-masked": (
        lambda: t.BertForMaskedLM(t.BertConfig(**BERT)),
        "BertForMaskedLM: its own loss of a batch is",
        "it has another objective than qzo minimizes; give QZO.step a closure of its own loss",
    ),
    "bert-classifier": (
        lambda: t.BertForSequenceClassification(t.BertConfig(**BERT)),
        "BertForSequenceClassification gives a text logits of one row",
        "labels are [rows, tokens] for a language model, [rows] for a classifier",
    ),
    "bert": (
        lambda: t.BertModel(t.BertConfig(**BERT)),
        "BertModel has no language-model head",
        "labels [rows, tokens] and options need one",
    ),
    "whisper": (
        whisper,
        "WhisperForConditionalGeneration reads input_features, and this batch has input_ids",
        "give qzo.losses(model, batch) batches with input_features and labels, in Python",
    ),
}


def folder(path, model, pickled=False):
    """A float folder of the model, with a tokenizer."""
    save_checkpoint(path)
    for name in ("model.safetensors", "config.json"):
        (path / name).unlink()
    model.save_pretrained(path)
    if pickled:
        torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
    return path


def train(tmp_path, model, records):
    data = write_jsonl(tmp_path / "data.jsonl", records)
    options = {"model": model, "data": data, "output-dir": tmp_path / "out", "device": "cpu", "group-size": 32}
    small = ["--max-steps", "1", "--batch-size", "2", "--json"]
    return main(["train", *(part for name, value in options.items() for part in (f"--{name}", str(value))), *small])


@pytest.mark.filterwarnings("ignore:group_size=32 does not divide")
@pytest.mark.parametrize("name", TRAIN)
def test_it_trains_and_loads_again(tmp_path, capsys, name):
    make, count = TRAIN[name]
    torch.manual_seed(0)
    source = folder(tmp_path / "in", make(), pickled=name == "bin")
    assert train(tmp_path, source, COMPLETIONS if name == "mamba" else RECORDS) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 1
    before = layers(qzo.from_pretrained(source, device="cpu", group_size=32))
    after = layers(qzo.from_pretrained(tmp_path / "out/model", device="cpu"))
    assert len(before) == len(after) == count
    assert any(not torch.equal(after[n].read_scales(), layer.read_scales()) for n, layer in before.items())
    assert all(torch.equal(after[n].codes, layer.codes) for n, layer in before.items())
    again = qzo.from_pretrained(tmp_path / "out/model", device="cpu")
    qzo.save_pretrained(again, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "out/model")


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name(tmp_path, capsys, name):
    make, *told = REFUSED[name]
    torch.manual_seed(0)
    assert train(tmp_path, folder(tmp_path / "in", make()), COMPLETIONS) == 2
    shown = capsys.readouterr().err
    assert all(text in shown for text in told)
    assert not (tmp_path / "out/journal.qzo").exists()


def test_whisper_trains_on_what_it_reads(tmp_path):
    torch.manual_seed(0)
    model = qzo.from_pretrained(folder(tmp_path / "in", whisper()), device="cpu", group_size=32)
    batch = {"input_features": torch.randn(2, 8, 32), "labels": torch.randint(3, VOCABULARY, (2, 5))}
    own = model(**batch).loss
    torch.testing.assert_close(qzo.losses(model, batch, 2), own.detach().expand(2))
    before = qzo.scales(model)
    qzo.QZO(model, lr=1e-2, directions=2).step(lambda: qzo.losses(model, batch, 4))
    assert all(not torch.equal(scales, before[name]) for name, scales in qzo.scales(model).items())
    qzo.save_pretrained(model, tmp_path / "out")
    again = qzo.from_pretrained(tmp_path / "out", device="cpu")
    assert set(layers(again)) == set(layers(model))


@pytest.mark.parametrize("name", ["gpt2", "mamba"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_folder_quantized_on_the_way_in_and_by_the_command_are_alike(tmp_path, capsys, name, bits):
    source = folder(tmp_path / "in", TRAIN[name][0]())
    options = ["--bits", str(bits), "--group-size", "128", "--json"]
    assert main(["quantize", str(source), "--output-dir", str(tmp_path / "q"), *options]) == 0
    assert json.loads(capsys.readouterr().out)["error"] is not None  # a tensor at a time, not by way of a whole model
    with pytest.warns(UserWarning, match="group_size=128 does not divide"):
        loaded = qzo.from_pretrained(source, device="cpu", bits=bits, group_size=128)
    quantized = qzo.from_pretrained(tmp_path / "q", device="cpu")
    assert set(layers(loaded)) == set(layers(quantized))
    for layer, packed in layers(quantized).items():
        assert torch.equal(packed.dequantize(), layers(loaded)[layer].dequantize())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_transformers_own_way_quantizes_the_same(tmp_path, name):
    source = folder(tmp_path / "in", TRAIN[name][0]())
    config = qzo.QZOConfig(group_size=32)
    model = t.AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32)
    want = qzo.from_pretrained(source, device="cpu", group_size=32)
    assert set(layers(model)) == set(layers(want))
    for layer, packed in layers(model).items():
        assert torch.equal(packed.dequantize(), layers(want)[layer].dequantize())
    model.save_pretrained(tmp_path / "out")
    again = qzo.from_pretrained(tmp_path / "out", device="cpu")
    assert set(layers(again)) == set(layers(want))


@pytest.mark.parametrize("way", ["streamed", "pickled", "renamed"])
def test_what_does_not_fit_is_told_once(tmp_path, way):
    """Also where transformers has to load the model first."""
    source = folder(tmp_path / "in", llama(), pickled=way == "pickled")
    if way == "renamed":
        file = source / "model.safetensors"
        save_file({name.removeprefix("model."): t for name, t in load_file(file).items()}, file, {"format": "pt"})
    for make in (
        lambda: qzo.from_pretrained(source, device="cpu", group_size=128),
        lambda: quantize_folder(source, tmp_path / "out", group_size=128),
    ):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            make()
        assert len([w for w in told if "does not divide" in str(w.message)]) == 1


@pytest.mark.parametrize("form", ["gptq", "awq", "bitsandbytes"])
def test_transposed_weights_in_other_formats(tmp_path, form):
    """As AutoGPTQ and transformers' bitsandbytes store a Conv1D: the transposed weight, as a Linear's."""
    torch.manual_seed(0)
    table = "nf4" if form == "bitsandbytes" else None
    model = qzo.from_pretrained(folder(tmp_path / "in", TRAIN["gpt2"][0]()), device="cpu", group_size=32, table=table)
    qzo.export(model, tmp_path / "out", form)
    again = layers(qzo.from_pretrained(tmp_path / "out", device="cpu"))
    assert set(again) == set(layers(model))
    assert all(torch.equal(layer.dequantize(), again[name].dequantize()) for name, layer in layers(model).items())
