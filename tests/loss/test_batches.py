"""What a batch may hold beside tokens and labels, and what is refused: losses are the model's own, or an error."""

import math

import pytest
import torch
import transformers
from torch.nn import functional

import qzo
from qzo.bench.families import small_model, spread

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
}
IDS = torch.arange(3, 15)[None] + torch.tensor([[0], [7]])
MASK = torch.ones_like(IDS)
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}
FEW = {**BATCH, "labels": IDS.masked_fill(torch.arange(12) > 3, -100)}
CHOICE = {
    "input_ids": IDS,
    "attention_mask": MASK,
    "option_ids": torch.tensor([[7, 9, 11]] * 2),
    "label": torch.tensor([2, 0]),
}
OPTIONS = {
    "input_ids": IDS.repeat(2, 1),
    "attention_mask": MASK.repeat(2, 1),
    "options": 2,
    "labels": IDS.repeat(2, 1).masked_fill(torch.arange(12) < 8, -100),
    "label": torch.tensor([0, 1]),
}


def make(name="LlamaForCausalLM", sizes=None, **changes):
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    return spread(cls(cls.config_class(**(sizes or SIZES) | changes))).eval()


def own(model, batch):
    with torch.no_grad():
        return model(**batch).loss


def assert_own(model, batch, wanted=None):
    """Of one evaluation and of two."""
    wanted = own(model, batch) if wanted is None else wanted
    got = torch.cat([qzo.losses(model, batch, 1), qzo.losses(model, batch, 2)])
    torch.testing.assert_close(got, wanted.expand(3), rtol=2e-5, atol=0)


# ---------------------------------------------------------------------------------------------- what passes through


@pytest.mark.parametrize("batch", [BATCH, FEW])
@pytest.mark.parametrize(
    "more",
    [
        {"logits_to_keep": 5},
        {"num_logits_to_keep": 5},
        {"return_dict": False},
        {"num_items_in_batch": torch.tensor(22)},
        {"use_cache": True},
    ],
)
def test_what_says_which_logits_are_given_or_how_is_not_for_a_batch_to_say(more, batch):
    model = make()
    assert_own(model, {**more, **batch}, own(model, batch))


def test_one_row_of_positions_serves_several():
    assert_own(make(), {**BATCH, "position_ids": torch.arange(2, 14)[None]})


def test_positions_of_several_axes_are_stacked_along_their_rows():
    """Qwen2-VL's [3, rows, tokens]; its patches stand before its tokens, and are no rows."""
    model = small_model("qwen2_vl", "Qwen2VLForConditionalGeneration")
    sight = model.config.vision_config
    ids = torch.arange(5, 17).repeat(2, 1)
    ids[:, 1], ids[:, 2] = model.config.vision_start_token_id, model.config.image_token_id
    patches = torch.randn(8, 3 * sight.temporal_patch_size * sight.patch_size**2)
    batch = {
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 2, 2]] * 2),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids,
        "mm_token_type_ids": (ids == ids[:, 2:3]).int(),
    }
    assert_own(model, batch)
    positions = torch.stack([torch.arange(12) * axis for axis in (1, 2, 3)])[:, None].repeat(1, 2, 1)
    positions[:, 1] += 3
    assert_own(model, {**batch, "position_ids": positions})


@pytest.mark.parametrize("attended", [MASK.bool(), MASK.float()])
def test_a_mask_of_any_dtype_says_where_a_row_ends(attended):
    attended[0, 9:] = 0
    model = make()
    with torch.no_grad():
        logits = model(IDS, attention_mask=attended).logits[[0, 1], [8, 11]].gather(1, CHOICE["option_ids"])
    wanted = functional.cross_entropy(logits, CHOICE["label"])
    torch.testing.assert_close(qzo.losses(model, {**CHOICE, "attention_mask": attended}, 2), wanted.expand(2))


