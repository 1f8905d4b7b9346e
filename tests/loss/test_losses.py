"""Losses of stacked batches against the model's own full logits."""

import pytest
import torch
from torch.nn import functional

import qzo
from qzo.loss.losses import Stacked, option_scores
from tests.support import tiny
from tests.support.attention import key_heads


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    base = tiny.save_checkpoint(tmp_path_factory.mktemp("m"), key_heads=key_heads())
    return qzo.from_pretrained(base, group_size=64, device="cpu")


def batch_of(labels=True):
    torch.manual_seed(1)
    ids = torch.randint(3, 20, (4, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    if not labels:
        return {"input_ids": ids, "attention_mask": mask}
    wanted = ids.clone()
    wanted[:, :3] = -100
    wanted[1, 5:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": wanted}


def full_logits(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()


def test_labels(model):
    batch = batch_of()
    logits = full_logits(model, batch)
    want = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    got = qzo.losses(model, batch, 3)
    assert got.dtype == torch.float32
    assert torch.allclose(got, want.expand(3), rtol=1e-5)
    assert torch.equal(qzo.losses(model, qzo.pair(batch, 3), 3), got)


def test_each_evaluation_has_its_own_loss(model):
    batch = batch_of()
    with qzo.evaluating(model, qzo.Evaluations([1, 1, 2], [0.3, -0.3, 0.0])):
        got = qzo.losses(model, batch, 3)
    for e, coef in enumerate((0.3, -0.3)):
        with qzo.evaluating(model, qzo.Evaluations([1], [coef])):
            assert torch.allclose(qzo.losses(model, batch, 1), got[e : e + 1], rtol=1e-5)
    assert torch.allclose(qzo.losses(model, batch, 1), got[2:], rtol=1e-5)
    assert len(set(got.tolist())) == 3


def test_options_of_one_token(model):
    batch = {**batch_of(labels=False), "option_ids": torch.tensor([[4, 5, 9]] * 4), "label": torch.tensor([0, 2, 1, 0])}
    logits = full_logits(model, batch)
    last = batch["attention_mask"].sum(1) - 1
    want = functional.cross_entropy(logits[torch.arange(4), last][:, [4, 5, 9]], batch["label"])
    assert torch.allclose(qzo.losses(model, batch, 2), want.expand(2), rtol=1e-5)


def test_options_of_several_tokens(model):
    batch = {**batch_of(), "options": 2, "label": torch.tensor([1, 0])}
    log_p = full_logits(model, batch).log_softmax(-1)[:, :-1]
    target = batch["labels"][:, 1:]
    each = log_p.gather(2, target.clamp(min=0).unsqueeze(2)).squeeze(2) * (target != -100)
    scores = (each.sum(1) / (target != -100).sum(1)).view(2, 2)
    assert torch.allclose(option_scores(model, Stacked(batch)), scores, rtol=1e-5)
    want = functional.cross_entropy(scores, batch["label"])
    assert torch.allclose(qzo.losses(model, batch, 2), want.expand(2), rtol=1e-5)


def test_the_head_sees_labelled_rows_only(model):
    batch, seen = batch_of(), []
    qzo.losses(model, batch, 2)  # the model's first batch is compared with its own logits
    handle = model.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.append(out[..., 0].numel()))
    try:
        qzo.losses(model, batch, 2)
    finally:
        handle.remove()
    assert sum(seen) == 2 * int((batch["labels"][:, 1:] != -100).sum())


def test_bad_batches(model):
    with pytest.raises(ValueError, match="has no labels"):
        qzo.losses(model, batch_of(labels=False), 2)
    with pytest.raises(ValueError, match="12 rows, which 5 evaluations do not divide"):
        qzo.losses(model, qzo.pair(batch_of(), 3), 5)
    with pytest.raises(ValueError, match="every entry of labels is -100"):
        qzo.losses(model, {**batch_of(), "labels": torch.full((4, 7), -100)}, 1)
    with pytest.raises(ValueError, match="copies=0"):
        qzo.pair(torch.ones(2), 0)


def test_pair():
    stacked = qzo.pair({"x": torch.tensor([[1], [2]]), "n": 3, "t": (torch.ones(1), "a")}, 2)
    assert stacked["x"].flatten().tolist() == [1, 2, 1, 2]
    assert stacked["n"] == 3
    assert stacked["t"][0].shape == (2,)


@pytest.mark.parametrize("kind", ["labels", "options", "static"])
def test_sums_of_parts_are_those_of_the_whole_bit_for_bit(model, kind):
    """In any parts and order, at the width of the whole: their rows have the same bits on a CPU, and sums are exact."""
    batch = batch_of(labels=kind != "options")
    if kind == "options":
        batch |= {"option_ids": torch.tensor([[4, 5, 9]] * 4), "label": torch.tensor([0, 2, 1, 0])}
    batch = qzo.static_batch(batch) if kind == "static" else batch

    def sums(rows):
        part = {key: value[rows] if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        with qzo.evaluating(model, qzo.Evaluations([1, 1], [0.3, -0.3])):
            return qzo.loss_sums(model, part, 2)

    whole = sums([0, 1, 2, 3])
    assert whole.dtype == torch.float64
    assert whole[:, 1].tolist() == {"options": [4, 4]}.get(kind, [14, 14])
    assert torch.equal(sums([3]) + sums([1, 2]) + sums([0]), whole)
    with qzo.evaluating(model, qzo.Evaluations([1, 1], [0.3, -0.3])):
        assert torch.equal(qzo.losses(model, batch, 2), (whole[:, 0] / whole[:, 1]).float())
