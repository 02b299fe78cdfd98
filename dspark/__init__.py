"""dspark: speculative decoding by DSpark, with the target's distribution kept exactly.

One round, in the notation used everywhere:
    x_0 ``anchor``            the last committed token, not yet in the target's KV cache
    x_1..x_γ ``draft_tokens`` one block: a parallel pass, then a tiny sequential head; γ is ``block_size``
    c_k ``confidence``        P(x_k is accepted, if x_<k are);  a_k ``survival`` = Π_{i≤k} c_i
    ℓ ``verify_length``       how many drafts the policy sends to the target
    p_t, p_d                  ``p_target``, ``p_draft``: float32, after temperature, top-k and top-p
    τ ``tokens_per_round``    accepted drafts + 1 (correction or bonus)
"""

from dspark.decode import decode, generate
from dspark.draft.lookup import ContextLookup
from dspark.engine import Engine
from dspark.formats.native import save_drafter
from dspark.load import load_drafter, load_target
from dspark.round import Output, Round
from dspark.schedule import MTP1, AdaptiveWindow, Autoregressive, ConfidenceThreshold, FixedWindow, PrefixScheduler
from dspark.target.target import Target

__version__ = "0.1.0"
__all__ = [
    "MTP1",
    "AdaptiveWindow",
    "Autoregressive",
    "ConfidenceThreshold",
    "ContextLookup",
    "Engine",
    "FixedWindow",
    "Output",
    "PrefixScheduler",
    "Round",
    "Target",
    "decode",
    "generate",
    "load_drafter",
    "load_target",
    "save_drafter",
]
