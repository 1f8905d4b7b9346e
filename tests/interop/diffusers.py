"""Whether diffusers' own pipeline, with bitsandbytes, loads what `qzo train-diffusion` saves, and qzo what they make.

By hand, where both libraries are installed:  python -m tests.interop.diffusers
diffusers asks for a GPU before it loads such a folder, though bitsandbytes computes on a CPU too: without one the
question is left out here.
Seen to pass with bitsandbytes 0.50.2, diffusers 0.42.1, transformers 5.24.0 and torch 2.13.0, on a CPU.
"""

import tempfile
from pathlib import Path
from unittest import mock

import bitsandbytes
import torch
from diffusers import BitsAndBytesConfig, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer

from qzo.cli.main import main as command
from qzo.diffusion.pipeline import open_pipeline
from qzo.diffusion.transformer import load_transformer, save_transformer
from qzo.nn.layers import arena_of
from tests.support import pipelines
from tests.support.checkpoints import relative_error

CPU = torch.device("cpu")
OUTPUTS = 2e-5  # both compute in float32


def ours(folder):
    return load_transformer(open_pipeline(folder), CPU, torch.float32, 32)


def check(name, theirs, mine):
    error = relative_error(pipelines.output(theirs), pipelines.output(mine))
    print(f"{name}: outputs differ by {error:.1e} of their size")
    assert error < OUTPUTS, name


def trained(folder):
    """A run of the command on a float pipeline: what it saves is read by the pipeline itself."""
    pipelines.save_pipeline(folder / "float")
    pictures = pipelines.save_pictures(folder / "pictures")
    line = f"train-diffusion {folder}/float --data {pictures} --output-dir {folder}/out --max-steps 3 --batch-size 4"
    assert command([*line.split(), "--resolution", "16", "--prompt-tokens", "12", "--group-size", "32"]) == 0
    pipe = StableDiffusion3Pipeline.from_pretrained(folder / "out" / "model", dtype=torch.float32)
    check("trained, float source", pipe.transformer, ours(folder / "out" / "model")[0])
    picture = pipe("a red picture", height=16, width=16, num_inference_steps=2, max_sequence_length=12).images[0]
    assert picture.size == (16, 16)


def made_by_bitsandbytes(folder, double):
    """Their folder is read, its scales moved, and what is saved of it read by them."""
    name = "bitsandbytes' own" + (", double" if double else "")
    pipelines.save_pipeline(folder / "float")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    theirs = SD3Transformer2DModel.from_pretrained(
        folder / "float" / "transformer", quantization_config=config, dtype=torch.float32
    )
    theirs.save_pretrained(folder / "float" / "transformer")
    model, origin = ours(folder / "float")
    check(name, theirs, model)
    arena_of(model).data.mul_(1.1)
    save_transformer(model, origin, folder / "moved")
    check(f"{name}, moved", SD3Transformer2DModel.from_pretrained(folder / "moved", dtype=torch.float32), model)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        mock.patch.object(BnB4BitDiffusersQuantizer, "validate_environment", return_value=None).start()
        mock.patch.object(BnB4BitDiffusersQuantizer, "update_device_map", return_value={"": "cpu"}).start()
    print(f"bitsandbytes {bitsandbytes.__version__}")
    with tempfile.TemporaryDirectory() as temporary:
        trained(Path(temporary) / "trained")
        made_by_bitsandbytes(Path(temporary) / "plain", double=False)
        made_by_bitsandbytes(Path(temporary) / "double", double=True)
