"""Pictures by diffusers' own pipeline with our transformer in it."""

import numpy as np
import pytest
import torch

from qzo.diffusion.pictures import assemble, drawn
from qzo.diffusion.pipeline import open_pipeline
from qzo.diffusion.transformer import load_transformer
from qzo.nn.layers import arena_of


@pytest.fixture(scope="module")
def pipe(pipeline_dir):
    pipeline = open_pipeline(pipeline_dir)
    return assemble(pipeline, load_transformer(pipeline, torch.device("cpu"), torch.float32, 32)[0])


def pixels(pipe, seeds, guidance=2.0):
    return [np.array(picture) for picture in drawn(pipe, "a red cat", 16, seeds, 2, guidance)]


def test_a_seed_is_a_picture(pipe):
    first, second = pixels(pipe, [0, 1])
    assert first.shape == (16, 16, 3)
    assert (first != second).any()
    assert (pixels(pipe, [1])[0] == second).all()


def test_the_pictures_are_of_the_scales(pipe):
    """The transformer in the pipeline is the one that trains."""
    before = pixels(pipe, [3])[0]
    arena_of(pipe.transformer).data.mul_(1.5)
    assert (pixels(pipe, [3])[0] != before).any()
