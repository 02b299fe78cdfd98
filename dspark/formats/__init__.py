"""Drafters on disk. A format is one function, ``read(config, tensors)``: what is stored, and its entry in :data:`FORMATS`. It names every
field that it understands and those that are known to be harmless; any other field is refused."""

from collections.abc import Collection

from torch import Tensor

from dspark.formats import deepspec, native, specforge, speculators
from dspark.formats.build import Stored
from dspark.formats.layers import Refusal, without

FORMATS = {  # the architecture in config.json → what reads it; speculators' files are known by a field of their own
    **dict.fromkeys(native.KINDS, native.read),
    deepspec.ARCHITECTURE: deepspec.read,
    "Gemma4DSparkModel": deepspec.read_gemma4,
    **dict.fromkeys(("DSparkDraftModel", "DFlashDraftModel", specforge.LIQUID), specforge.read),
}
DEEPSEEK_V4 = ("DSparkV4DraftModel", "DeepseekV4ForCausalLM")
DFLASH_2 = ("selector_", "conv_")  # how its fields begin


def read(config: dict, tensors: dict[str, Tensor], ignore_fields: Collection[str] = ()) -> Stored:
    """What a folder's config.json and tensors describe.

    tensors: by their names in the file; those that are understood may be taken out.
    ignore_fields: names of fields to read as if they were absent, at any depth, or with dots at one place.
    Raises ValueError if no format knows it, and for a field whose name or value is not understood.
    """
    for name in ignore_fields:
        if without(config, [name]) == config:
            raise ValueError(f"ignore_fields names {name!r}, which config.json does not have: leave it out")
    config = without(config, ignore_fields)
    refuse(config)
    names = config.get("architectures")
    reader = speculators.read if "speculators_model_type" in config else next((FORMATS[name] for name in FORMATS if names == [name]), None)
    if reader is None:
        known = f"{', '.join(FORMATS)}, speculators' {' and '.join(speculators.KINDS)}"
        raise Refusal("architectures", f"architectures {names!r} is no drafter that can be read: pass one of {known}")
    if reader is deepspec.read and "dflash_config" in config:  # only SpecForge writes that
        reader = specforge.read
    stored = reader(config, tensors)
    stored.target_layers = config.get("num_target_layers") or (config.get("dflash_config") or {}).get("num_target_layers")
    return stored


def refuse(config: dict) -> None:
    """Raises Refusal, with the reason, for drafters of another construction: DeepSeek-V4's, and DFlash 2's."""
    names, inner = config.get("architectures"), config.get("dflash_config")
    if isinstance(names, list) and any(name in names for name in DEEPSEEK_V4):
        reason = "DeepSeek-V4's drafter is made of MLA and MoE stages with hyper-connections, which are not supported"
        raise Refusal("architectures", f"architectures is {names!r}: {reason}. Pass another drafter or train one")
    for name, value in {**config, **(inner if isinstance(inner, dict) else {})}.items():
        if (name.startswith(DFLASH_2) and value is not None) or (name == "speculators_model_type" and value == "dflash2"):
            reason = "DFlash 2's own files are not read; dspark.train drafter --head selector --convolutions makes one of its kind"
            raise Refusal(name, f"{name} is {value!r}: {reason}. Pass another drafter or train one")
