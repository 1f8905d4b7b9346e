"""Mixtures of experts: split stacks compute what transformers' do, run under evaluations, train, and come back."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import qzo
from qzo.nn import experts
from qzo.nn.layers import arena_of, evaluating, layers
from qzo.nn.linear import QZOLinear
from qzo.reports import memory, models

TINY = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "initializer_range": 0.2,
    "num_experts_per_tok": 2,
}
SMALL = {"num_experts": 4, "moe_intermediate_size": 32}
MODELS = {
    "mixtral": (MixtralForCausalLM, MixtralConfig(**TINY, num_local_experts=4)),
    "qwen2": (Qwen2MoeForCausalLM, Qwen2MoeConfig(**TINY, **SMALL, shared_expert_intermediate_size=64)),
    "qwen3": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**TINY, **SMALL, head_dim=32)),
}
LINEARS = {"mixtral": 4 + 4 * 3, "qwen2": 4 + 4 * 3 + 4, "qwen3": 4 + 4 * 3}  # of a block
IDS = torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(1))
BATCH = {"input_ids": IDS, "labels": IDS}


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    return save(request.param, tmp_path_factory.mktemp(request.param))


def save(name, path):
    cls, config = MODELS[name]
    torch.manual_seed(0)
    cls(copy.deepcopy(config)).save_pretrained(path)
    return path


def load(path):
    return qzo.from_pretrained(path, device="cpu", group_size=32)


def kind(path):
    return next(name for name in MODELS if name in path.name)


def test_split_experts_compute_what_stacks_do(folder):
    cls = MODELS[kind(folder)][0]
    stacked, split = (cls.from_pretrained(folder).eval() for _ in range(2))
    experts.split_experts_(split)
    assert sum(isinstance(m, experts.Experts) for m in split.modules()) == 2
    with torch.no_grad():
        assert torch.allclose(split(IDS).logits, stacked(IDS).logits, atol=1e-5)
    weight = split.model.layers[1].mlp.experts[3].up_proj.weight
    assert torch.equal(weight, stacked.model.layers[1].mlp.experts.gate_up_proj[3].chunk(2)[1])


def test_every_expert_is_quantized(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(folder)
    assert len(layers(model)) == 2 * LINEARS[kind(folder)]
    cls = MODELS[kind(folder)][0]
    expected = cls.from_pretrained(folder).eval()
    experts.split_experts_(expected)
    for name, layer in layers(model).items():
        expected.get_submodule(name).weight.data = layer.dequantize()
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, expected(IDS).logits, atol=1e-4)


def test_an_evaluation_among_others_has_the_bits_it_has_alone(folder):
    """Routing differs between the evaluations, so their experts see different numbers of rows. 32 tokens each: with
    AVX-512 torch's sigmoid, a gate of one number a token, rounds what is left over by 32 otherwise."""
    batch = {name: IDS.view(-1)[:32].view(4, 8) for name in BATCH}
    model, routed = load(folder), []
    gate = model.model.layers[1].mlp.gate
    handle = gate.register_forward_hook(lambda _, args, out: routed.append(out[2]))
    evaluations = qzo.Evaluations([3, 3, 4, 5], [0.1, -0.1, 0.0, 0.1])
    with evaluating(model, evaluations):
        together = qzo.losses(model, batch, 4)
        handle.remove()
        assert torch.equal(qzo.losses(model, batch, 4), together)
    assert not torch.equal(*routed[-1].chunk(4)[:2])
    alone = []
    for e in range(4):
        with evaluating(model, evaluations[e : e + 1]):
            alone.append(qzo.losses(model, batch, 1))
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together[2:3], qzo.losses(model, batch, 1))
    assert len(set(together.tolist())) == 4
    assert all(layer.evaluations is None for layer in layers(model).values())


def test_only_experts_perturbed_move_the_loss(folder):
    model = load(folder)
    qzo.train_only_(model, lambda name: ".experts." in name)
    with evaluating(model, qzo.Evaluations([3, 3], [1e-2, -1e-2])):
        plus, minus = qzo.losses(model, BATCH, 2).tolist()
    assert plus != minus


