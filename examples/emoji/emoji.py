"""Emoji of 16 x 16 pixels in two styles, Twitter's and Google's, and what stands for their names.

The pictures are those of the npm packages emoji-datasource-twitter and emoji-datasource-google, unpacked into
FOLDER/twitter and FOLDER/google (README.md has the commands).
"""

import json
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch.nn import functional

from examples.shared.flow import Prompted

HERE = Path(__file__).parent
BASE = HERE / "base.safetensors"
SIZE = 16
CELL = 32  # pixels of a picture in the sheet; a pixel of margin on each side
GROUP = 64  # weights to a scale
WIDTH = 64  # of a prompt
HELD_OUT = 200
EMPTY = torch.zeros(WIDTH)


class Emoji(NamedTuple):
    """One style's. names : of N emoji; pictures : float32 [N, 3, 16, 16] in [-1, 1]; prompts : float32 [N, 64]"""

    names: list[str]
    data: Prompted


def listed(folder: Path) -> list[dict]:
    """The emoji that both styles have, without flags, in the package's order."""
    found = json.loads((folder / "google/package/emoji.json").read_text())
    return [e for e in found if e["has_img_twitter"] and e["has_img_google"] and e["category"] != "Flags"]


def drawn(folder: Path, style: str, emoji: list[dict]) -> torch.Tensor:
    """float32 [N, 3, 16, 16] in [-1, 1] of a style's sheet, on white."""
    file = Image.open(folder / f"{style}/package/img/{style}/sheets/{CELL}.png").convert("RGBA")
    file = Image.alpha_composite(Image.new("RGBA", file.size, "white"), file)
    levels = torch.frombuffer(bytearray(file.tobytes()), dtype=torch.uint8).view(file.height, file.width, 4)
    sheet = levels[..., :3].permute(2, 0, 1).float() / 127.5 - 1
    places = [(1 + (CELL + 2) * e["sheet_y"], 1 + (CELL + 2) * e["sheet_x"]) for e in emoji]
    pictures = torch.stack([sheet[:, y : y + CELL, x : x + CELL] for y, x in places])
    return functional.avg_pool2d(pictures, CELL // SIZE)


def prompt(text: str) -> torch.Tensor:
    """float32 [64]: the sum of a fixed random vector for each word, over the root of their number."""
    words = text.lower().split()
    vectors = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(zlib.crc32(word.encode()))) for word in words]
    return torch.stack(vectors).sum(0) / len(words) ** 0.5


def split(folder: Path, style: str, held_out: int = HELD_OUT) -> tuple[Emoji, Emoji]:
    """(for training, held out), the same emoji in either style and in every run."""
    emoji = listed(folder)
    order = torch.randperm(len(emoji), generator=torch.Generator().manual_seed(0)).tolist()
    emoji = [emoji[i] for i in order]
    names = [f"{e['name']} {e['subcategory']} {e['category']}".lower() for e in emoji]
    pictures, prompts = drawn(folder, style, emoji), torch.stack([prompt(name) for name in names])
    count = len(emoji) - held_out
    return (
        Emoji(names[:count], Prompted(pictures[:count], prompts[:count])),
        Emoji(names[count:], Prompted(pictures[count:], prompts[count:])),
    )
