"""Is the loss that qzo takes the model's own, for every family that transformers can build small?

    python -m qzo.bench.families --out bench/results/families.jsonl          all, half an hour on two cores
    python -m qzo.bench.families granite falcon_h1 --kind causal             some

Each class is built from its config with the sizes below, random weights, and float32. Its own loss of a batch is
compared with `losses`: plain, two evaluations at once, the head's positions one at a time, options of one and of
several tokens, behind a shared prompt, packed rows, behind a frozen prefix. One JSON line a class: its outcome is
"equal", "whole logits" (equal, by the slower way), "refused: why", "not built: why", or what must not be: "differs" or
"fails".
"""

import argparse
import dataclasses
import gc
import itertools
import json
import math
import os
import sys
import warnings
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto import modeling_auto

from ..loss import head
from ..loss.losses import losses, model_inputs, pair
from ..training.data import IGNORED, Example, collate
from ..training.packing import packed_batch, why_not
from ..training.prefix import FrozenPrefix

SAME = 1e-5  # relative
MOST_PARAMETERS = 30_000_000
TOKENS = 12
VOCABULARY = 96
KINDS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "encoder-decoder": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "classifier": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "vision-language": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}
ERRORS = (
    ValueError,
    TypeError,
    RuntimeError,
    AttributeError,
    KeyError,
    IndexError,
    AssertionError,
    ImportError,
    NotImplementedError,
    ZeroDivisionError,
    StrictDataclassError,
)  # of a model that cannot be, or run so
SIZES = {
    32: "hidden_size d_model n_embd dim embed_dim embedding_size emb_dim backbone_hidden_size out_hidden_size "
    "lru_width projection_dim mamba_d_ssm hidden_size_global attention_hidden_size word_embed_proj_dim "
    "vision_output_dim "
    "projector_output_dim input_embedding_size output_embedding_size cross_attention_hidden_size "
    "embedding_dim mlp_dim adapter_out_dim encoder_hidden_size text_hidden_size audio_hidden_size",
    64: "intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner ffn_hidden_size dim_ff dff d_inner "
    "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size feed_forward_size "
    "intermediate_size_mlp dense_intermediate_size expert_ffn_hidden_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size max_position_embeddings n_positions n_ctx max_seq_len "
    "max_source_positions max_target_positions context_length",
    2: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers depth "
    "num_key_value_heads num_kv_heads num_experts_per_tok moe_topk num_query_groups n_recurrent_layers "
    "mamba_n_groups n_groups num_experts_per_token moe_k num_encoder_layers",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads linear_num_value_heads "
    "linear_num_key_heads swa_num_attention_heads index_n_heads mamba_dt_rank time_step_rank linear_num_heads",
    8: "head_dim kv_channels attention_head_dim dim_head d_kv d_head qk_nope_head_dim qk_rope_head_dim v_head_dim "
    "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_head mamba_head_dim mamba_headdim "
    "swa_head_dim "
    "attention_head_size mamba_d_state state_size ssm_state_size rotary_dim index_head_dim "
    "mamba_chunk_size chunk_size laurel_rank hidden_size_per_layer_input",
    16: "kv_lora_rank q_lora_rank o_lora_rank qk_head_dim sliding_window sliding_window_size index_topk "
    "attention_window_size window_size local_attention relative_attention_num_buckets",
    VOCABULARY: "vocab_size decoder_vocab_size vocab_size_per_layer_input ngram_vocab_size_base",
    1: "n_group topk_group n_shared_experts first_k_dense_replace",
    28: "image_size",
    14: "patch_size",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
TOKEN_IDS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "sep_token_id": 2,
    "cls_token_id": 1,
}
SPECIAL = VOCABULARY - 8  # ids of images and the like begin here
TRIES: tuple[dict, ...] = (
    {},
    {"num_hidden_layers": 4},
    {"num_key_value_heads": 4},
    {"head_dim": None},
    {"n_group": None},
    {"num_key_value_heads": 1, "num_hidden_layers": 3},
    {"hidden_size": 64},
    {"hidden_size": 128},
    {"qk_head_dim": None, "num_hidden_layers": 4, "num_key_value_heads": 4},
    {"patch_size": None, "image_size": None},
    {"hidden_size": 64, "head_dim": 32},
    {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 32},
)

