"""A finished run as one self-contained HTML page: no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from saber.report import reading, tables
from saber.report.card import base_model, warning
from saber.report.plots import CAPTIONS
from saber.report.reading import MISSING, Run, change, dig, number, percent, plain
from saber.report.tables import Table

EXCERPT = 80
"""The most characters of an answer that the page shows."""
PROMPT = 160
"""The most characters of a prompt that the page shows."""


def html_report(run: Mapping[str, Any], plots_folder: Path) -> str:
    """The page as text; plots are the SVG files of `plots_folder` that exist, embedded."""
    environment = Environment(
        loader=PackageLoader("saber.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("report.html").render(
        title=f"SABER on {reading.model_name(run)}",
        finding=reading.finding(run),
        base=base_model(run),
        demo=dig(run, "model", "source") == "demo",
        command=run.get("command") or "",
        version=run.get("saber_version") or MISSING,
        warning=warning(run).replace("**", "") if run.get("edited") is not None else "",
        tiles=_tiles(run),
        plots={name: image for name in CAPTIONS if (image := embedded(plots_folder, name))},
        captions=CAPTIONS,
        results=tables.results(run),
        brackets=tables.BRACKETS,
        comparisons=tables.comparisons(run),
        by_category=tables.by_category(run),
        category_title=reading.worded(run, "Refusal by category", "{} by category"),
        by_length=tables.by_length(run),
        kept_title=reading.worded(run, "Retained refusals", "Kept prompts"),
        hydra=tables.hydra(run),
        search=tables.search(run),
        search_note=reading.search_note(run),
        kept=tables.kept_by_category(run),
        stop_reason=run.get("stop_reason") or "",
        directions=tables.directions(run),
        prompts=tables.prompts(run),
        config=tables.facts(run.get("config")),
        environment=tables.facts({**(run.get("model") or {}), **(run.get("environment") or {})}),
        timings=_timings(run),
        examples=_examples(run),
    )


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """Label, number and small print of the headline numbers."""
    path = reading.lowered(run)
    interval = dig(run, "edited", *path) or dig(run, "baseline", *path)
    low, high = percent(dig(interval, "low"), 1), percent(dig(interval, "high"), 1)
    kl = dig(run, "edited", "kl")
    beside = (reading.worded(run, "Over-refusal", "{}"),
              change(run, percent, "over_refusal", "neutral", "rate"), "neutral prompts")  # fmt: skip
    if reading.narrow(run) and run.get("edited") is not None:
        new = number(dig(run, "comparison", "refusal", "c"))
        beside = (reading.right_name(run), reading.right_kept(run), f"held-out targets; {new} new")
    found = [
        (reading.lowered_name(run), change(run, percent, *path, "rate"),
         f"{reading.where(run)}, 95% interval {low} to {high}"),
        beside,
        ("Perplexity", change(run, number, "perplexity", "overall"), "battery reference answers"),
        ("Accuracy", change(run, percent, "accuracy", "overall"), "battery"),
    ]  # fmt: skip
    if kl is not None:
        found.append(("KL per token", f"{number(kl.get('sequence'))} nats",
                      f"first token {number(kl.get('first_token'))}"))  # fmt: skip
    return found


def embedded(folder: Path, name: str) -> str:
    """A plot as a data address; an image cannot run scripts or clash with another's ids."""
    for suffix, kind in ((".svg", "svg+xml"), (".png", "png")):
        path = folder / f"{name}{suffix}"
        if path.is_file():
            return f"data:image/{kind};base64,{b64encode(path.read_bytes()).decode('ascii')}"
    return ""


def _timings(run: Run) -> Table:
    rows = [(plain(stage), reading.duration(s)) for stage, s in (run.get("seconds") or {}).items()]
    work = run.get("work") or {}
    for key, name in (("tokens", "tokens through the model"), ("tflop", "work, TFLOP"),
                      ("gflops", "rate, GFLOP/s")):  # fmt: skip
        if key in work:
            rows.append((name, number(work[key])))
    return Table(("stage", "time"), tuple(rows))


def _examples(run: Run) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for kind, some in (run.get("examples") or {}).items():
        for one in some:
            sides = {
                side: {"label": str(dig(one, side, "label") or ""),
                       "excerpt": _cut(str(dig(one, side, "excerpt") or ""), EXCERPT)}
                for side in ("before", "after") if one.get(side)
            }  # fmt: skip
            found.setdefault(kind, []).append({
                "category": plain(str(one.get("category") or "")),
                "prompt": _cut(str(one.get("prompt") or ""), PROMPT), "sides": sides,
            })  # fmt: skip
    first = "borderline" if reading.narrow(run) else "target"
    return dict(sorted(found.items(), key=lambda item: item[0] != first))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
