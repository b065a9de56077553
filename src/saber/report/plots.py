"""Every plot of a report by name, and which of them a run has the numbers for."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from saber.report import reading
from saber.report.direction_plots import entanglement_heatmap, purity_separability
from saber.report.hydra_plot import hydra
from saber.report.outcome_plots import capability, refusal_rates
from saber.report.pipeline_plot import pipeline
from saber.report.reading import Run, dig
from saber.report.style import Plot

PLOTS: Mapping[str, Plot] = MappingProxyType({
    "pipeline": pipeline,
    "refusal_rates": refusal_rates,
    "capability": capability,
    "purity_separability": purity_separability,
    "entanglement_heatmap": entanglement_heatmap,
    "hydra": hydra,
})  # fmt: skip
"""Name of the file -> the function that draws it, in the order of the report."""

CAPTIONS: Mapping[str, str] = MappingProxyType({
    "pipeline": "The five stages of this run, and what came out",
    "refusal_rates": "Rates before and after, with Wilson intervals, and the labels given",
    "capability": "Perplexity and accuracy per category, before and after",
    "purity_separability": "Purity against held-out separability of every candidate direction",
    "entanglement_heatmap": "Worst entanglement per layer and capability category",
    "hydra": "Log-odds of the behaviour and what is left to find, pass by pass",
})  # fmt: skip


def applicable(run: Run) -> tuple[str, ...]:
    """The plots that this run has numbers for, in the order of the report."""
    found = reading.candidates(run)
    has = {
        "pipeline": True,
        "refusal_rates": dig(run, "baseline", "refusal", "rate") is not None,
        "capability": dig(run, "baseline", "perplexity", "overall") is not None,
        "purity_separability": bool(found),
        "entanglement_heatmap": any(d.get("entanglement") for d in found),
        "hydra": bool(reading.passes(run)),
    }
    return tuple(name for name in PLOTS if has[name])
