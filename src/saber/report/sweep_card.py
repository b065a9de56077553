"""A sweep as a table, a page of Markdown and two plots; reads sweep.json and never opens a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saber.artifacts import read_json, write_text
from saber.errors import DataError
from saber.report import reading, style
from saber.report.build import Report
from saber.report.card import cell
from saber.report.reading import MISSING, count, dig, fixed, percent, points, rate, relative
from saber.report.sweep_plots import applicable, axis_name

FILE = "sweep.json"
SCHEMA = 1


def is_sweep(folder: Path) -> bool:
    """Whether a folder is a sweep's."""
    return (folder / FILE).is_file()


def read_sweep(folder: Path) -> dict[str, Any]:
    """The content of a sweep's sweep.json; raises `DataError` with what to do about it."""
    if not is_sweep(folder):
        raise DataError(
            f"{folder} holds no {FILE}.",
            "Give the folder of `saber sweep`, or go on with --resume.",
        )
    record = read_json(folder / FILE)
    if record.get("schema") != SCHEMA or record.get("kind") != "sweep":
        raise DataError(f"{folder / FILE} is no sweep of schema {SCHEMA}.")
    return record


def build_sweep(folder: Path) -> Report:
    """Draw a sweep's plots and write its README.md, each file whole or not at all."""
    record = read_sweep(folder)
    plots: list[Path] = []
    for name, draw in applicable(record).items():
        with style.styled():
            drawn = draw(record)
        plots.extend(style.save(drawn, folder / "plots", name))
    card = folder / "README.md"
    write_text(card, page(record))
    return Report(tuple(plots), card, None)


def columns(
    record: Mapping[str, Any], *, intervals: bool = True
) -> tuple[list[str], list[list[str]]]:
    """Names of the columns and the cells of each setting, best first: the card's, and what it lacks.

    Without `intervals`, for a terminal, only the behaviour's own has one.
    """
    axes = list(dict.fromkeys(f for row in record["trials"] for f in row["values"]))
    name = reading.behaviour(record)
    # Where wrong refusals alone were to go, these come first and then those that were to stay.
    lead = [reading.lowered_name(record)] if reading.narrow(record) else []
    names = ["", "#", *(axis_name(axis) for axis in axes), *lead, name[:1].upper() + name[1:]]
    names += ["PPL", "PPL \N{GREEK CAPITAL LETTER DELTA}", "Layers", "Dirs ablated"]
    names += ["KL", "Incoherent", "Accuracy", *(["Changed"] if _keeps(record) else [])]
    return names, [_cells(record, row, axes, intervals) for row in record["trials"]]


def _cells(
    record: Mapping[str, Any], row: Mapping[str, Any], axes: list[str], intervals: bool
) -> list[str]:
    mark = "best" if row["best"] else "*" if row["front"] else ""
    values = [_value(row["values"].get(axis)) for axis in axes]
    head = [mark, str(row["number"]), *values]
    narrow = reading.narrow(record)
    if row["state"] != "done":
        return [*head, row["state"], *[MISSING] * (7 + narrow + _keeps(record))]
    before = dig(record, "baseline", "perplexity", "overall")
    return [
        *head,
        *([rate(row["over_refusal"]["borderline"])] if narrow else []),
        rate(row["refusal"]),
        fixed(row["perplexity"], 2),
        (_change(row) if intervals else "") or relative(before, row["perplexity"]),
        str(row["layers"]),
        str(row["directions"]),
        _divergence(row["kl"]) if intervals else fixed(row["kl"]["sequence"], 4),
        percent(dig(row, "incoherent", "rate"), 1),
        percent(dig(row, "accuracy", "overall"), 0),
        *([rate(row["lost"])] if _keeps(record) else []),
    ]


def _keeps(record: Mapping[str, Any]) -> bool:
    """Whether there are prompts whose answers are to stay; sweeps before that was counted do not tell."""
    return any(row.get("lost") for row in record["trials"])


def _value(value: Any) -> str:
    """The value of an axis; a search gives more digits than anyone reads."""
    return MISSING if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _change(row: Mapping[str, Any]) -> str:
    """The change of perplexity with its interval: `+1.2% (-0.3 to +2.7)`; empty where none was taken."""
    ratio = row.get("perplexity_ratio")
    if not ratio:
        return ""
    low, high = (relative(1.0, ratio[end]).removesuffix("%") for end in ("low", "high"))
    return f"{relative(1.0, ratio['estimate'])} ({low} to {high})"


