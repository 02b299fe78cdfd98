"""What others published, as macros with where it stands; nothing of it was measured by us. The numbers that notebooks quote, too, come
from :mod:`dspark.bench.published`."""

from __future__ import annotations

from dspark.bench import published
from dspark.paper.macros import QUOTED, Macro, percent

PERCENT = r"\,\%"
PER_USER = "per-user speed at matched throughput against MTP-1"


def _quote(name: str, text: str, where: str, source: str = published.SOURCE) -> Macro:
    return Macro(QUOTED, name, text, f"{source}, {where}")


MACROS = (
    _quote("RangeLow", percent(published.RANGE[0]), f"{PER_USER}, the lowest of both models"),
    _quote("RangeHigh", percent(published.RANGE[1]), f"{PER_USER}, the highest of both models"),
    *(
        _quote(f"{name.removeprefix('V4-')}{end}", percent(value), f"{PER_USER}, {name}")
        for name, gains in published.GAINS.items()
        for end, value in zip(("Low", "High"), gains, strict=True)
    ),
    _quote("BlockProduction", "5", "block size in production"),
    _quote("BlockOffline", "7", "block size of the offline experiments"),
    _quote("HeadCostLow", percent(published.HEAD_SHARE[0], 1), "Fig. 4, share of a round that the sequential head takes"),
    _quote("HeadCostHigh", percent(published.HEAD_SHARE[1], 1), "Fig. 4, share of a round that the sequential head takes"),
    _quote("EceBefore", f"3--8{PERCENT}", "Fig. 6, calibration error before sequential temperature scaling"),
    _quote("EceAfter", f"1{PERCENT}", "Fig. 6, calibration error after sequential temperature scaling, about"),
    _quote("AucLow", "0.81", "Fig. 6, AUC of the confidence head"),
    _quote("AucHigh", "0.91", "Fig. 6, AUC of the confidence head"),
    _quote("AppendixLaw", "0.85", "Appendix A, probability of the token whose law is biased"),
    *(
        _quote(
            f"GainOver{theirs.replace('3', '')}", percent(published.gain(name)), f"Table 1, mean over all benchmarks, {published.COMPARED}"
        )
        for name, theirs in published.DRAFTERS.items()
        if name != "dspark"
    ),
)
TAU_SOURCE = f"{published.SOURCE}, Table 1: tokens per round at temperature 1, block 7"
