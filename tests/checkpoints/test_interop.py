"""Folders that qzo wrote, read by the tool whose format it is; the other tools: tests/interop/run.sh."""

import pytest
import torch

import qzo
from tests.support.checkpoints import relative_error, scale_randomly
from tests.support.paths import FIXTURES


@pytest.mark.parametrize("name", ["ct-w4a16-sym-g128-gptq", "ct-w4a16-sym-g64-bias-tied"])
def test_compressed_tensors_gives_our_logits(name, tmp_path):
    pytest.importorskip("compressed_tensors", reason="the compressed-tensors library is not installed")
    from transformers import AutoModelForCausalLM

    model = qzo.from_pretrained(FIXTURES / name, device="cpu")
    scale_randomly(model)
    qzo.save_pretrained(model, tmp_path / "out")
    saved = qzo.from_pretrained(tmp_path / "out", device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        want, got = saved(ids).logits, theirs(ids).logits
        source = qzo.from_pretrained(FIXTURES / name, device="cpu")(ids).logits
    assert relative_error(got, want) < 2e-5
    assert relative_error(source, want) > 1e-2  # the scales that moved are the ones that were read