def _divergence(kl: Mapping[str, Any]) -> str:
    """The KL along answers with its interval, where one was taken: `0.0141 (0.0112-0.0180)`."""
    text = fixed(kl["sequence"], 4)
    if "sequence_low" not in kl:
        return text
    return f"{text} ({fixed(kl['sequence_low'], 4)}-{fixed(kl['sequence_high'], 4)})"


def helps(record: Mapping[str, Any]) -> bool:
    """Whether the chosen setting leaves less amiss than the untouched model; older sweeps do not say."""
    return bool(record["best"].get("helps", True))


def vain(record: Mapping[str, Any]) -> str:
    """What to say where no setting leaves less amiss than the untouched model."""
    best = record["best"]
    was, seen = best["amiss"]["untouched"], best["amiss"]["validation"]
    return (
        f"No setting helps: the untouched model leaves {percent(was['rate'], 1)} of {was['n']} validation "
        f"prompts amiss, and the best setting, {best['number']}, {percent(seen['rate'], 1)}. "
        "Try other values, or more or other prompts."
    )


def shrinkage(record: Mapping[str, Any]) -> str:
    """What the chosen setting's numbers became on held-out prompts, in a sentence."""
    best = record["best"]
    seen, now = best["amiss"]["validation"], best["amiss"]["heldout"]
    was, found = best["validation"], best["heldout"]["edited"]
    untouched = best["heldout"]["baseline"]
    what = "refused wrongly" if reading.narrow(record) else "amiss (shown or incoherent)"
    what = record.get("faults") or what
    text = (
        f"setting {best['number']}: {what} {percent(seen['rate'], 1)} of {seen['n']} validation prompts, "
        f"{rate(now)} of {now['n']} held-out ones ({points(seen['rate'], now['rate'])}); "
        f"KL {fixed(dig(was, 'kl', 'sequence'), 4)} \N{RIGHTWARDS ARROW} "
        f"{fixed(dig(found, 'kl', 'sequence'), 4)}; "
        f"{reading.behaviour(record)} on held-out prompts {rate(untouched['refusal'])} before, "
        f"{rate(found['refusal'])} after"
    )
    if not best["reached"]:
        text += f". No setting reaches the aim of {100 * record['aim']:g}%"
    if best["looks"] > 1:
        text += f". Held-out prompts were looked at {best['looks']} times in this sweep"
    return text + "."


def page(record: Mapping[str, Any]) -> str:
    """The text of a sweep's README.md."""
    names, cells = columns(record)
    prompts = dig(record, "baseline", "refusal", "n")
    lines = [
        f"# Sweep of {cell(reading.model_name(record))}",
        "",
        f"{count(len(cells), 'setting')} on {count(prompts, 'validation target')}; 95% intervals: "
        "Wilson's for rates, bootstrap over prompts for perplexity and KL. "
        "Sorted by what is left amiss, then by KL from the untouched model along its own answers; "
        "\\* marks the Pareto front of the two. "
        f"PPL is that of reference answers to half of the battery ({_before(record)} untouched), "
        "accuracy that of its checked answers."
        + (" *Changed* are answers that were to stay and did not." if _keeps(record) else ""),
        "",
        "| " + " | ".join(map(cell, names)) + " |",
        "|" + "---:|" * len(names),
        *("| " + " | ".join(map(cell, row)) + " |" for row in cells),
        "",
    ]
    best = record["best"]
    if best:
        pairs = ((axis_name(k), _value(v)) for k, v in best["values"].items())
        settings = cell(", ".join(f"{name} {value}" for name, value in pairs))
        lines += [] if helps(record) else [f"**{vain(record)}**", ""]
        what = "Chosen" if helps(record) else "Least amiss"
        lines += [
            f"**{what}: setting {best['number']}** ({settings}). Rule: {record['rule']}. Held-out "
            "prompts had no say in it.",
            "",
            f"On held-out prompts: {cell(shrinkage(record))}",
            "",
        ]
    else:
        lines += [
            f"{count(record['left'], 'setting')} still to be measured; none is chosen yet.",
            "",
        ]
    for name in applicable(record):
        lines += [f"![{name}](plots/{name}.png)", ""]
    work = record["work"]
    prepared = work.get("prepared", 0)
    spent, spared = work["tokens"] + prepared, work["shared"] - prepared
    if spent + spared > 0:
        lines += [
            f"Work: {spent:,} tokens through the model for all settings; "
            f"{spared:,} more ({percent(spared / (spent + spared))}) were shared between them.",
            "",
        ]
    return "\n".join(lines)


def _before(record: Mapping[str, Any]) -> str:
    return fixed(dig(record, "baseline", "perplexity", "overall"), 2)
