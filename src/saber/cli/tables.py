"""The tables that the terminal shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table


def directions_table(run: Mapping[str, Any], most: int = 15) -> Table:
    """The ablated directions of all passes, strongest separation first."""
    rows = [(p["index"], d) for p in run["passes"] for d in p["directions"]]
    title = f"{len(rows)} directions in {run['layers_edited']} layers"
    table = Table(title=title + (f" (first {most})" if len(rows) > most else ""))
    for name in (
        "pass",
        "layer",
        "i",
        "d'",
        "AUROC",
        "purity",
        "worst entanglement",
        "causal",
        "strength",
        "lambda",
        "removed",
    ):
        table.add_column(name, justify="right")
    for index, d in rows[:most]:
        table.add_row(
            str(index),
            str(d["layer"]),
            str(d["component"]),
            f"{d['d_prime']:.2f}",
            f"{d['auroc']:.3f}",
            f"{d['purity']:.3f}",
            f"{d['worst_entanglement']:.3f} {d['worst_category']}",
            "" if d["causal"] is None else f"{d['causal']:+.2f}",
            f"{d['strength']:.2f}",
            "" if d["lambda"] is None else f"{d['lambda']:.0f}",
            "" if d["removed"] is None else f"{d['removed']:.0%}",
        )
    return table


def proportion(p: Mapping[str, Any] | None) -> str:
    """A rate with its 95% interval."""
    if p is None:
        return "-"
    return f"{100 * p['rate']:.1f}% ({100 * p['low']:.1f}-{100 * p['high']:.1f})"


def result_rows(
    before: Mapping[str, Any],
    after: Mapping[str, Any] | None,
    behaviour: str = "refusal",
    narrow: bool = False,
) -> list[tuple[str, str, str]]:
    """Metric, before, after: all rows of the before/after table as text.

    A divergence is one of two models, so that a model on its own has no rows of it. `narrow` puts wrong
    refusals first, for a run that was to lower these alone.
    """
    over = "over-refusal" if behaviour == "refusal" else behaviour

    def both(name: str, of: Any) -> tuple[str, str, str]:
        return name, of(before), of(after) if after else ""

    def number(path: tuple[str, ...], digits: int) -> Any:
        def read(m: Any) -> str:
            for part in path:
                m = m[part]
            return f"{m:.{digits}f}"

        return read

    def divergence(name: str, *path: str) -> list[tuple[str, str, str]]:
        return [both(name, number(path, 4))] if after else []

    def still_open(name: str) -> tuple[str, str, str]:
        title = f"thought never closed ({name})"
        return both(title, lambda m: proportion((m.get("thought_open") or {}).get(name)))

    borderline = both(f"{over}, borderline", lambda m: proportion(m["over_refusal"]["borderline"]))
    rows = [
        *([borderline] if narrow else []),
        both(f"{behaviour} (target)", lambda m: proportion(m["refusal"])),
        both("  seen categories", lambda m: proportion(m["refusal_seen"])),
        both("  unseen categories", lambda m: proportion(m["refusal_unseen"])),
        both("incoherent (target)", lambda m: proportion(m["incoherent"])),
        still_open("target"),
        *([] if narrow else [borderline]),
        both(f"{over}, neutral", lambda m: proportion(m["over_refusal"]["neutral"])),
        both(f"{over}, everyday", lambda m: proportion(m["over_refusal"].get("everyday"))),
        *(
            both(
                f"{name} at {cut['tokens']} tokens",
                lambda m, i=i, kind=kind: proportion(m["lengths"][i].get(kind)),
            )
            for i, cut in enumerate(before.get("lengths") or [])
            for kind, name in (
                ("refusal", behaviour),
                ("partial", "  partial"),
                ("incoherent", "  incoherent"),
                ("thought_open", "  thought never closed"),
            )
        ),
        *(
            row
            for name in before.get("kept") or {}
            for title in [name.removesuffix("/heldout")]
            for row in (
                both(
                    f"{behaviour}, kept ({title})",
                    lambda m, n=name: proportion(m["kept"][n]["refusal"]),
                ),
                *divergence(f"  KL, sequence ({title})", "kept", name, "kl", "sequence"),
            )
        ),
        both("perplexity, answers", number(("perplexity", "overall"), 2)),
        *(
            both(f"  {c.replace('_', ' ')}", number(("perplexity", "by_category", c), 2))
            for c in before["perplexity"]["by_category"]
        ),
        both("perplexity, prompt text", number(("perplexity", "prompt_text", "overall"), 1)),
        both("accuracy", lambda m: proportion({**m["accuracy"], "rate": m["accuracy"]["overall"]})),
        still_open("battery"),
        *divergence("KL, first token (nats)", "kl", "first_token"),
        *divergence("KL, sequence (nats)", "kl", "sequence"),
        *divergence("  median prompt", "kl", "sequence_median"),
        *(
            divergence("KL, sequence, everyday", "kl_everyday", "sequence")
            if before.get("kl_everyday")
            else []
        ),
    ]
    return [row for row in rows if row[1] != "-" or row[2] not in ("", "-")]


def results_table(
    before: Mapping[str, Any],
    after: Mapping[str, Any] | None,
    n: int,
    behaviour: str = "refusal",
    narrow: bool = False,
) -> Table:
    """Before and after, on held-out prompts."""
    table = Table(title=f"held-out prompts ({n} targets), 95% intervals")
    table.add_column("metric")
    table.add_column("before" if after else "value", justify="right")
    if after:
        table.add_column("after", justify="right")
    for name, first, second in result_rows(before, after, behaviour, narrow):
        table.add_row(name, first, *([second] if after else []))
    return table


def tasks_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """The metrics of lm-eval's tasks with their standard errors, one column a model."""
    table = Table(title=f"lm-eval {results[0]['version']}, through the chat template")
    for name in ("task", "items", "metric"):
        table.add_column(name)
    for name in ("before", "after") if len(results) > 1 else ("value",):
        table.add_column(name, justify="right")
    for name, task in results[0]["tasks"].items():
        for metric in task["metrics"]:
            found = [r["tasks"][name]["metrics"][metric] for r in results]
            table.add_row(name, str(task["n"] or ""), metric, *map(_with_error, found))
    return table


def _with_error(metric: Mapping[str, Any]) -> str:
    error = "" if metric["stderr"] is None else f" ± {metric['stderr']:.4f}"
    return f"{metric['value']:.4f}{error}"


def writers_table(report: Mapping[str, Any]) -> Table:
    """The residual writers of a model, one row for like layers."""
    table = Table(
        title=f"{report['model_type']}: {report['layers']} layers, {len(report['writers'])} writers"
    )
    for name in ("layer", "writer", "kind", "axis", "experts", "bias", "gain"):
        table.add_column(name)
    for w in report["writers"]:
        table.add_row(
            str(w["layer"]),
            w["name"],
            w["kind"],
            str(w["axis"]),
            str(w["experts"] or ""),
            "yes" if w["bias"] else "",
            w["gain"] or "",
        )
    return table
