"""A part of the paper that one kind of result gives: its values, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from dspark.paper.macros import Macro


@dataclass(frozen=True)
class Part:
    """tables, figures: name of the generated file, without its ending → TeX, picture. Empty where nothing was measured."""

    macros: tuple[Macro, ...] = ()
    tables: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)