def test_classes_that_are_no_label_count_as_nothing():
    model = make("LlamaForSequenceClassification", num_labels=3)
    for labels in ([2, -100], [-100, 1], [0, 2]):
        assert_own(model, {**BATCH, "labels": torch.tensor(labels)})


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("LlamaForCausalLM", {"attention_dropout": 0.5}),
        ("MixtralForCausalLM", {"num_local_experts": 4, "router_jitter_noise": 0.5}),
        ("LlamaForSequenceClassification", {"attention_dropout": 0.5}),
    ],
)
def test_dropout_is_off_in_every_mode(name, changes):
    """Two losses whose difference is the signal would differ by it."""
    model = make(name, **changes)
    batch = {**BATCH, "labels": torch.tensor([0, 1])} if "Classification" in name else BATCH
    wanted = own(model, batch)
    model.train()
    model.model.layers[0].eval()
    for _ in range(2):
        torch.testing.assert_close(qzo.losses(model, batch, 2), wanted.expand(2), rtol=1e-5, atol=0)
    assert [model.training, model.model.layers[0].training, model.model.layers[1].training] == [True, False, True]


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError])
def test_a_model_that_does_not_say_where_its_head_is(error, monkeypatch):
    model = make()

    def fails():
        raise error("no such thing here")

    monkeypatch.setattr(model, "get_output_embeddings", fails)
    with pytest.warns(UserWarning, match="it does not say which module its head is") as seen:
        assert_own(model, BATCH)
    assert len(seen) == 1


def test_a_head_that_is_part_of_what_makes_the_logits():
    """What stands beside it reads all positions, and the sum of both has no shape."""

    class Beside(torch.nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head, self.more = head, torch.nn.Linear(32, 64)

        def forward(self, states):
            return self.head(states) + self.more(states)

    model = make()
    inner = model.lm_head
    model.lm_head = Beside(inner)
    assert_own(model, BATCH)  # cut in front of both
    other = make()
    other.lm_head = model.lm_head
    other.get_output_embeddings = lambda: inner
    with pytest.warns(UserWarning, match="its forward fails where its head reads single positions"):
        assert_own(other, BATCH)


def test_a_forward_without_labels_is_compared_by_its_logits():
    class Bare(transformers.LlamaForCausalLM):
        def forward(self, input_ids, attention_mask=None):
            logits = super().forward(input_ids, attention_mask).logits
            return transformers.modeling_outputs.CausalLMOutput(logits=logits)

    torch.manual_seed(0)
    model = spread(Bare(transformers.LlamaConfig(**SIZES))).eval()
    with torch.no_grad():
        logits = model(IDS, MASK).logits[:, :-1]
    assert_own(model, BATCH, functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_loss_that_is_no_number_is_given_as_it_is(dtype):
    """It is the step that says so, and tries another."""
    model = make().to(dtype)
    model.lm_head.weight.data *= 1e6 if dtype == torch.float16 else float("nan")
    assert qzo.losses(model, BATCH, 1).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_a_model_rules_out_do_not_hide_what_it_reads(dtype):
    """Logits of -inf or the least number there is are no measure of the others."""
    for least in (-math.inf, torch.finfo(dtype).min):
        model = make("BertLMHeadModel", {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}).to(dtype)
        model.cls.predictions.decoder.bias.data[60:] = least
        with pytest.raises(ValueError, match="BertLMHeadModel reads text in both directions"):
            qzo.losses(model, BATCH, 1)


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": IDS[:, :8]}, r"labels \[2, 8\] do not fit \[2, 12\] tokens"),
        ({"labels": IDS.repeat(1, 2)}, r"labels \[2, 24\] do not fit \[2, 12\] tokens"),
        ({"labels": IDS[:1]}, r"labels \[1, 12\] do not fit \[2, 12\] tokens"),
        ({"labels": IDS.int()}, "labels are int32: .* int64"),
        ({"labels": None}, "labels are NoneType: expected an int64"),
        ({"labels": IDS.tolist()}, "labels are list: expected an int64 tensor"),
        ({"input_ids": IDS[0], "labels": IDS[0]}, r"input_ids are \[12\]: expected \[rows, tokens\]"),
        ({"input_ids": IDS[:0], "labels": IDS[:0]}, "the stacked batch has 0 rows, which 1 evaluations do not"),
        ({"labels": IDS + 60}, "the labels are 63 to 81, and LlamaForCausalLM has logits for 64 tokens"),
        ({"labels": IDS * 0 - 1}, "the labels are -1 to -1, .* -100 stands where there is no label"),
        ({"labels": torch.tensor([0, 1])}, r"LlamaForCausalLM is no classifier, .*: labels are \[rows, tokens\] for a"),
    ],
)
def test_labels_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        qzo.losses(make(), BATCH | change, 1)


