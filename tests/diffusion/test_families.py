"""Transformers by class: which are trained, and that they are given what diffusers' pipeline gives them."""

import pytest
import torch

from qzo.diffusion.families import FAMILIES, family_of


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("PixArtTransformer2DModel", "here: PixArt predicts the noise of a DDPM schedule, and flow matching would"),
        ("UNet2DConditionModel", "U-Nets of Stable Diffusion 1, 2 and XL predict the noise"),
        ("NewTransformer3DModel", "a 'NewTransformer3DModel' is not known; trained are SD3Transformer2DModel"),
        (None, "a None is not known"),
    ],
)
def test_what_is_no_flow_model_is_refused_by_name(name, told):
    with pytest.raises(ValueError, match=told):
        family_of(name, "here")


def test_the_transformer_is_given_what_the_pipeline_gives_it(pipeline_dir):
    """The arguments of each call that the pipeline makes, from the same latents, times and prompt."""
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(pipeline_dir)
    pipe.set_progress_bar_config(disable=True)
    family, real = FAMILIES["SD3Transformer2DModel"], pipe.transformer.forward
    calls: list[tuple] = []

    def watched(**given):
        calls.append((given, real(**given)[0]))
        return (calls[-1][1],)

    pipe.transformer.forward = watched
    pipe("a red cat", height=16, width=16, num_inference_steps=3, guidance_scale=1.0, max_sequence_length=12)
    pipe.transformer.forward = real
    with torch.no_grad():
        prompt = family.encode(pipe, "a red cat", torch.device("cpu"), 12)
        stacked = {name: value.unsqueeze(0) for name, value in prompt.items()}
        assert len(calls) == 3
        for (given, wanted), sigma in zip(calls, pipe.scheduler.sigmas, strict=False):
            got = family.predict(pipe.transformer, given["hidden_states"], sigma.view(1), stacked)
            assert torch.allclose(got, wanted, atol=1e-5)


def test_latents_beyond_the_positions_are_refused():
    family = FAMILIES["SD3Transformer2DModel"]
    config = {"patch_size": 2, "pos_embed_max_size": 12}
    assert family.patch(config) == 2
    family.check(config, 24, 24)
    with pytest.raises(ValueError, match="12 x 12 positions, and the picture 13 x 13: give a lower --resolution"):
        family.check(config, 26, 26)
