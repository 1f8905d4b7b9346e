"""A GGUF file of a tiny Stable Diffusion 3 transformer, under Stability's own names."""

import gguf
import numpy as np
import torch

from qzo.checkpoints.formats import gguf_sd3

FLOATS = gguf.GGMLQuantizationType.F32


def stability_tensors(state):
    """{Stability's name: tensor} of diffusers' state_dict, by the formulas of diffusers' own converter, undone."""
    blocks = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))
    found = {}
    for old, new in gguf_sd3._TOP.items():
        if new in state:
            found[old] = state[new]
            continue
        for leaf in ("weight", "bias"):
            value = state[f"{new}.{leaf}"]
            found[f"{old}.{leaf}"] = _other_half_first(value) if old.startswith("final_layer.ada") else value
    for i in range(blocks):
        for old, parts in gguf_sd3._BLOCK.items():
            for leaf in ("weight", "bias"):
                names = [f"transformer_blocks.{i}.{part}.{leaf}" for part in parts]
                if names[0] not in state:
                    continue
                value = torch.cat([state[name] for name in names])
                last = i == blocks - 1 and old == "context_block.adaLN_modulation.1"
                found[f"joint_blocks.{i}.{old}.{leaf}"] = _other_half_first(value) if last else value
    return found


def _other_half_first(value):
    return torch.cat(value.chunk(2)[::-1])


def write(path, model, kind="Q4_0", architecture="sd3"):
    """Linears in blocks of this kind, the rest in float32."""
    writer = gguf.GGUFWriter(path, architecture)
    quantized = gguf.GGMLQuantizationType[kind]
    for name, value in stability_tensors(model.state_dict()).items():
        array = value.detach().numpy().astype(np.float32)
        if name.endswith("weight") and array.ndim == 2:
            data = gguf.quants.quantize(array, quantized)
            writer.add_tensor(name, data, raw_dtype=quantized)
        else:
            writer.add_tensor(name, array, raw_dtype=FLOATS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
