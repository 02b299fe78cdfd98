"""How decoding runs if nobody chooses a policy."""

import torch

from dspark.draft.lookup import ContextLookup
from dspark.draft.source import DraftSource
from dspark.schedule import Auto, Autoregressive, Policy
from dspark.target.target import Target
from dspark.tune.profile import step_times


def prepared(target: Target, drafter: DraftSource | None, policy: Policy | None) -> tuple[DraftSource | None, Policy]:
    """Who drafts, and under which policy. Without a drafter nothing is drafted: plain decoding.

    Without a policy the context is copied where it repeats itself, and :class:`~dspark.schedule.Auto` decides on this machine's step
    times, which are measured the first time (some seconds).
    Raises ValueError for a policy that the drafter cannot serve, and for a drafter that is attached to another model.
    """
    if policy is not None and not isinstance(policy, Policy):
        raise ValueError(f"policy {policy!r} is no policy: pass an object such as dspark.FixedWindow(4), or leave it out")
    if drafter is None:
        if policy is not None and not isinstance(policy, Autoregressive):
            raise ValueError(f"{policy} needs a drafter: pass one, or leave the policy out for plain decoding")
        return None, Autoregressive()
    mine = getattr(getattr(drafter, "drafter", drafter), "attached_to", None)  # the embedding of the target it was made for
    a, b = (None, None) if mine is None else (mine.weight, target.embedding.weight)
    if a is not None and a is not b and (a.device != b.device or a.dtype != b.dtype or not torch.equal(a, b)):
        raise ValueError(f"the drafter is attached to another model than {target.name}: load_drafter(…, target) with this very target")
    if policy is None:
        source = drafter if isinstance(drafter, ContextLookup) else ContextLookup(drafter, target=target)
        return source, Auto(step_times(target, drafter))
    policy.check(drafter.block_size, drafter.has_confidence)
    return drafter, policy
