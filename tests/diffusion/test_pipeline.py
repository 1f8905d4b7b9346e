"""A pipeline's folder: what is in it, and what is refused before anything is loaded."""

import json
import shutil

import pytest

from qzo.diffusion.pipeline import open_pipeline


@pytest.fixture
def copied(pipeline_dir, tmp_path):
    return shutil.copytree(pipeline_dir, tmp_path / "p")


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_sizes_follow_from_the_configs(pipeline_dir):
    pipeline = open_pipeline(pipeline_dir)
    assert (pipeline.downscale, pipeline.channels, pipeline.resolution()) == (2, 4, 16)
    assert (pipeline.latent_size(16), pipeline.tokens(16), pipeline.tokens(32)) == (8, 16, 64)
    assert pipeline.texts == [
        *(f"text_encoder{n}" for n in ("", "_2", "_3")),
        *(f"tokenizer{n}" for n in ("", "_2", "_3")),
    ]


@pytest.mark.parametrize(
    ("resolution", "told"),
    [
        (18, "a token of .* is 4 x 4 pixels .2 of the VAE, patches of 2., which does not divide it; give 16"),
        (0, "give 4"),
        (64, "12 x 12 positions, and the picture 16 x 16"),
    ],
)
def test_a_resolution_that_cannot_be_is_refused(pipeline_dir, resolution, told):
    with pytest.raises(ValueError, match=told):
        open_pipeline(pipeline_dir).latent_size(resolution)


def test_a_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no model_index\.json: give the folder of a diffusers pipeline"):
        open_pipeline(tmp_path)


def test_a_text_encoder_that_is_missing_is_named(copied):
    shutil.rmtree(copied / "text_encoder_3")
    told = r"names text_encoder_3 \(T5EncoderModel of transformers\), and there is no folder .*text_encoder_3: fetch"
    with pytest.raises(FileNotFoundError, match=told):
        open_pipeline(copied)


def test_a_pipeline_saved_without_an_encoder_is_taken(copied):
    shutil.rmtree(copied / "text_encoder_3")
    shutil.rmtree(copied / "tokenizer_3")
    rewrite(copied / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    assert "text_encoder_3" not in open_pipeline(copied).parts


def test_a_scheduler_of_another_objective_is_refused(copied):
    rewrite(copied / "scheduler" / "scheduler_config.json", _class_name="DDPMScheduler")
    with pytest.raises(ValueError, match=r"scheduler: DDPMScheduler is no scheduler of a flow model"):
        open_pipeline(copied)


def test_a_transformer_of_another_objective_is_refused(copied):
    rewrite(copied / "transformer" / "config.json", _class_name="PixArtTransformer2DModel")
    with pytest.raises(ValueError, match="transformer: PixArt predicts the noise of a DDPM schedule"):
        open_pipeline(copied)


def test_a_u_net_is_refused(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]}))
    with pytest.raises(ValueError, match="U-Nets of Stable Diffusion 1, 2 and XL predict the noise"):
        open_pipeline(tmp_path)


def test_a_pipeline_without_a_vae_is_refused(copied):
    rewrite(copied / "model_index.json", vae=[None, None])
    with pytest.raises(ValueError, match="is a StableDiffusion3Pipeline without a vae"):
        open_pipeline(copied)


@pytest.mark.parametrize("part", ["../elsewhere", "/tmp", "..", "vae/x"])
def test_a_part_in_another_folder_is_refused(copied, part):
    (copied.parent / "elsewhere").mkdir()
    rewrite(copied / "model_index.json", **{part: ["diffusers", "AutoencoderKL"]})
    with pytest.raises(ValueError, match=r"model_index.json names '.*', which is no folder in this one"):
        open_pipeline(copied)


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("transformer/config.json", {"patch_size": 0}, "patch_size is 0"),
        ("transformer/config.json", {"in_channels": None}, "in_channels is None"),
        ("transformer/config.json", {"pos_embed_max_size": "12"}, "pos_embed_max_size is '12'"),
        ("transformer/config.json", {"sample_size": [8, 8]}, r"sample_size is \[8, 8\]"),
        ("vae/config.json", {"block_out_channels": 2}, "block_out_channels is 2"),
        ("vae/config.json", {"block_out_channels": [8] * 99}, "block_out_channels is "),
        ("vae/config.json", {"scaling_factor": None}, "scaling_factor is None"),
        ("vae/config.json", {"_class_name": ["my_code", "VAE"]}, "_class_name is "),
        ("model_index.json", {"_class_name": "my code"}, "_class_name is 'my code'"),
    ],
)
def test_a_config_without_its_numbers_is_refused(copied, name, changes, told):
    rewrite(copied / name, **changes)
    with pytest.raises(ValueError, match=f"{told}.*; the file is damaged, fetch it again"):
        open_pipeline(copied)


def test_names_of_several_lines_are_told_in_one(copied):
    rewrite(copied / "model_index.json", gone=["a\nb", "c\td"])
    with pytest.raises(FileNotFoundError, match=r"names gone \(c d of a b\)"):
        open_pipeline(copied)
    rewrite(copied / "model_index.json", gone=[None, None])
    rewrite(copied / "scheduler" / "scheduler_config.json", _class_name="a\nb")
    with pytest.raises(ValueError, match="scheduler: a b is no scheduler of a flow model"):
        open_pipeline(copied)
