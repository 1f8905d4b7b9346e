"""Latents and prompts on the disk: the pipeline's own formula, and a build that goes on where it was killed."""

import gc
import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import save

from qzo.diffusion import cache
from qzo.diffusion.images import pixels, read_pictures
from qzo.diffusion.pipeline import open_pipeline
from tests.support import pipelines

CPU = torch.device("cpu")


def build(pipeline_dir, data, folder, resolution=pipelines.RESOLUTION, tokens=pipelines.PROMPT_TOKENS):
    pipeline = open_pipeline(pipeline_dir)
    return cache.build(pipeline, data, folder, resolution, tokens, CPU, torch.float32)


def files(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def built(pipeline_dir, pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    return folder, build(pipeline_dir, pictures, folder)["train"]


def test_latents_are_what_the_pipeline_undoes(pipeline_dir, pictures, built):
    """Its decoder's input, latents / scaling_factor + shift_factor, is the posterior's sample to 1e-6."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(pipeline_dir / "vae").eval()
    for index, picture in enumerate(read_pictures(pictures)):
        latent = built[1].latent(index)
        assert latent.shape == (4, 8, 8)
        with torch.no_grad():
            encoded = vae.encode(pixels(picture, pipelines.RESOLUTION).unsqueeze(0))
        wanted = cache.posterior_sample(encoded, cache.digest_of(picture.data))
        back = latent / vae.config.scaling_factor + vae.config.shift_factor
        assert float((back - wanted).abs().max()) <= 1e-6
        away = (wanted - encoded.latent_dist.mean[0]) / encoded.latent_dist.std[0]
        assert 0.8 < float(away.std()) < 1.2  # a sample, not the mean


@torch.no_grad()
def test_prompts_are_what_the_pipeline_makes_of_them(pipeline_dir, built):
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(pipeline_dir)
    for index, text in ((0, "a blue picture"), (None, "")):
        embeds, _, pooled, _ = pipe.encode_prompt(
            text, None, None, device=CPU, do_classifier_free_guidance=False, max_sequence_length=12
        )
        held = built[1].prompt(index)
        assert torch.equal(held["encoder_hidden_states"], embeds[0])
        assert torch.equal(held["pooled_projections"], pooled[0])


def test_equal_captions_are_encoded_once(built):
    assert len(built[1]) == 8
    assert len(list((built[0] / "prompts").iterdir())) == 3  # two captions and the empty one


def test_a_killed_build_goes_on(pipeline_dir, pictures, built, tmp_path, monkeypatch):
    """Killed in the middle of the pictures, then of the prompts: nothing is made twice, and the files are the same."""
    made: list[str] = []
    real = cache.vae_encoder

    def dying(pipeline, device):
        encode = real(pipeline, device)

        def counted(image, digest):
            if len(made) == 5:
                raise KeyboardInterrupt
            made.append(digest)
            return encode(image, digest)

        return counted

    monkeypatch.setattr(cache, "vae_encoder", dying)
    with pytest.raises(KeyboardInterrupt):
        build(pipeline_dir, pictures, tmp_path)
    (tmp_path / "latents" / "half.safetensors.tmp").write_bytes(b"cut sh")
    assert len(files(tmp_path)) == 5
    made.clear()
    monkeypatch.setattr(cache, "prompt_encoder", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(pipeline_dir, pictures, tmp_path)
    assert len(made) == 3
    monkeypatch.undo()
    latents = build(pipeline_dir, pictures, tmp_path)["train"]
    assert files(tmp_path) == files(built[0])
    assert repr(latents) == repr(built[1])


def test_a_whole_cache_loads_no_encoder(pipeline_dir, pictures, built, monkeypatch):
    for name in ("vae_encoder", "prompt_encoder", "_digest"):
        monkeypatch.setattr(cache, name, None)
    assert repr(build(pipeline_dir, pictures, built[0])["train"]) == repr(built[1])


def test_the_vae_and_the_encoders_are_let_go(pipeline_dir, pictures, tmp_path, monkeypatch):
    from diffusers import AutoencoderKL, StableDiffusion3Pipeline

    held: list[weakref.ref] = []

    def watched(cls):
        real = cls.from_pretrained

        def load(*args, **kwargs):
            loaded = real(*args, **kwargs)
            held.append(weakref.ref(getattr(loaded, "text_encoder_3", loaded)))
            return loaded

        monkeypatch.setattr(cls, "from_pretrained", load)

    watched(AutoencoderKL)
    watched(StableDiffusion3Pipeline)
    build(pipeline_dir, pictures, tmp_path)
    gc.collect()
    assert len(held) == 2
    assert [ref() for ref in held] == [None, None]


def test_another_vae_is_refused(pipeline_dir, pictures, built, tmp_path):
    folder = shutil.copytree(pipeline_dir, tmp_path / "p")
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 1.0}))
    with pytest.raises(ValueError, match="is a cache made by another VAE: name another with --cache, or delete it"):
        build(folder, pictures, built[0])


def test_another_resolution_is_refused(pipeline_dir, pictures, built):
    with pytest.raises(ValueError, match=r"made by another resolution \(16, not 20\)"):
        build(pipeline_dir, pictures, built[0], resolution=20)
    with pytest.raises(ValueError, match=r"made by another length of prompts \(12, not 8\)"):
        build(pipeline_dir, pictures, built[0], tokens=8)


def test_a_resolution_that_patches_do_not_divide_is_refused(pipeline_dir, pictures, tmp_path):
    with pytest.raises(ValueError, match=r"--resolution 18: a token of .* is 4 x 4 pixels .* give 16"):
        build(pipeline_dir, pictures, tmp_path / "new", resolution=18)
    assert not (tmp_path / "new").exists()


def test_pictures_that_cannot_be_used_are_counted_and_named(pipeline_dir, pictures, tmp_path):
    """Two of ten are too many; one of a hundred is left out with a warning."""
    folder = shutil.copytree(pictures, tmp_path / "few")
    pipelines.save_pictures(folder / "small", 1, size=6)
    (folder / "torn.png").write_bytes((folder / "p0.png").read_bytes()[:40])
    (folder / "torn.txt").write_text("torn")
    with pytest.raises(
        ValueError, match=r"2 of 10 pictures .* more than 1%: small/p0.png: it is 6 x 6, .*torn.png: it"
    ):
        build(pipeline_dir, folder, tmp_path / "cache")
    for i in range(92):
        shutil.copy(folder / f"p{i % 8}.png", folder / f"q{i}.png")
        (folder / f"q{i}.txt").write_text("again")
    shutil.rmtree(folder / "small")
    with pytest.warns(UserWarning, match=r"1 of 101 pictures of .* are left out: torn.png: it cannot be read"):
        latents = build(pipeline_dir, folder, tmp_path / "cache")["train"]
    assert len(latents) == 100


def test_a_file_that_is_gone_is_named(pipeline_dir, pictures, tmp_path):
    latents = build(pipeline_dir, pictures, tmp_path)["train"]
    next((tmp_path / "latents").iterdir()).unlink()
    with pytest.raises(FileNotFoundError, match="is gone from the cache: start again with --resume"):
        [latents.latent(i) for i in range(len(latents))]


@pytest.mark.parametrize("damage", ["cut", "header", "another"])
def test_a_damaged_file_of_the_cache_is_named(pipeline_dir, pictures, built, tmp_path, damage):
    shutil.copytree(built[0], tmp_path / "c")
    latents = cache.Latents(tmp_path / "c", built[1].examples, built[1].header)
    file = tmp_path / "c" / "latents" / f"{latents.examples[0].picture}.safetensors"
    whole = file.read_bytes()
    broken = {"cut": whole[:-4], "header": b"\xff" * 40, "another": save({"latent": torch.ones(4, 2)})}
    file.write_bytes(broken[damage])
    with pytest.raises(ValueError, match=f"{file.name} is "):
        latents.latent(0)
    (tmp_path / "c" / "cache.json").write_text("[]" if damage == "cut" else '{"files": 3}')
    with pytest.raises(ValueError, match=r"cache.json (holds a JSON list|is damaged)"):
        build(pipeline_dir, pictures, tmp_path / "c")