OWN: dict[str, dict[str, Any]] = {  # what a family needs beside the sizes
    "bailing_hybrid": {"num_expert_group": 2},
    "bamba": {"mamba_d_head": 16},
    "granitemoehybrid": {"mamba_d_head": 16},
    "cohere_compass_text": {"num_hidden_layers": 4},
    "deepseek_v2": {"num_experts_per_tok": 2, "num_key_value_heads": 4, "head_dim": 8, "qk_head_dim": 16},
    "dory": {"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "inkling_text": {"swa_num_key_value_heads": 2},
    "inkling2_text": {"swa_num_key_value_heads": 2},
    "inkling2_loop_text": {"swa_num_key_value_heads": 2},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"]},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"]},
    "reformer": {"axial_pos_embds_dim": (8, 24), "axial_pos_shape": (8, 16), "is_decoder": True},
}

_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}  # of half a head
OWN |= {family: {"rope_parameters": _ROPE} for family in ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker")}
OWN |= {
    family: {"rope_parameters": _ROPE, "partial_rotary_factor": 1.0}
    for family in ("glm4v", "glm46v", "glm4v_moe", "glm_ocr", "glmga")
}


@dataclasses.dataclass
class Found:
    """One class and what came of it. losses: name of a way -> (the model's own, qzo's)."""

    kind: str
    family: str
    name: str
    outcome: str
    losses: dict = dataclasses.field(default_factory=dict)

    def line(self):
        """A JSON line."""
        shown = {way: [float(f"{own:.7g}"), float(f"{got:.7g}")] for way, (own, got) in self.losses.items()}
        return json.dumps(
            {"kind": self.kind, "family": self.family, "class": self.name, "outcome": self.outcome, "losses": shown}
        )


def classes(kinds=tuple(KINDS), families=()):
    """(kind, family, class name) of what transformers lists, of some families if they are named."""
    for kind in kinds:
        for family, names in getattr(modeling_auto, KINDS[kind]).items():
            if not families or family in families:
                yield kind, family, names[0] if isinstance(names, tuple) else names


# ---------------------------------------------------------------------------------------------- a small model


def small_config(family, changes=None, config_class=None):
    """The config of a family with its sizes small; changes: name -> another size, None for the family's own.

    config_class: another than the family's, such as that of its text model alone.
    """
    default = config_class() if config_class else AutoConfig.for_model(family)
    special, own = itertools.count(SPECIAL), OWN.get(family, {})
    wanted = {**SMALL, **TOKEN_IDS, **(changes or {})}

    def shrunk(config):
        values = {}
        for name, value in vars(config).items():
            if name in own and ("vocab_size" in vars(config) or name != "rope_parameters"):  # not a picture's
                values[name] = own[name]
            elif isinstance(value, PretrainedConfig):
                values[name] = shrunk(value)
            elif wanted.get(name) is not None and isinstance(value, int) and not isinstance(value, bool):
                exact = name in TOKEN_IDS or name in (changes or {})
                values[name] = wanted[name] if exact else min(value, wanted[name])
            elif name == "rope_parameters" and "mrope_section" in (value or {}):
                values[name] = {**value, "mrope_section": [2, 1, 1]}
            elif name.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= SPECIAL:
                values[name] = next(special)
        return type(config)(**values)

    return shrunk(default)


def small_model(family, name):
    """A model of the class, with random weights, or the reason (str) why none of the sizes tried gives one."""
    cls, reason = getattr(transformers, name, None), None
    if cls is None:
        return f"transformers has no {name} here"
    for changes in TRIES:
        try:
            config = small_config(family, changes, getattr(cls, "config_class", None))
            config.is_decoder = "CausalLM" in name or "LMHead" in name
            if getattr(config, "pad_token_id", 0) is None:
                config.pad_token_id = 0  # classifiers find a row's end by it
            if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
                config.decoder_start_token_id = 0  # as published configs of T5 have it
            with torch.device("meta"):
                count = sum(p.numel() for p in cls._from_config(config).parameters())
            if count > MOST_PARAMETERS:
                reason = reason or f"{count / 1e6:.0f} M parameters with every known size small"
                continue
            torch.manual_seed(0)
            model = cls._from_config(config).float().eval()
            ids, labels = some_tokens(model)
            output = own_output(model, ids, None if "SequenceClassification" in name else labels)
            if math.isfinite(float(output.logits.detach().sum())):
                return spread(model)
            reason = reason or "its logits are not finite"
        except ERRORS as error:
            reason = reason or f"{type(error).__name__}: {_line(error)}"
    return reason


def _line(error, most=120):
    return " ".join(str(error).split())[:most]


def spread(model):
    """Weights so large that losses tell models apart."""
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.dim() > 1 and not isinstance(module, nn.Conv1d | nn.Conv2d):
                    nn.init.normal_(parameter, std=0.1)
    return model


def some_tokens(model, rows=2):
    """(input_ids, labels) [rows, TOKENS]: labels a token's own, of an encoder-decoder model other tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, SPECIAL, (rows, TOKENS), generator=generator)
    ids[:, -1] = TOKEN_IDS["eos_token_id"]  # which BART's classifier reads at
    other = torch.randint(5, SPECIAL, (rows, TOKENS - 3), generator=generator)
    labels = other if head.has_encoder(model) else ids.clone()
    labels[:, :3] = IGNORED
    return ids, labels


def own_output(model, ids, labels=None):
    """The model's own forward, with its labels."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return head.forward(model, inputs if labels is None else {**inputs, "labels": labels})


# ---------------------------------------------------------------------------------------------- the comparison


def compare(kind, family, name):
    """The Found of a class."""
    model = small_model(family, name)
    if isinstance(model, str):
        return Found(kind, family, name, f"not built: {model}")
    try:
        return Found(kind, family, name, *(classifier_ways if kind == "classifier" else token_ways)(model))
    except ValueError as error:
        return Found(kind, family, name, f"refused: {_line(error, 200)}")
    except ERRORS as error:
        return Found(kind, family, name, f"fails: {type(error).__name__}: {_line(error)}")


def _verdict(model, ways):
    wrong = [way for way, (own, got) in ways.items() if not abs(own - got) <= SAME * abs(own)]
    if wrong:
        return f"differs: {', '.join(wrong)}", ways
    return "whole logits" if head.is_whole(model) else "equal", ways


@torch.no_grad()
def classifier_ways(model):
    """A classifier's own loss of two rows, and two evaluations' of them."""
    ids, _ = some_tokens(model)
    labels = torch.arange(2) % model.config.num_labels
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    own = float(own_output(model, ids, labels).loss)
    return _verdict(
        model,
        {"plain": (own, float(losses(model, batch, 1))), "two evaluations": (own, float(losses(model, batch, 2)[1]))},
    )


@torch.no_grad()
def token_ways(model):
    """(outcome, ways) of a model that gives logits for tokens."""
    ids, labels = some_tokens(model)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    output = own_output(model, ids, labels)
    own = float(output.loss)
    ways = {"plain": (own, float(losses(model, batch, 1))), "two evaluations": (own, float(losses(model, batch, 2)[1]))}
    before, head.LOGIT_BYTES = head.LOGIT_BYTES, 1
    try:
        ways["one position at a time"] = (own, float(losses(model, batch, 2)[1]))
    finally:
        head.LOGIT_BYTES = before
    if not head.has_encoder(model):
        ways |= option_ways(model, ids)
        ways |= packed_ways(model, ids)
        ways |= prefix_ways(model, batch, own)
    return _verdict(model, ways)


def option_ways(model, ids):
    """Options of one token behind each row, and of three or two: in rows of their own and behind a shared prompt."""
    choice, right = torch.tensor([[7, 9, 11]] * 2), torch.tensor([2, 0])
    last = own_output(model, ids).logits[:, -1].float().gather(1, choice)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "option_ids": choice, "label": right}
    ways = {"options": (float(functional.cross_entropy(last, right)), float(losses(model, batch, 2)[1]))}
    options = (7, 8, 9), (10, 11)
    examples = [Example(tuple(row.tolist()), options=options, label=0) for row in ids]
    scores = [own_score(model, torch.tensor(e.ids + option), len(e.ids)) for e in examples for option in options]
    own = functional.cross_entropy(torch.stack(scores).view(2, 2), torch.tensor([0, 0])).item()
    ways["options of several tokens"] = own, float(losses(model, collate(examples, 0), 2)[1])
    if not why_not(model, examples, 0):
        ways["a shared prompt"] = own, float(losses(model, packed_batch(examples, 0), 2)[1])
    return ways


