"""AQLM's form of float weights, fitted by residual k-means, and folders in its layout; shares nothing with the package.

    W[n, 8j : 8j + 8] ~ scales[n] * sum over c of codebooks[c, codes[n, j, c]]          (arXiv 2401.06118)

Without the paper's calibration: the error of the weights is lowered, not that of what the layers give.
"""

import json

import torch
from safetensors.torch import save_file

GROUP = 8  # weights along K that one code of each codebook stands for
SAMPLE = 1 << 14  # vectors that k-means sees: 64 for each of 256 entries
ITERATIONS = 8  # of k-means; the rounds after it see all vectors
CHUNK = 1 << 12  # vectors whose distances are held at once: 4 MB for 256 entries


def fit(weight, books=2, bits=8, rounds=3, seed=0):
    """Fit to a float matrix [N, K]: (codes int64 [N, K/8, books], codebooks float32 [books, 2^bits, 8], scales float32
    [N]).

    A scale is the RMS of its row. Each codebook is fitted by k-means to what those before it leave of the normalized
    rows; then, `rounds` times and one codebook after another, each entry becomes the mean of what the others leave to
    those who chose it, and all choose anew: no step raises the error. The same seed gives the same bits.
    ValueError for K that 8 does not divide and for fewer vectors than entries.
    """
    n, k = weight.shape
    entries = 1 << bits
    if k % GROUP or n * k // GROUP < entries:
        raise ValueError(
            f"a weight [{n}, {k}] has no {entries} or more vectors of {GROUP}; give larger rows or fewer bits"
        )
    generator = torch.Generator().manual_seed(seed)
    scales = weight.float().square().mean(1).sqrt()
    rest = (weight.float() / torch.where(scales == 0, 1.0, scales)[:, None]).reshape(-1, GROUP)
    codes, codebooks = [], []
    for _ in range(books):
        book = _k_means(rest, entries, generator)
        codebooks.append(book)
        codes.append(_nearest(rest, book))
        rest = rest - book[codes[-1]]
    for _ in range(rounds):
        for c in range(books):
            wanted = rest + codebooks[c][codes[c]]
            codebooks[c] = _means(wanted, codes[c], codebooks[c])
            codes[c] = _nearest(wanted, codebooks[c])
            rest = wanted - codebooks[c][codes[c]]
    return torch.stack(codes, 1).view(n, k // GROUP, books), torch.stack(codebooks), scales


def decode(codes, codebooks, scales):
    """float32 [N, K] of what `fit` returns."""
    vectors = sum(book[codes[..., c]] for c, book in enumerate(codebooks.float()))
    return vectors.flatten(1) * scales.float()[:, None]


def write_folder(folder, config, tensors, chosen, *, books=2, bits=8, rounds=3, seed=0, dtype=torch.float16):
    """A checkpoint in AQLM's layout; returns {name of a fitted Linear: float32 [N, K] that the files hold of it}.

    config: dict, the model's config.json; tensors: {name: float tensor}, all of them
    chosen: names of the Linears that are fitted; other matrices of blocks are listed as not quantized
    dtype: of all floats in the file
    """
    made, held = {name: t.to(dtype) for name, t in tensors.items()}, {}
    for name in chosen:
        codes, codebooks, scales = fit(made.pop(f"{name}.weight"), books, bits, rounds, seed)
        codebooks, scales = codebooks.to(dtype), scales.to(dtype)
        held[name] = decode(codes, codebooks, scales)
        signed = torch.where(codes < 1 << (bits - 1), codes, codes - (1 << bits))
        made |= {
            f"{name}.codes": signed.to(torch.int8 if bits <= 8 else torch.int16),
            f"{name}.codebooks": codebooks[:, :, None],
            f"{name}.scales": scales[:, None, None, None],
        }
    dense = [name.removesuffix(".weight") for name in made if name.endswith("_proj.weight")]
    quantization = {
        "quant_method": "aqlm",
        "in_group_size": GROUP,
        "out_group_size": 1,
        "num_codebooks": books,
        "nbits_per_codebook": bits,
        "linear_weights_not_to_quantize": ["lm_head", *dense],
    }
    folder.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in made.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps(config | {"dtype": str(dtype).removeprefix("torch."), "quantization_config": quantization})
    )
    return held


def _k_means(vectors, entries, generator):
    """Entries [entries, 8]; an entry that nobody chooses stays where it is."""
    sample = vectors[torch.randperm(len(vectors), generator=generator)[: max(SAMPLE, entries)]]
    book = sample[:entries].clone()
    for _ in range(ITERATIONS):
        book = _means(sample, _nearest(sample, book), book)
    return book


def _means(vectors, codes, book):
    total = torch.zeros_like(book).index_add_(0, codes, vectors)
    count = torch.bincount(codes, minlength=len(book))[:, None]
    return torch.where(count > 0, total / count.clamp(min=1), book)


def _nearest(vectors, book):
    """int64 [vectors]: the nearest entry; |v|^2 is the same for all of them."""
    norms, sides = book.square().sum(1), book.T.contiguous()
    return torch.cat([torch.addmm(norms, part, sides, alpha=-2).argmin(1) for part in vectors.split(CHUNK)])
