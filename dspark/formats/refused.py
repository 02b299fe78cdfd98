"""Drafters of another construction: recognised, and refused with the reason."""

from __future__ import annotations

from dspark.formats.layers import Refusal

DEEPSEEK_V4 = ("DSparkV4DraftModel", "DeepseekV4ForCausalLM")
DFLASH_2 = ("selector_", "conv_")  # how its fields begin


def refuse(config: dict) -> None:
    """Raises Refusal for DeepSeek-V4's and DFlash 2's drafters, and for speculators' of DFlash 2."""
    names = config.get("architectures")
    if isinstance(names, list) and any(name in names for name in DEEPSEEK_V4):
        reason = "DeepSeek-V4's drafter is made of MLA and MoE stages with hyper-connections, which are not supported"
        raise Refusal("architectures", f"architectures is {names!r}: {reason}. Pass another drafter or train one")
    inner = config.get("dflash_config")
    for name, value in {**config, **(inner if isinstance(inner, dict) else {})}.items():
        if (name.startswith(DFLASH_2) and value is not None) or (name == "speculators_model_type" and value == "dflash2"):
            reason = "DFlash 2 has convolutions along the block and selects among candidates, which is not supported"
            raise Refusal(name, f"{name} is {value!r}: {reason}. Pass another drafter or train one")
