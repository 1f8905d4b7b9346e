"""The benchmark of generation, on a tiny model: what it compares is the same model."""

import json

import pytest
import torch

import qzo
from qzo.bench import generation
from tests.support import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("llama"), hidden=128)


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_row_for_each_way_to_run_the_model(folder, capsys):
    generation.main(["--model", str(folder), "--tokens", "5", "--repeats", "1", "--json"])
    rows = {row["provider"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert tuple(rows) == generation.PROVIDERS
    assert all(row["same_tokens_as_dense"] == row["tokens"] == 5 for row in rows.values())
    assert rows[generation.DENSE]["over_dense"] == 1.0
    weights = [rows[name]["weight_bytes"] for name in ("qzo", "qzo generating", "dense float32")]
    assert weights == sorted(weights), weights
    assert all(row["tokens_per_second"] > 0 and row["tokens_per_cpu_second"] > 0 for row in rows.values())


def test_the_dense_copy_has_the_weights(folder):
    model = qzo.from_pretrained(folder)
    dense = generation.dense_copy(model)
    assert not [m for m in dense.modules() if isinstance(m, qzo.QZOLinear)]
    layer = model.model.layers[1].mlp.down_proj
    assert torch.equal(dense.model.layers[1].mlp.down_proj.weight, layer.dequantize())
    assert isinstance(model.model.layers[1].mlp.down_proj, qzo.QZOLinear)
