"""A sample of the families that bench/families.py compares, each with another way from hidden states to its loss."""

import json

import pytest

from qzo.bench import families
from tests.support.paths import ROOT

RESULTS = ROOT / "bench/results/families-2026-11-30.jsonl"
SAMPLE = [
    ("causal", "llama"),
    ("causal", "granite"),
    ("causal", "cohere"),
    ("causal", "gemma2"),
    ("causal", "falcon_h1"),
    ("causal", "hyperclovax"),
    ("causal", "recurrent_gemma"),
    ("causal", "modernbert-decoder"),
    ("causal", "roberta"),
    ("causal", "mpt"),
    ("causal", "inkling_text"),
    ("causal", "dory"),
    ("causal", "llama4_text"),
    ("causal", "xglm"),
    ("causal", "mamba"),
    ("causal", "mixtral"),
    ("encoder-decoder", "t5"),
    ("encoder-decoder", "bart"),
    ("classifier", "llama"),
    ("classifier", "bert"),
]
BUILT = {"causal": 0.9, "encoder-decoder": 0.8, "classifier": 0.8, "vision-language": 0.6}  # the rest wants images


def compared(kind, family):
    """The Found of a family; a skip where the transformers at hand is too old for it."""
    for listed in families.classes([kind], [family]):
        return families.compare(*listed)
    return pytest.skip(f"this transformers has no {family}")


@pytest.mark.parametrize(("kind", "family"), SAMPLE, ids=lambda part: part)
def test_the_loss_is_the_models_own(kind, family):
    found = compared(kind, family)
    assert found.outcome == "equal", found
    assert min(own for own, _ in found.losses.values()) != 0
    wanted = {
        "causal": {"plain", "two evaluations", "one position at a time", "options", "options of several tokens"},
        "encoder-decoder": {"plain", "two evaluations", "one position at a time"},
        "classifier": {"plain", "two evaluations"},
    }[kind]
    assert wanted <= set(found.losses)


def test_logits_that_depend_on_their_neighbours_are_taken_whole():
    found = compared("causal", "inkling2_text")
    assert found.outcome == "whole logits", found


@pytest.mark.parametrize("family", ["xlnet", "bart", "prophetnet"])
def test_another_objective_is_refused(family):
    found = compared("causal", family)
    assert found.outcome.startswith("refused: ")
    assert "it has another objective than qzo minimizes" in found.outcome


def test_the_results_have_no_silent_difference():
    head, *found = map(json.loads, RESULTS.read_text().splitlines())
    assert head["transformers"]
    counts = {kind: [line for line in found if line["kind"] == kind] for kind in families.KINDS}
    for kind, lines in counts.items():
        built = [line for line in lines if not line["outcome"].startswith("not built: ")]
        assert len(built) >= BUILT[kind] * len(lines), kind
        for line in built:
            assert line["outcome"].partition(":")[0] in ("equal", "whole logits", "refused"), line
            if not line["outcome"].startswith("refused"):
                assert all(abs(own - got) <= families.SAME * abs(own) for own, got in line["losses"].values()), line
