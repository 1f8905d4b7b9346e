"""Checkpoints in and out: one module per format, a reader to PackedWeight and a writer that changes only
scales.

A reader yields (Hugging Face tensor name, PackedWeight or dense tensor, where it came from); a writer copies
the source file and patches the bytes of scales that changed, so everything else is the source's own bytes.

A folder's module has METHOD, its quant_method, and
    check_config(quantization, where)       ValueError naming what it cannot read
    weights(folder, quantization, dtype)    yields what a reader yields
    weight_files(folder)                    the files that hold it
    save(folder, staging, find)             a copy with the scales of find(name of a weight)
    rounded(folder, find)                   yields (layer, scales, zeros or None) as `save` would write them
One that a model of another format can be exported to has also SCALES, the name of a layer's scales, and
    quantization_config(packed, ignore)         of a new folder; ValueError for what it cannot hold exactly
    entries(name, weight, quantization, dtype)  the tensors of a layer in its file
One whose layers transformers gathers, tensor by tensor, has
    PARTS                                   the names of a layer's tensors; the first is always there
    packer(quantization, where)             make(layer, {part: tensor}) -> PackedWeight
    changed_scales(folder, find)            yields (layer, scales as the file holds them, file, place)
"""

from . import aqlm, auto_round, awq, bnb, compressed_tensors, gptq, hqq

FOLDERS = {form.METHOD: form for form in (aqlm, auto_round, awq, bnb, compressed_tensors, gptq, hqq)}
GATHERED = {form.METHOD: form for form in (auto_round, awq, compressed_tensors, gptq)}
TARGETS = {form.METHOD: form for form in (awq, bnb, compressed_tensors, gptq)}


def of_method(method, where):
    """The module of a quant_method. ValueError naming what it is and what can be read."""
    if not isinstance(method, str) or method not in FOLDERS:
        raise ValueError(
            f"{where}: quant_method {method!r:.60} cannot be read; supported are "
            f"{', '.join(sorted(FOLDERS))}, GGUF files, and float checkpoints"
        )
    return FOLDERS[method]
