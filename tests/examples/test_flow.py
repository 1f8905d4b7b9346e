"""What the examples with pictures share: bases in files, steps, samples."""

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is of the extra 'test'")

from examples.shared import flow

CONFIG = {
    "sample_size": 4,
    "patch_size": 2,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 1,
    "num_attention_heads": 1,
    "attention_head_dim": 32,
    "caption_projection_dim": 32,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 2,
}
DATA = flow.Prompted(torch.linspace(-1, 1, 6 * 16).view(6, 1, 4, 4), torch.eye(32)[:6])
EMPTY = torch.zeros(32)


def base(steps):
    recipe = flow.BaseRecipe(CONFIG, steps=steps, period=100, batch=8, learning_rate=2e-2)
    return flow.quantized(flow.train_base(recipe, DATA, EMPTY), 32)


def every_picture(generator):
    return DATA


def test_a_base_comes_back_as_it_was_written(tmp_path):
    model = base(steps=1)
    flow.save_base(model, tmp_path / "base.safetensors")
    again = flow.load_base(tmp_path / "base.safetensors", 32)
    noisy, times = torch.randn(6, 1, 4, 4), torch.linspace(0.1, 0.9, 6)
    found = [flow.velocity(m, noisy, times, DATA.prompts) for m in (model, again)]
    assert torch.equal(*found)


def test_a_base_learns_and_is_the_same_in_each_run():
    rows = flow.rows_to_measure(DATA.pictures, 16)
    first, second, trained = (flow.losses(base(steps), DATA, rows) for steps in (1, 1, 40))
    assert torch.equal(first, second)
    assert flow.compared(first, trained, 16)["z"] < -3


def test_every_method_sees_the_same_rows():
    recipe = flow.Recipe(steps=4, batch=6, learning_rate=1.0)
    first, second = (list(flow.Objective().steps(recipe, every_picture, seed=3)) for _ in range(2))
    assert [rate for _, rate, *_ in first] == pytest.approx([1, 0.775, 0.55, 0.325])
    for (*_, one), (*_, other) in zip(first, second, strict=True):
        assert torch.equal(one.times, other.times)
        assert torch.equal(one.noise, other.noise)
    assert not torch.equal(first[0][3].noise, first[1][3].noise)


def test_a_model_is_measured_on_as_many_rows_of_each_stratum():
    rows = flow.rows_to_measure(DATA.pictures, 16)
    bounds = flow.LAW.times(torch.arange(1, 8).double() / 8).float()
    assert torch.bincount(torch.bucketize(rows.times, bounds)).tolist() == [12] * 8


def test_samples_follow_the_flow_to_its_end():
    """A velocity that leads straight to a prompt's own picture gets there, and with guidance as far beyond it."""
    ends = torch.linspace(-1, 1, 7)
    prompts = torch.cat([DATA.prompts, EMPTY[None]])

    class Straight(torch.nn.Module):
        config = CONFIG

        def forward(self, hidden_states, timestep, encoder_hidden_states, **_):
            end = ends[torch.cdist(encoder_hidden_states[:, 0], prompts).argmin(1)]
            return ((hidden_states - end.view(-1, 1, 1, 1)) / (timestep / 1000).view(-1, 1, 1, 1),)

    asked = torch.tensor([3, 5, 0])
    for guidance in (1.0, 2.0):
        found = flow.sample(Straight(), prompts[asked], EMPTY, steps=5, guidance=guidance)
        want = ends[6] + guidance * (ends[asked] - ends[6])
        torch.testing.assert_close(found, want.view(-1, 1, 1, 1).expand_as(found), atol=1e-5, rtol=1e-5)
