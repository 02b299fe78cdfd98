"""``model.generate(**inputs, custom_generate=dspark_generate, drafter=…, policy=…)``: our loop inside transformers' own call.

Everything that the call asks for is kept exactly (length, end-of-text tokens, stopping criteria, temperature, top-k, top-p, PyTorch's
global generator) or refused in one sentence. Two things do not get here, as transformers keeps them to itself: ``streamer`` (pass
``token_streamer``) and ``stop_strings`` (pass ``stopping_criteria=[StopStringCriteria(tokenizer, [...])]``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from dspark.decode import DraftSource, Round, checked_policy, rounds
from dspark.draft.lookup import ContextLookup
from dspark.schedule import Policy
from dspark.target.families import attention_layers
from dspark.target.target import Target
from dspark.verify.sampling import Rng, Sampling

WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)  # in the order in which Sampling applies them
PREPARED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}  # by generate itself


def dspark_generate(
    model: nn.Module,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    drafter: DraftSource | None = None,
    policy: Policy | None = None,
    token_streamer: BaseStreamer | None = None,
    on_round: Callable[[Round], None] | None = None,
    **model_kwargs: object,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Pass it as ``custom_generate``. Returns what ``generate`` returns: prompt and new tokens [1, length].

    drafter: attached to this very model (``load_drafter(…, Target(model, tokenizer, name))``); None copies from the context, which
    needs nothing trained · policy: default the whole block · token_streamer: like ``streamer``, which transformers does not hand on
    and of which it writes the prompt alone, so that who reads it waits for ever ·
    on_round: called with every :class:`~dspark.decode.Round` as it is finished. A bfloat16 model on a CPU verifies blocks slowly
    unless it is packed first, in place: ``pack_target(Target(model, tokenizer, name))``.
    Raises ValueError for what cannot be kept exactly: more than one sequence, padding, beams, other logits processors, scores, a
    filled cache, inputs that are no token ids, models that keep more than keys and values, texts beyond a switch of LongRoPE.
    """
    _check(model, input_ids, generation_config, model_kwargs)
    ends = [c for c in stopping_criteria if isinstance(c, EosTokenCriteria)]
    target = _Borrowed(model, (token for c in ends for token in c.eos_token_id.tolist()))
    source = ContextLookup(None, target=target) if drafter is None else drafter
    _check_attached(source, target)
    policy = checked_policy(policy, source)
    sampling = _sampling(logits_processor, generation_config.do_sample)
    prompt = input_ids[0].tolist()
    lengths = [c for c in stopping_criteria if isinstance(c, MaxLengthCriteria)]
    limit = min([generation_config.max_length, *(c.max_length for c in lengths)]) - len(prompt)
    if len(prompt) + limit > target.steady_context:
        reach = f"up to {target.steady_context} tokens, where its positions change"
        raise ValueError(f"{target.name} can be decoded {reach}: ask for {max(0, target.steady_context - len(prompt))} new tokens at most")
    criteria = StoppingCriteriaList(c for c in stopping_criteria if c not in ends and c not in lengths)

    text = input_ids
    if token_streamer:
        token_streamer.put(input_ids[0].cpu())
    for r in rounds(target, source, prompt, limit, policy, sampling, Rng()):
        longer = torch.cat([text, torch.tensor([r.committed], device=text.device)], 1)
        end = _end(criteria, longer, text.shape[1])
        stopped, before, text = end is not None, text.shape[1], longer[:, :end]
        if token_streamer:
            token_streamer.put(text[0, before:].cpu())
        if on_round:
            on_round(r)
        if stopped:
            break
    if token_streamer:
        token_streamer.end()
    return GenerateDecoderOnlyOutput(sequences=text) if generation_config.return_dict_in_generate else text


class _Borrowed(Target):
    """Somebody else's model as a target: nothing about it is changed, and the call says which tokens end the text."""

    def __init__(self, model: nn.Module, eos_token_ids: Iterable[int]) -> None:
        trainable = [weight for weight in model.parameters() if weight.requires_grad]
        super().__init__(model, None, type(model).__name__)
        for weight in trainable:
            weight.requires_grad_(True)
        self.eos_token_ids = frozenset(eos_token_ids)