def test_paired_and_sequential_steps_end_in_the_same_scales(folder):
    ends = []
    for paired in (True, False):
        model = load(folder)
        optimizer = qzo.QZO(model, lr=1e-2, directions=2, seed=5, paired=paired)
        for _ in range(2):
            if paired:
                optimizer.step(lambda: qzo.losses(model, BATCH, 4))  # noqa: B023
            else:
                optimizer.step(lambda: qzo.losses(model, BATCH, 1)[0])  # noqa: B023
        ends.append(qzo.scales(model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_training_lowers_the_loss_and_the_model_comes_back(folder, tmp_path):
    model = load(folder)
    optimizer = qzo.QZO(model, lr=4e-2, directions=2, seed=1)
    before = float(qzo.losses(model, BATCH, 1))
    start = qzo.scales(model)
    for _ in range(15):
        optimizer.step(lambda: qzo.losses(model, BATCH, 4))
    assert float(qzo.losses(model, BATCH, 1)) < before - 0.05
    assert any(".experts." in name and not torch.equal(start[name], after) for name, after in qzo.scales(model).items())
    qzo.save_pretrained(model, tmp_path / "out")
    again = load(tmp_path / "out")
    for layer in layers(model).values():
        layer.arena.write(layer.arena_name, layer.read_scales().half().float())
    assert torch.equal(qzo.losses(again, BATCH, 1), qzo.losses(model, BATCH, 1))
    # the tuned folder in its own format: only scales change
    again_out = tmp_path / "again"
    name = next(name for name in layers(again) if ".experts." in name)
    layer = again.get_submodule(name)
    layer.arena.write(layer.arena_name, layer.read_scales() * 2)
    report = qzo.save_pretrained(again, again_out, BATCH)
    assert set(report) == {"loss_before", "loss_after"}
    old, new = (load_file(path / "model.safetensors") for path in (tmp_path / "out", again_out))
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    assert changed == [f"{experts.file_name(name, again.config.model_type)}.weight_scale"]


def test_a_new_mixtral_file_has_the_published_names(tmp_path):
    model = load(save("mixtral", tmp_path / "mixtral"))
    qzo.save_pretrained(model, tmp_path / "out")
    published = {name.removesuffix(".weight") for name in load_file(tmp_path / "mixtral" / "model.safetensors")}
    written = {name.rpartition(".")[0] for name in load_file(tmp_path / "out" / "model.safetensors")}
    assert written == published
    assert "model.layers.1.block_sparse_moe.experts.3.w2" in written


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.block_sparse_moe.experts.1.w3.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.0.self_attn.w1.weight",
    ],
)
def test_names_there_and_back(name):
    assert experts.file_name(experts.model_name(name), "mixtral") == name
    assert experts.file_name("model.layers.0.mlp.up_proj", "llama") == "model.layers.0.mlp.up_proj"


def test_a_group_size_that_does_not_fit_an_expert_leaves_the_model_as_it_is(tmp_path):
    cls, config = MODELS["qwen3"]
    model = cls(copy.deepcopy(config))
    with pytest.raises(ValueError, match=r"experts.down_proj: group_size=64 does not divide in_features=32"):
        qzo.quantize_(model, group_size=64, strict=True)
    assert not any(isinstance(m, experts.Experts | QZOLinear) for m in model.modules())


def test_skipped_experts_stay_stacked():
    cls, config = MODELS["qwen3"]
    model = qzo.quantize_(cls(copy.deepcopy(config)), group_size=32, skip=("lm_head", "experts"))
    assert len(layers(model)) == 2 * 4
    assert type(model.model.layers[0].mlp.experts).__name__ == "Qwen3MoeExperts"


def test_stacks_of_another_form_stay_dense_with_one_warning():
    model = GptOssForCausalLM(GptOssConfig(**TINY, num_local_experts=4, head_dim=32)).eval()
    with pytest.warns(UserWarning, match=r"2 stacks of experts stay dense and frozen \(GptOssExperts\)") as caught:
        qzo.quantize_(model, group_size=32)
    assert len(caught) == 1
    assert len(layers(model)) == 2 * 4
    evaluations = qzo.Evaluations([3, 3], [1e-2, -1e-2])
    with evaluating(model, evaluations):
        together = qzo.losses(model, BATCH, 2)
    alone = []
    for e in range(2):
        with evaluating(model, evaluations[e : e + 1]):
            alone.append(qzo.losses(model, BATCH, 1))
    assert torch.allclose(together, torch.cat(alone), rtol=1e-6)
    assert together[0] != together[1]


def test_rows_that_do_not_divide_are_refused(folder):
    module = load(folder).model.layers[0].mlp.experts
    index, weights = torch.zeros(5, 2, dtype=torch.int64), torch.ones(5, 2)
    for layer in layers(module).values():
        layer.evaluations = qzo.Evaluations([1, 1], [0.1, -0.1])
    with pytest.raises(ValueError, match="5 rows do not divide into 2 evaluations"):
        module(torch.zeros(5, 64), index, weights)


def test_memory_is_predicted_with_split_experts(folder):
    """Codes and scales are those of the loaded model; routing is not known, so rows are spread evenly."""
    loaded = load(folder)
    _, empty = memory.random_model(str(folder), 32, "none", "cpu", torch.float32)
    found = memory.predict(empty, memory.Run(rows=2, tokens=16), "cpu", "sm_90")
    sizes = {
        "codes": sum(layer.codes.nbytes for layer in layers(loaded).values()),
        "scales": arena_of(loaded).data.nbytes,
    }
    for part, held in sizes.items():
        assert held <= found[part] <= held + 64 * len(layers(loaded)) + 4096  # what an allocator rounds to
    wanted = {name: models.form_of(layer) for name, layer in layers(loaded).items()}
    again = models.build_empty(loaded.config, torch.float32)
    experts.split_experts_(again)
    models.quantize_empty(again, wanted, cpu=True)
    assert memory.predict(again, memory.Run(rows=2, tokens=16), "cpu", "sm_90")["total"] == found["total"]
