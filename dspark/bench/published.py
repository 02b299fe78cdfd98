"""What the paper reports, as plain numbers: the one place that the notebooks and our own paper quote it from. Nothing here is ours."""

import re

SOURCE = "DSpark (DeepSeek-AI and Peking University, 2026)"

# Gain in speed per user at matched throughput over MTP-1, in production on many GPUs: lowest and highest.
GAINS = {"V4-Flash": (0.60, 0.85), "V4-Pro": (0.57, 0.78)}
RANGE = (min(low for low, _ in GAINS.values()), max(high for _, high in GAINS.values()))

TABLE_1 = "Table 1: τ at temperature 1, blocks of 7"
BENCHMARKS = ("GSM8K", "MATH", "AIME25", "MBPP", "HumanEval", "LCB", "MT-Bench", "Alpaca", "Arena-Hard")
FILES = ("gsm8k", "math500", "aime25", "mbpp", "humaneval", "livecodebench", "mt-bench", "alpaca", "arena-hard-v2")  # of their prompts
TAU = {  # (target, drafter) → τ on each benchmark
    ("Qwen3-4B", "Eagle3"): (5.14, 4.62, 3.92, 3.69, 4.16, 3.77, 2.39, 2.26, 2.55),
    ("Qwen3-4B", "DFlash"): (5.40, 4.85, 4.15, 4.40, 4.74, 4.18, 3.07, 2.96, 2.83),
    ("Qwen3-4B", "DSpark"): (6.11, 5.70, 4.89, 5.13, 5.38, 4.86, 3.64, 3.54, 3.29),
    ("Qwen3-8B", "DSpark"): (6.17, 5.78, 5.01, 5.16, 5.52, 5.17, 3.72, 3.58, 3.21),
    ("Qwen3-14B", "DSpark"): (6.21, 5.74, 4.94, 5.26, 5.43, 5.02, 3.70, 3.58, 3.13),
    ("Gemma4-12B", "DSpark"): (6.05, 5.78, 5.12, 5.11, 5.64, 4.51, 3.49, 3.35, 2.92),
}
COMPARED = "Qwen3-4B"  # the target that all three drafters were trained for
DRAFTERS = {"eagle": "Eagle3", "dflash": "DFlash", "dspark": "DSpark"}  # our names of them → the paper's


def gain(over: str) -> float:
    """How much more DSpark commits per round than another drafter (our name), for the common target: ratio of the sums of τ, minus 1."""
    return sum(TAU[COMPARED, DRAFTERS["dspark"]]) / sum(TAU[COMPARED, DRAFTERS[over]]) - 1


def tau_of(target: str, drafter: str) -> dict[str, float]:
    """τ by the names in :data:`FILES` if the pair, named as on the hub, is one of the paper's; {} for any other.
    For example "Qwen/Qwen3-4B" with "deepseek-ai/dspark_qwen3_4b_block7"."""
    model, file = (re.sub(r"[^a-z0-9]", "", name.split("/")[-1].lower()) for name in (target, drafter))
    for (size, kind), values in TAU.items():
        name = size.replace("-", "").lower()
        if model in (name, f"{name}it") and file.startswith(f"{kind.lower()}{name}"):
            return dict(zip(FILES, values, strict=True))
    return {}


HEAD_SHARE = (0.002, 0.013)  # Fig. 4: the sequential head's share of a round, lowest and highest over the block sizes
