"""A tiny Stable Diffusion 3 pipeline with random weights, and pictures with captions for it."""

import contextlib
import io
import json
import string
from typing import Any

import torch

RESOLUTION = 16  # pixels; a latent is 8 x 8, in 16 tokens
PROMPT_TOKENS = 12
_END = "<|endoftext|>"


def _clip():
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    words = ["<|startoftext|>", _END, *string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    vocabulary = {word: i for i, word in enumerate(words)}
    special = dict(unk_token=_END, bos_token=words[0], eos_token=_END, pad_token=_END)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16, **special)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModelWithProjection(config).eval(), tokenizer


def _t5():
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    letters = [(f"▁{c}", -2.0) for c in string.ascii_lowercase] + [(c, -2.5) for c in string.ascii_lowercase]
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *letters]
    config = T5Config(vocab_size=len(words), d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval(), T5TokenizerFast(vocab=words, extra_ids=0)


def transformer(layers=2):
    """Two blocks of 64 numbers, the first with the second attention of 3.5."""
    from diffusers import SD3Transformer2DModel

    model: Any = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=12,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return model.eval()


def output(model):
    """What it makes of two rows, the same each time."""
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 64, generator=generator),
        "pooled_projections": torch.randn(2, 64, generator=generator),
        "timestep": torch.tensor([200.0, 800.0]),
    }
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def save_pipeline(folder, seed=0):
    """Write a pipeline with CLIP twice, T5, a VAE and a transformer, all random."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    torch.manual_seed(seed)
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = transformer(), scheduler, vae.eval(), *_clip(), *_clip(), *_t5()
    with contextlib.redirect_stderr(io.StringIO()):
        pipeline: Any = StableDiffusion3Pipeline(*parts)
        pipeline.save_pretrained(folder)
    return folder


def save_pictures(folder, count=8, size=RESOLUTION, captions="texts"):
    """Pictures of one colour each, a bright square on it; captions: "texts" beside them, "metadata", or None."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        picture = Image.new("RGB", (size + i % 3, size), (30 * i % 256, 60, 200 - 20 * i % 256))
        picture.paste((255, 255, 0), (i % 4, 2, i % 4 + size // 3, size // 2))
        picture.save(folder / f"p{i}.png")
        caption = f"a {'red' if i % 2 else 'blue'} picture"
        lines.append({"file_name": f"p{i}.png", "text": caption})
        if captions == "texts":
            (folder / f"p{i}.txt").write_text(caption + "\n")
    if captions == "metadata":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
