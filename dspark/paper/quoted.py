"""What others published. Every quoted value of the paper is here, once, with where it stands; nothing of it was measured by us."""

from __future__ import annotations

from dspark.paper.macros import QUOTED, Macro

DSPARK = "DSpark (DeepSeek-AI and Peking University, 2026)"
PERCENT = r"\,\%"


def _quote(name: str, text: str, where: str, source: str = DSPARK) -> Macro:
    return Macro(QUOTED, name, text, f"{source}, {where}")


MACROS = (
    _quote("RangeLow", f"57{PERCENT}", "per-user speed at matched throughput against MTP-1, the lowest of both models"),
    _quote("RangeHigh", f"85{PERCENT}", "per-user speed at matched throughput against MTP-1, the highest of both models"),
    _quote("FlashLow", f"60{PERCENT}", "per-user speed at matched throughput against MTP-1, V4-Flash"),
    _quote("FlashHigh", f"85{PERCENT}", "per-user speed at matched throughput against MTP-1, V4-Flash"),
    _quote("ProLow", f"57{PERCENT}", "per-user speed at matched throughput against MTP-1, V4-Pro"),
    _quote("ProHigh", f"78{PERCENT}", "per-user speed at matched throughput against MTP-1, V4-Pro"),
    _quote("BlockProduction", "5", "block size in production"),
    _quote("BlockOffline", "7", "block size of the offline experiments"),
    _quote("HeadCostLow", f"0.2{PERCENT}", "Fig. 4, share of a round that the sequential head takes"),
    _quote("HeadCostHigh", f"1.3{PERCENT}", "Fig. 4, share of a round that the sequential head takes"),
    _quote("EceBefore", f"3--8{PERCENT}", "Fig. 6, calibration error before sequential temperature scaling"),
    _quote("EceAfter", f"1{PERCENT}", "Fig. 6, calibration error after sequential temperature scaling, about"),
    _quote("AucLow", "0.81", "Fig. 6, AUC of the confidence head"),
    _quote("AucHigh", "0.91", "Fig. 6, AUC of the confidence head"),
    _quote("AppendixLaw", "0.85", "Appendix A, probability of the token whose law is biased"),
)
# Published range of the gain over MTP-1, for words such as "inside" that are derived from our numbers.
RANGE = (0.57, 0.85)

TAU_SOURCE = f"{DSPARK}, Table 1: tokens per round at temperature 1, block 7"
TAU_BENCHMARKS = ("GSM8K", "MATH", "AIME25", "MBPP", "HumanEval", "LCB", "MT-Bench", "Alpaca", "Arena-Hard")
TAU = {
    ("Qwen3-4B", "Eagle3"): (5.14, 4.62, 3.92, 3.69, 4.16, 3.77, 2.39, 2.26, 2.55),
    ("Qwen3-4B", "DFlash"): (5.40, 4.85, 4.15, 4.40, 4.74, 4.18, 3.07, 2.96, 2.83),
    ("Qwen3-4B", "DSpark"): (6.11, 5.70, 4.89, 5.13, 5.38, 4.86, 3.64, 3.54, 3.29),
    ("Qwen3-8B", "DSpark"): (6.17, 5.78, 5.01, 5.16, 5.52, 5.17, 3.72, 3.58, 3.21),
    ("Qwen3-14B", "DSpark"): (6.21, 5.74, 4.94, 5.26, 5.43, 5.02, 3.70, 3.58, 3.13),
    ("Gemma4-12B", "DSpark"): (6.05, 5.78, 5.12, 5.11, 5.64, 4.51, 3.49, 3.35, 2.92),
}
