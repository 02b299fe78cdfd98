"""The format of the package ``speculators``, which vLLM serves: the layers in a nested config, a draft vocabulary as offsets."""

from pathlib import Path

import torch
from torch import Tensor

from dspark.draft.drafter import Drafter
from dspark.formats.build import Stored, refuse_unwritten, weights_of, written_layers
from dspark.formats.checkpoint import write_folder
from dspark.formats.layers import HARMLESS, HEADS, LAYERS, SIZES, SLIDING, Refusal, read_layers, refuse_unknown, refuse_unlike, take_shared
from dspark.target.target import Target

KINDS = ("dspark", "dflash")
KIND = KINDS[0]
FIELDS = {  # beside those of the heads
    *"speculators_model_type speculators_version speculators_config transformer_layer_config aux_hidden_state_layer_ids".split(),
    *"draft_vocab_size sample_from_anchor sliding_window_non_causal topk_context target_hidden_size verifier".split(),
}
OF_LAYERS = {*LAYERS, *HARMLESS, "is_causal", "dflash_query_causal"}
NOT_DRAFTING = ("verifier_norm.weight", "verifier_lm_head.weight")  # what the trainer reads of the target
SHARED = "block_size mask_token_id draft_vocab_size markov_rank markov_head_type enable_confidence_head".split()  # named alike there


def export_speculators(drafter: Drafter, target: Target, folder: str | Path) -> None:
    """Write a drafter as the package ``speculators`` saves it, whole or not at all; without calibration.

    Its own head goes along only for a reduced draft vocabulary, its embedding never: readers take the target's.
    Raises ValueError for a baseline, and where ``save_drafter`` does.
    """
    refuse_unwritten(drafter, "speculators' layout", target)
    shape, tensors = drafter.config, weights_of(drafter)
    if shape.draft_vocab_size < shape.vocab_size:
        d2t = drafter.d2t.cpu()
        tensors |= {"d2t": d2t - torch.arange(len(d2t)), "t2d": torch.zeros(shape.vocab_size, dtype=torch.bool).index_fill(0, d2t, True)}
        tensors["lm_head.weight"] = drafter.head_weight.to("cpu", torch.bfloat16, copy=True)
    layers = {name: getattr(shape, name) for name in (*SIZES, "head_dim", "rms_norm_eps")} | written_layers(shape)
    layers |= {"model_type": "qwen3", "use_sliding_window": False, "max_position_embeddings": target.max_context}
    proposal = {"proposal_type": "greedy", "speculative_tokens": shape.block_size}
    verifier = {"name_or_path": target.name, "architectures": target.config.architectures or [type(target.model).__name__]}
    config = {name: getattr(shape, name) for name in SHARED} | {
        "architectures": ["DSparkDraftModel"],
        "speculators_model_type": KIND,
        "speculators_config": {
            "algorithm": KIND,
            "proposal_methods": [proposal],
            "default_proposal_method": proposal["proposal_type"],
            "verifier": verifier,
        },
        "transformer_layer_config": layers,
        "aux_hidden_state_layer_ids": [i + 1 for i in shape.target_layer_ids],
        "sample_from_anchor": True,  # a reader that misses it may take it for false: another block convention
        "sliding_window_non_causal": False,
        "confidence_head_with_markov": shape.confidence_head_with_markov and shape.markov_rank > 0,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    write_folder(Path(folder), tensors, config)


def read(config: dict, tensors: dict[str, Tensor]) -> Stored:
    if (kind := config["speculators_model_type"]) not in KINDS:
        raise Refusal("speculators_model_type", f"speculators_model_type is {kind!r}, and only {', '.join(KINDS)} are supported")
    refuse_unknown(config, {*FIELDS, *HEADS, *HARMLESS})
    layers = config["transformer_layer_config"]
    refuse_unknown(layers, OF_LAYERS, "transformer_layer_config.")
    same_width = ("target_hidden_size", config.get("target_hidden_size"), layers.get("hidden_size"))
    refuse_unlike([("topk_context", config.get("topk_context") or None, None), same_width])
    heads = {"markov_rank": 0, "enable_confidence_head": False} if kind == "dflash" else {}
    first = config.get("sample_from_anchor", False)  # here a missing flag means False
    methods = (config.get("speculators_config") or {}).get("proposal_methods") or []
    most = max((method.get("speculative_tokens") or 0 for method in methods), default=0)
    if first is False and most >= config["block_size"]:  # one of them at the slot that this block convention leaves out
        found = f"sample_from_anchor is {config.get('sample_from_anchor')!r}, but speculators_config proposes {most} tokens"
        raise Refusal("sample_from_anchor", f"{found} from a block of {config['block_size']}: write sample_from_anchor explicitly")
    non_causal = config.get("sliding_window_non_causal")
    if non_causal is not None and type(non_causal) is not bool:
        raise Refusal("sliding_window_non_causal", f"sliding_window_non_causal is {non_causal!r}, not true or false")
    if rope := (layers.get("rope_parameters") or {}).get(SLIDING):  # where each kind of attention has one, all layers take this one
        layers = layers | {"rope_parameters": rope}
    values = {name: config.get(name, heads.get(name)) for name in HEADS} | read_layers(layers, non_causal=bool(non_causal))
    values |= {
        "target_layer_ids": [i - 1 for i in config["aux_hidden_state_layer_ids"]],  # here the embedding counts as 0
        "draft_vocab_size": config.get("draft_vocab_size"),
        "sample_from_anchor": first,
        "head_starts_at_anchor": not first and config.get("markov_head_type") == "rnn",
        "embedding_scale": 1.0,  # trained on the target's table as it is stored
    }
    for name in NOT_DRAFTING:
        tensors.pop(name, None)
    return Stored(f"speculators {kind}", values, tensors, **take_shared(config, tensors))