def own_score(model, row, start):
    """The mean log-likelihood of row[start:] by the model's own logits."""
    log = own_output(model, row[None]).logits[0].float().log_softmax(-1)
    return log[start - 1 : -1].gather(1, row[start:, None]).mean()


def packed_ways(model, ids):
    """Two rows of unequal length in one without padding, where the model computes it."""
    examples = [Example(tuple(row.tolist()), labels=tuple(row.tolist())) for row in (ids[0], ids[1, :7])]
    if why_not(model, examples, 0):
        return {}
    each = [
        float(own_output(model, torch.tensor([e.ids]), torch.tensor([e.labels])).loss) * (len(e.ids) - 1)
        for e in examples
    ]
    own = sum(each) / sum(len(e.ids) - 1 for e in examples)
    return {"packed": (own, float(losses(model, pair(packed_batch(examples, 0, join=True), 2), 2)[1]))}


def prefix_ways(model, batch, own):
    """The first block frozen, where the model can begin at its second."""
    inputs = model_inputs(model, batch)
    try:
        prefix = FrozenPrefix(model, 1)
        prefix.check(inputs)
        states = prefix.states(inputs)
    except ERRORS:
        return {}
    with prefix.skipped(states):
        return {"behind a prefix": (own, float(losses(model, {**batch, "states": states}, 1)))}


def main(arguments=None):
    """Compare, print a line a class and write the file. Exit status 1 where a loss differs."""
    parser = argparse.ArgumentParser(prog="python -m qzo.bench.families", description=__doc__.partition("\n")[0])
    parser.add_argument("families", nargs="*", help="model types of transformers (default: all)")
    parser.add_argument("--kind", choices=KINDS, action="append", help="default: all four")
    parser.add_argument("--out", help="a JSONL file")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    outcomes: dict[str, int] = {}
    with open(options.out or os.devnull, "w", encoding="utf-8") as file, warnings.catch_warnings():
        print(json.dumps({"transformers": transformers.__version__, "torch": torch.__version__}), file=file, flush=True)
        warnings.simplefilter("ignore")
        for kind, family, name in classes(options.kind or tuple(KINDS), options.families):
            found = compare(kind, family, name)
            outcomes[found.outcome.partition(":")[0]] = outcomes.get(found.outcome.partition(":")[0], 0) + 1
            print(f"{kind:16} {family:24} {found.outcome}", flush=True)
            print(found.line(), file=file, flush=True)
            gc.collect()
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())))
    return int("differs" in outcomes or "fails" in outcomes)


if __name__ == "__main__":
    sys.exit(main())
