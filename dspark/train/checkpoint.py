"""What an interrupted training resumes from: one file with float32 weights, AdamW's moments, the step and the settings."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dspark.draft.drafter import Drafter
from dspark.files import one_line, read_tensors, write_atomically

MAY_CHANGE = ("steps", "checkpoint_every")  # on resuming: fewer steps anneal sooner, more train for longer
START_OVER = "delete it to start over"


def save_checkpoint(path: Path, drafter: Drafter, optimizer: torch.optim.Optimizer, about: dict[str, object]) -> None:
    """Write the file whole or not at all.

    about: ``step``, the steps done so far, and what the training depends on: ``train``, ``drafter``, ``target``, ``text``
    Raises ValueError for weights that are not finite, or if the file cannot be written; the last checkpoint is kept then.
    """
    if broken := [name for name, weight in drafter.named_parameters() if not weight.isfinite().all()]:
        raise ValueError(f"{broken[0]} is not finite after step {about['step']}: {path} is kept as it was; continue from it")
    tensors = {f"weights.{name}": value for name, value in drafter.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": value for name, value in state.items()}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    write_atomically(path, lambda scratch: save_file(tensors, scratch, {"about": json.dumps(about)}))


def load_checkpoint(path: Path, drafter: Drafter, optimizer: torch.optim.Optimizer, wanted: dict[str, object]) -> int:
    """Load weights and moments into ``drafter`` and ``optimizer``. Returns the number of steps done.

    wanted: what the training depends on, as in :func:`save_checkpoint`, without the step
    Raises ValueError if the file is damaged or belongs to another training.
    """
    tensors, header = read_tensors(path, START_OVER)
    try:
        about = json.loads(header["about"])
        about["train"] |= {name: wanted["train"][name] for name in MAY_CHANGE}
        about.setdefault("dtype", wanted.get("dtype"))  # older checkpoints do not say
        if type(about["step"]) is not int or about["step"] < 0:
            raise ValueError(f"step {about['step']!r}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({one_line(error)}): {START_OVER}") from None
    for key, value in wanted.items():
        if about.get(key) != json.loads(json.dumps(value)):
            raise ValueError(f"{path} was made with {key} = {about.get(key)!r}, not {value}: choose the same, or another folder")
    _check(path, tensors, drafter)
    drafter.load_state_dict({n.removeprefix("weights."): t for n, t in tensors.items() if n.startswith("weights.")})
    parts, count = ("step", "exp_avg", "exp_avg_sq"), len(list(drafter.parameters()))
    moments = {i: {part: tensors[f"optimizer.{i}.{part}"] for part in parts} for i in range(count)}
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return about["step"]


def _check(path: Path, tensors: dict[str, Tensor], drafter: Drafter) -> None:
    """Raises ValueError unless these are weights and moments of this drafter, all finite, over the same draft vocabulary."""
    like = {f"weights.{name}": value for name, value in drafter.state_dict().items()}
    for i, weight in enumerate(drafter.parameters()):
        like |= {f"optimizer.{i}.step": weight.sum(), f"optimizer.{i}.exp_avg": weight, f"optimizer.{i}.exp_avg_sq": weight}
    for name in sorted(like.keys() | tensors.keys()):
        found = tensors.get(name)
        if name not in like or found is None or (found.shape, found.dtype) != (like[name].shape, like[name].dtype):
            raise ValueError(f"{path} is damaged ({name!r} is missing or misshapen): {START_OVER}")
        if not found.isfinite().all() or (name.endswith("exp_avg_sq") and (found < 0).any()):
            raise ValueError(f"{path} is damaged ({name} is out of range): {START_OVER}")
    if not torch.equal(tensors["weights.d2t"], drafter.d2t.cpu()):
        raise ValueError(f"{path} was made with another draft vocabulary, from another corpus: choose another folder")
