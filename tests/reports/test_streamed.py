"""What is predicted of an offloaded model is what its slots and its store hold."""

import json

import pytest

import qzo
from qzo.cli.main import main
from qzo.nn.streaming.copiers import STAGES
from qzo.reports.footprint import weights_bytes
from qzo.reports.memory_text import as_text
from qzo.reports.streamed import streamed_bytes
from tests.support import offloads


@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_slots_and_store_have_the_bytes_that_are_predicted(to, tmp_path):
    model = offloads.tower()
    before = weights_bytes(model, "cpu")
    predicted, beside = streamed_bytes(model, before, "cpu", to)
    offloaded = qzo.offload(model, to, folder=tmp_path)
    slots = sum(memory.nbytes for memory in offloaded._memory)
    head = model.head.codes.nbytes
    assert predicted["codes"] == pytest.approx(slots + head, abs=4096)
    assert predicted["zeros"] == pytest.approx(model.head.zeros.nbytes, abs=64)
    assert (predicted["scales"], predicted["dense"]) == (before["scales"], before["dense"])
    assert beside == ({"host": offloaded.store.nbytes} if to == "cpu" else {"host": 0, "disk": offloaded.store.nbytes})


def test_a_gpu_has_pinned_stages_for_a_file():
    model = offloads.tower()
    most = max(streamed_bytes(model, weights_bytes(model, "cuda"), "cuda", "cpu")[0]["codes"], 1)
    _, beside = streamed_bytes(model, weights_bytes(model, "cuda"), "cuda", "disk")
    assert 0 < beside["host"] <= STAGES * most
    assert beside["disk"] > beside["host"]


def test_the_command_predicts_device_and_host_and_measures_nothing(capsys):
    arguments = ["memory", "--config", "smollm2-135m", "--seq-len", "4", "--device", "cuda", "--json"]
    assert main(arguments) == 0
    whole = json.loads(capsys.readouterr().out)
    assert main([*arguments, "--offload", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    predicted = report["predicted"]
    assert report["measured"] is None
    blocks = 30
    assert predicted["codes"] == pytest.approx(whole["predicted"]["codes"] * 3 / blocks, rel=0.01)
    assert predicted["host"] == pytest.approx(whole["predicted"]["codes"], rel=0.01)
    saved = whole["predicted"]["codes"] - predicted["codes"]
    assert predicted["total"] == whole["predicted"]["total"] - saved
    assert "on the host" in as_text(report)
    assert main(["memory", "--config", "smollm2-135m", "--measure", "--offload", "cpu"]) == 2
    assert "--measure with --offload" in capsys.readouterr().err
