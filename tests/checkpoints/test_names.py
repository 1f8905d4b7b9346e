"""A file's names of tensors in the model: as they are, by transformers' renamings, experts one by one."""

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from qzo.checkpoints.names import Names
from tests.support.float_models import ONE_BLOCK
from tests.support.vision_models import build


@pytest.fixture(scope="module")
def llava():
    return build("Llava", False)


def test_a_name_that_the_model_has_stays(llava):
    names = Names(llava)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert name in names.known
    assert names(name) == name
    assert names("nobody.knows.weight") == "nobody.knows.weight"
    assert names.changed == {}
    assert names.used() == []


def test_an_older_name_is_found_and_remembered_by_its_owner(llava):
    names = Names(llava)
    for leaf in ("weight", "weight_scale"):
        old = f"language_model.model.layers.1.mlp.up_proj.{leaf}"
        found = names(old)
        assert found == (f"model.language_model.layers.1.mlp.up_proj.{leaf}" if leaf == "weight" else old)
    assert names("language_model.lm_head.weight") == "lm_head.weight"
    assert names.changed == {
        "language_model.model.layers.1.mlp.up_proj": "model.language_model.layers.1.mlp.up_proj",
        "language_model.lm_head": "lm_head",
    }
    assert names.used()
    assert set(names.used()) <= set(names._own)


@pytest.fixture
def mixtral():
    with torch.device("meta"):
        return MixtralForCausalLM(MixtralConfig(**ONE_BLOCK, num_local_experts=2))


EXPERT = "model.layers.0.block_sparse_moe.experts.1.w2.weight"


def test_experts_that_a_file_has_one_by_one_are_split_in_the_model(mixtral):
    names = Names(mixtral)
    stack = "model.layers.0.mlp.experts"
    assert f"{stack}.down_proj" in names.known
    assert names(EXPERT) == f"{stack}.1.down_proj.weight"
    old, new = names.split(stack)
    assert old == {f"{stack}.gate_up_proj", f"{stack}.down_proj"}
    assert new == {f"{stack}.{i}.{part}.weight" for i in range(2) for part in ("gate_proj", "up_proj", "down_proj")}
    assert new <= set(names.known)
    assert not old & set(names.known)
    assert set(names.known) == set(mixtral.state_dict())
    assert names(EXPERT) == f"{stack}.1.down_proj.weight"


def test_what_is_more_than_a_name_is_left_to_transformers(llava):
    """It stacks experts until they are split here; a renaming alone is done here."""
    sizes = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 2}
    with torch.device("meta"):
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**ONE_BLOCK | sizes))
    names = Names(model)
    assert names.converted("model.layers.0.mlp.experts.1.down_proj.weight")
    assert not names.converted("model.layers.0.mlp.shared_expert.down_proj.weight")
    names.split("model.layers.0.mlp.experts")
    assert not names.converted("model.layers.0.mlp.experts.1.down_proj.weight")
    assert not Names(llava).converted("language_model.model.norm.weight")