def _end(criteria: StoppingCriteriaList, text: Tensor, before: int) -> int | None:
    """Where the criteria end a text [1, n] whose tokens from ``before`` on are new; None: they do not. Asked after each token, as
    ``generate`` does; the two that the loop itself obeys are not among them."""
    return next((n for n in range(before + 1, text.shape[1] + 1) if bool(criteria(text[:, :n], None).all())), None) if criteria else None


def _sampling(processors: LogitsProcessorList, do_sample: bool) -> Sampling:
    """What the list of transformers' warpers does to the logits. Raises ValueError for any other list."""
    kinds = [type(p) for p in processors]
    wrong = [kind for kind in kinds if kind not in WARPERS or not do_sample]
    if wrong:
        raise ValueError(f"{wrong[0].__name__} reads or bends what dspark keeps exact: only temperature, top_k and top_p are supported")
    if kinds != [kind for kind in WARPERS if kind in kinds]:
        raise ValueError(f"{[k.__name__ for k in kinds]} are not in the order temperature, top_k, top_p: pass the numbers to generate")
    if any(getattr(p, "filter_value", -torch.inf) != -torch.inf or getattr(p, "min_tokens_to_keep", 1) != 1 for p in processors):
        raise ValueError("warpers with a filter_value or min_tokens_to_keep of their own are not supported: leave both at their defaults")
    found = dict(zip(kinds, processors, strict=True))
    if not do_sample:
        return Sampling()
    return Sampling(
        getattr(found.get(TemperatureLogitsWarper), "temperature", 1.0),
        getattr(found.get(TopKLogitsWarper), "top_k", 0),
        getattr(found.get(TopPLogitsWarper), "top_p", 1.0),
    )


def _check(model: nn.Module, input_ids: Tensor, config: GenerationConfig, kwargs: dict[str, object]) -> None:
    """Raises ValueError for the first thing that the loop would not keep."""
    mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
    others = sorted(name for name, value in kwargs.items() if value is not None and not _is_empty(value) and name not in PREPARED)
    kept = [name for name in ("scores", "logits", "attentions", "hidden_states") if getattr(config, f"output_{name}", None)]
    mode = config.get_generation_mode().value
    refused = {
        f"generate was asked for {mode}: dspark does greedy_search and sample": mode not in ("greedy_search", "sample"),
        f"got {input_ids.shape[0]} sequences: dspark decodes one at a time, loop over them": input_ids.shape[0] != 1,
        "the prompt is empty: pass input_ids": input_ids.shape[1] == 0,
        "the prompt is padded: pass it without padding": mask is not None and not bool(torch.as_tensor(mask == 1).all()),
        "position_ids are not 0, 1, 2, …: dspark counts positions itself": _moved(kwargs.get("position_ids"), input_ids.shape[1]),
        "past_key_values already holds tokens: dspark keeps a cache of its own": cache is not None and cache.get_seq_length() > 0,
        f"logits_to_keep is {kwargs.get('logits_to_keep')}: dspark chooses itself": kwargs.get("logits_to_keep") not in (None, 0, 1),
        f"{', '.join(others)} cannot be passed on: dspark decodes text from token ids alone": bool(others),
        f"{', '.join(kept)} cannot be returned: dspark returns the tokens alone": bool(kept and config.return_dict_in_generate),
        "the model is in training mode, where dropout would bend its law: call model.eval() first": model.training,
    }
    attention_layers(model)
    for reason, applies in refused.items():
        if applies:
            raise ValueError(reason)


def _is_empty(value: object) -> bool:
    """What transformers hands to models that also see, when they are shown nothing."""
    return isinstance(value, dict) and not value


def _moved(position_ids: object, length: int) -> bool:
    """Whether they are other positions than 0 … length − 1, of which generate itself passes one row or several."""
    if position_ids is None:
        return False
    given = torch.as_tensor(position_ids)
    return given.shape[-1:] != (length,) or bool((given != torch.arange(length, device=given.device)).any())


def _check_attached(source: DraftSource, target: Target) -> None:
    drafter = getattr(source, "drafter", source)
    embed = getattr(drafter, "embed", None)
    if embed is not None and embed is not target.embedding:
        raise ValueError("the drafter is attached to another model: load_drafter(…, target) with a Target made of this very model")
