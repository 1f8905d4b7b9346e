"""What differs between flow-matching transformers of diffusers: how prompts are encoded, what their forward takes.

An encoded prompt is a dictionary {argument of the forward: tensor without the first dimension}.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from .schedulers import TIMES

Prompt = dict[str, torch.Tensor]


class Family(Protocol):
    """One class of transformers.

    longest : tokens that a prompt is cut and padded to where the user names no number
    needed : keys of the transformer's config that are whole numbers above 0, and have to be there
    """

    longest: int
    needed: tuple[str, ...]

    def patch(self, config: Mapping[str, Any]) -> int:
        """Latent pixels that become one token, along an edge."""
        ...

    def check(self, config: Mapping[str, Any], height: int, width: int) -> None:
        """ValueError for a latent [height, width] that the transformer has no positions for."""
        ...

    def encode(self, pipe: Any, text: str, device: torch.device, length: int) -> Prompt:
        """The encoded prompt, by diffusers' own pipeline."""
        ...

    def given(self, prompt: Prompt, empty: Prompt) -> dict[str, torch.Tensor]:
        """What the pipeline's call takes in the place of a text, the empty one for guidance."""
        ...

    def predict(self, model: Any, noisy: torch.Tensor, times: torch.Tensor, prompts: Mapping[str, Any]) -> torch.Tensor:
        """The predicted velocity [R, C, H, W] of rows at times float32 [R] in (0, 1), prompts stacked."""
        ...


class StableDiffusion3:
    """Stable Diffusion 3 and 3.5: CLIP and T5 side by side, learned positions."""

    longest = 256
    needed: tuple[str, ...] = ("patch_size", "in_channels", "pos_embed_max_size")

    def patch(self, config: Mapping[str, Any]) -> int:
        """As Family."""
        return config["patch_size"]

    def check(self, config: Mapping[str, Any], height: int, width: int) -> None:
        """As Family."""
        patch, most = config["patch_size"], config["pos_embed_max_size"]
        if max(height, width) // patch > most:
            raise ValueError(
                f"the transformer has {most} x {most} positions, and the picture {height // patch} x {width // patch}: "
                "give a lower --resolution"
            )

    def encode(self, pipe: Any, text: str, device: torch.device, length: int) -> Prompt:
        """As Family."""
        embeds, _, pooled, _ = pipe.encode_prompt(
            text, None, None, device=device, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return {"encoder_hidden_states": embeds[0], "pooled_projections": pooled[0]}

    def given(self, prompt: Prompt, empty: Prompt) -> dict[str, torch.Tensor]:
        """As Family."""
        return {
            f"{sign}{name}": said[key][None]
            for sign, said in (("", prompt), ("negative_", empty))
            for name, key in (
                ("prompt_embeds", "encoder_hidden_states"),
                ("pooled_prompt_embeds", "pooled_projections"),
            )
        }

    def predict(self, model: Any, noisy: torch.Tensor, times: torch.Tensor, prompts: Mapping[str, Any]) -> torch.Tensor:
        """As Family."""
        return model(hidden_states=noisy, timestep=TIMES * times, **prompts, return_dict=False)[0]


FAMILIES: dict[str, Family] = {"SD3Transformer2DModel": StableDiffusion3()}
_OTHERS = {
    "PixArtTransformer2DModel": "PixArt predicts the noise of a DDPM schedule",
    "DiTTransformer2DModel": "DiT predicts the noise of a DDPM schedule",
    "HunyuanDiT2DModel": "Hunyuan-DiT predicts the v of a DDPM schedule",
    "UNet2DConditionModel": "U-Nets of Stable Diffusion 1, 2 and XL predict the noise of a DDPM schedule",
}


def family_of(name: object, where: object) -> Family:
    """The Family of a transformer's class. ValueError, with the reason, for one that is not trained here."""
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    known = ", ".join(FAMILIES)
    if isinstance(name, str) and name in _OTHERS:
        raise ValueError(
            f"{where}: {_OTHERS[name]}, and flow matching would teach it another target; trained are {known}"
        )
    raise ValueError(f"{where}: a {name!r:.60} is not known; trained are {known}")
