"""``model.generate(**inputs, custom_generate=dspark_generate, drafter=…, policy=…)``: our loop inside transformers' own call.

Everything that the call asks for is done exactly (length, end-of-text tokens, stopping criteria, logit processors, PyTorch's global
generator) or refused in one sentence. Two arguments never reach a custom loop: instead of ``streamer`` pass ``on_round``, and
instead of ``stop_strings`` pass ``stopping_criteria=[StopStringCriteria(tokenizer, [...])]``.
"""

from collections.abc import Callable

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

from dspark.decode import rounds
from dspark.draft.lookup import ContextLookup
from dspark.draft.source import DraftSource
from dspark.engine import Engine
from dspark.request import Request
from dspark.round import Round
from dspark.schedule import Policy
from dspark.target.families import checked_layers
from dspark.target.target import Target
from dspark.verify.processors import LAST, Processors
from dspark.verify.sampling import Rng, Sampling

# Warper → its number in Sampling, which applies them in this order; in another order they are processors.
WARPERS = {TemperatureLogitsWarper: "temperature", TopKLogitsWarper: "top_k", TopPLogitsWarper: "top_p"}
PREPARED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}  # by generate itself


def dspark_generate(
    model: nn.Module,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    drafter: DraftSource | None = None,
    policy: Policy | None = None,
    on_round: Callable[[Round], None] | None = None,
    **model_kwargs: object,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Pass it as ``custom_generate``. Returns what ``generate`` returns: prompt and new tokens [1, length].

    drafter: attached to this very model (``load_drafter(…, Target(model, tokenizer, name))``); None copies from the context, which
        needs no training.
    policy: None to copy and draft where that pays on this machine, which takes some seconds to measure once.
    on_round: called with every :class:`~dspark.round.Round` when it is finished; ``generate`` does not pass its ``streamer`` on.
    Raises ValueError for what cannot be done exactly: more than one sequence, padding, beams, watermarks, guidance, scores, a filled cache,
    inputs other than token ids, models that keep more than keys and values, texts too long for LongRoPE's short factors.

    A bfloat16 model on a CPU verifies blocks slowly unless it is given a faster pass first, which stays with the model:
    ``pack_target(Target(model, tokenizer, name))`` of :mod:`dspark.cpu`.
    """
    _check(model, input_ids, generation_config, model_kwargs)
    ends = [c for c in stopping_criteria if isinstance(c, EosTokenCriteria)]
    target = _Borrowed(model)
    source = ContextLookup(None, target=target) if drafter is None else drafter
    sampling, processors = _sampling(logits_processor, generation_config.do_sample)
    prompt = input_ids[0].tolist()
    lengths = [c for c in stopping_criteria if isinstance(c, MaxLengthCriteria)]
    limit = min([generation_config.max_length, *(c.max_length for c in lengths)]) - len(prompt)
    if len(prompt) + limit > target.steady_context:
        reach = f"up to {target.steady_context} tokens, where its positions change"
        raise ValueError(f"{target.name} can be decoded {reach}: ask for {target.steady_context - len(prompt)} new tokens at most")
    criteria = StoppingCriteriaList(c for c in stopping_criteria if c not in ends and c not in lengths)

    engine, end_ids = Engine(target, source, policy), frozenset(token for c in ends for token in c.eos_token_id.tolist())
    request = Request(prompt=prompt, limit=limit, sampling=sampling, rng=Rng(), end_ids=end_ids, processors=processors)
    text = input_ids
    for r in rounds(engine, engine.enqueue(request)):
        before, longer = text.shape[1], torch.cat([text, torch.tensor([r.committed], device=text.device)], 1)
        end = _end(criteria, longer, before)
        text = longer[:, :end]
        if on_round:
            on_round(r)
        if end is not None:
            break
    return GenerateDecoderOnlyOutput(sequences=text) if generation_config.return_dict_in_generate else text


class _Borrowed(Target):
    """The caller's model as a target: its ``requires_grad`` flags stay."""

    def __init__(self, model: nn.Module) -> None:
        trainable = [weight for weight in model.parameters() if weight.requires_grad]
        super().__init__(model, None, type(model).__name__)
        for weight in trainable:
            weight.requires_grad_(True)


def _end(criteria: StoppingCriteriaList, text: Tensor, before: int) -> int | None:
    """The length at which the criteria end the text [1, n], checked after each token from ``before`` on; None if they do not."""
    lengths = range(before + 1, text.shape[1] + 1) if criteria else ()
    return next((n for n in lengths if bool(criteria(text[:, :n], None).all())), None)


def _sampling(processors: LogitsProcessorList, do_sample: bool) -> tuple[Sampling, Processors | None]:
    """The same distribution as numbers for temperature, top-k and top-p, which the drafter sees too, and what comes before and after them.

    Raises ValueError for processors that are not supported.
    """
    n = len(processors) if do_sample else 0
    while n and isinstance(processors[n - 1], LAST):
        n -= 1
    start, numbers = n, {}
    for kind, name in reversed(WARPERS.items()):
        if do_sample and start and type(processors[start - 1]) is kind and _is_usual(processors[start - 1]):
            start -= 1
            numbers[name] = getattr(processors[start], name)
    first, last = (processors[:start], processors[n:]) if do_sample else (processors, [])
    sampling = Sampling(**{"temperature": 1.0 if do_sample else 0.0} | numbers)
    return sampling, Processors(first, last) if first or last else None


def _is_usual(warper: object) -> bool:
    return getattr(warper, "filter_value", -torch.inf) == -torch.inf and getattr(warper, "min_tokens_to_keep", 1) == 1


def _check(model: nn.Module, input_ids: Tensor, config: GenerationConfig, kwargs: dict[str, object]) -> None:
    """Raises ValueError for the first thing in the call that our loop does not support."""
    mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
    positions, length = kwargs.get("position_ids"), input_ids.shape[1]
    rows = [] if positions is None else torch.as_tensor(positions).reshape(-1, positions.shape[-1]).tolist()
    given = {name for name, value in kwargs.items() if not (value is None or (isinstance(value, dict) and not value))}
    others = sorted(given - PREPARED)  # a multimodal model without images is given empty dicts
    kept = [name for name in ("scores", "logits", "attentions", "hidden_states") if getattr(config, f"output_{name}", None)]
    mode = config.get_generation_mode().value
    refused = {
        f"generate was asked for {mode}: dspark does greedy_search and sample": mode not in ("greedy_search", "sample"),
        f"got {input_ids.shape[0]} sequences: dspark decodes one at a time, loop over them": input_ids.shape[0] != 1,
        "the prompt is empty: pass input_ids": length == 0,
        "the prompt is padded: pass it without padding": mask is not None and not bool(torch.as_tensor(mask == 1).all()),
        "position_ids are not 0, 1, 2, …: dspark counts positions itself": any(row != list(range(length)) for row in rows),
        "past_key_values already holds tokens: dspark keeps a cache of its own": cache is not None and cache.get_seq_length() > 0,
        f"logits_to_keep is {kwargs.get('logits_to_keep')}: dspark chooses itself": kwargs.get("logits_to_keep") not in (None, 0, 1),
        f"{', '.join(others)} cannot be passed on: dspark decodes text from token ids alone": bool(others),
        f"{', '.join(kept)} cannot be returned: dspark returns the tokens alone": bool(kept and config.return_dict_in_generate),
        "the model is in training mode, where dropout changes the distribution: call model.eval() first": model.training,
    }
    checked_layers(model)
    for reason, applies in refused.items():
        if applies:
            raise ValueError(reason)
