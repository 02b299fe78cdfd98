"""Logit processors on the target's side: each row gets the text that truly comes before it, so the distribution stays exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as known

from dspark.verify.sampling import LazyProbs, OneHot, Sampling

# ``generate`` applies these after temperature, top-k and top-p.
LAST = (
    known.MinPLogitsWarper,
    known.TypicalLogitsWarper,
    known.EpsilonLogitsWarper,
    known.EtaLogitsWarper,
    known.TopHLogitsWarper,
    known.LogitNormalization,
)
REFUSED = (  # run the model, hide a mark, or remember earlier calls
    known.ClassifierFreeGuidanceLogitsProcessor,
    known.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    known.WatermarkLogitsProcessor,
    known.SynthIDTextWatermarkLogitsProcessor,
)
Process = Callable[[Tensor, Tensor], Tensor]


class Processors:
    """What changes a row of logits before a token is sampled.

    first: applied before temperature, top-k and top-p, in order.
    last: applied after them, in order; left out when decoding is greedy.
    Each is a callable (token ids [1, n] int64, scores [1, vocab] float32) → scores that depends on these alone, not on earlier calls:
    it also sees rows that come to nothing, since a draft before them was rejected.
    Raises ValueError for what is no callable and for those of REFUSED.
    """

    def __init__(self, first: Sequence[Process], last: Sequence[Process] = ()) -> None:
        for each in (*first, *last):
            if isinstance(each, type) or not callable(each):
                raise ValueError(f"{each!r} is no logit processor: pass objects such as RepetitionPenaltyLogitsProcessor(1.2)")
            if isinstance(each, REFUSED):
                raise ValueError(f"{type(each).__name__} is not supported: only processors that read the text before a token alone are")
        self.first, self.last = LogitsProcessorList(first), LogitsProcessorList(last)

    @classmethod
    def ordered(cls, processors: Sequence[Process]) -> Processors | None:
        """Those of LAST last, as ``generate`` does with its arguments of these names, all others first; None without any."""
        last = [each for each in processors if isinstance(each, LAST)]
        return cls([each for each in processors if not isinstance(each, LAST)], last) if len(processors) else None

    def probs(self, sampling: Sampling, text: Sequence[int], logits: Tensor) -> Tensor | OneHot:
        """The distribution after ``text``. logits: [vocab]; returns [vocab] float32. Raises ValueError if every token is forbidden."""
        ids = torch.tensor([list(text)], device=logits.device)
        scores = self.first(ids, logits.to(torch.float32, copy=True)[None])  # some change their argument
        if not scores.isfinite().any():
            raise ValueError(f"the logit processors forbid every token after {len(text)} tokens: loosen them")
        probs = sampling.row(scores[0])
        if self.last and sampling.temperature:
            probs = self.last(ids, probs.log()[None])[0].softmax(-1)
        return probs


class ProcessedProbs(LazyProbs):
    """As :class:`~dspark.verify.sampling.LazyProbs`, through processors.

    text: prompt, committed tokens and checked drafts; row k follows all but the last rows − 1 − k of it.
    """

    def __init__(self, sampling: Sampling, logits: Tensor, text: Sequence[int], processors: Processors) -> None:
        super().__init__(sampling, logits)
        self.text, self.processors = text, processors

    def row(self, k: int) -> Tensor | OneHot:
        before = self.text[: len(self.text) - len(self.logits) + 1 + k]
        return self.processors.probs(self.sampling, before, self.logits[k])


class CountPenalty(LogitsProcessor):
    """Presence and frequency penalties: the logit of each new token that already occurs falls by ``presence + frequency · count``.

    prompt_length: tokens at the start of the text that are not counted.
    """

    def __init__(self, presence: float = 0.0, frequency: float = 0.0, *, prompt_length: int) -> None:
        self.presence, self.frequency, self.prompt_length = presence, frequency, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        new = input_ids[:, self.prompt_length :]
        counts = torch.zeros_like(scores).scatter_add_(1, new, torch.ones_like(new, dtype=scores.dtype))
        return scores - self.presence * (counts > 0) - self.frequency * counts