@pytest.mark.parametrize(
    ("batch", "change", "message"),
    [
        (CHOICE, {"attention_mask": torch.zeros(2, 1, 12, 12)}, r"attention_mask \[2, 1, 12, 12\] does not say where"),
        (CHOICE, {"option_ids": torch.tensor([7, 9])}, r"option_ids \[2\] and label \[2\] do not fit 2 rows"),
        (CHOICE, {"label": torch.tensor([1])}, r"option_ids \[2, 3\] and label \[1\] do not fit 2 rows"),
        (CHOICE, {"option_ids": CHOICE["option_ids"] + 60}, "the labels are 67 to 71, and"),
        (CHOICE, {"label": torch.tensor([1, 3])}, r"label \[1, 3\] is not of 3 options, counted from 0"),
        (CHOICE, {"label": torch.tensor([1.0, 0.0])}, "label are float32"),
        (OPTIONS, {"options": 4}, r"labels of 4 rows are not those of label \[2\] times 4 options"),
        (OPTIONS, {"label": torch.tensor([0, 2])}, r"label \[0, 2\] is not of 2 options"),
        (OPTIONS, {"labels": IDS.repeat(2, 1).index_fill(0, torch.tensor([1]), -100)}, "an option has no token"),
    ],
)
def test_options_that_do_not_fit(batch, change, message):
    with pytest.raises(ValueError, match=message):
        qzo.losses(make(), batch | change, 1)


def test_options_without_the_right_one():
    with pytest.raises(ValueError, match="options are given without label"):
        qzo.losses(make(), {key: value for key, value in OPTIONS.items() if key != "label"}, 1)


@pytest.mark.parametrize(
    ("name", "batch", "message"),
    [
        ("LlamaForTokenClassification", {**BATCH, "labels": IDS % 3}, "has no language-model head: its logits are"),
        (
            "LlamaForSequenceClassification",
            {**BATCH, "labels": IDS % 3},
            r"gives a text logits of one row, \[3\], not one",
        ),
        ("LlamaForSequenceClassification", {**BATCH, "labels": torch.ones(2, 3)}, "labels are float32"),
        ("LlamaForSequenceClassification", {**BATCH, "labels": torch.ones(2)}, "labels are float32"),
        (
            "LlamaForSequenceClassification",
            {**BATCH, "labels": torch.tensor([[1], [2]])},
            r"labels \[2, 1\] do not fit",
        ),
        (
            "LlamaForSequenceClassification",
            {**BATCH, "labels": torch.tensor([0, 3])},
            "are 0 to 3, and .* for 3 classes",
        ),
        ("LlamaForSequenceClassification", CHOICE, r"gives a text logits of one row, \[3\]"),
    ],
)
def test_models_whose_labels_are_others(name, batch, message):
    with pytest.raises(ValueError, match=message):
        qzo.losses(make(name, num_labels=3), batch, 1)


def test_a_batch_without_tensors():
    with pytest.raises(ValueError, match="the batch holds no tensor of tokens"):
        qzo.losses(make(), {"use_cache": False}, 1)


def test_a_batch_that_is_no_mapping():
    with pytest.raises(ValueError, match="a batch is a mapping of tensors, got Tensor"):
        qzo.losses(make(), IDS, 1)  # type: ignore[arg-type]


def test_a_wrapper_is_named():
    with pytest.raises(ValueError, match=r"DataParallel has no config: .* give the module inside"):
        qzo.losses(torch.nn.DataParallel(make()), BATCH, 1)
