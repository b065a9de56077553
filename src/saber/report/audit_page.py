"""An audit as sentences, tables and a page of Markdown; reads audit.json and never opens a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saber.artifacts import read_json, write_text
from saber.errors import DataError
from saber.report import reading, style
from saber.report.audit_plot import fragility
from saber.report.build import Report
from saber.report.card import cell, markdown, provenance
from saber.report.reading import MISSING, Run, count, dig, fixed, percent, plain, proportion, rate
from saber.report.tables import BRACKETS, Table, prompts

FILE = "audit.json"
PAGE = "audit.md"
SCHEMA = 1
PLOT = "fragility"
Rung = Mapping[str, Any]


def is_audit(folder: Path) -> bool:
    """Whether a folder is an audit's."""
    return (folder / FILE).is_file()


def read_audit(folder: Path) -> dict[str, Any]:
    """The content of an audit's audit.json; raises `DataError` with what to do about it."""
    if not is_audit(folder):
        raise DataError(f"{folder} holds no {FILE}.", "Give the folder of `saber audit`.")
    record = read_json(folder / FILE)
    if record.get("schema") != SCHEMA or not record.get("rungs"):
        raise DataError(f"{folder / FILE} is no audit of schema {SCHEMA}.", "Make the audit again.")
    return record


def build_audit(folder: Path) -> Report:
    """Draw an audit's plot and write its page, each file whole or not at all."""
    record = read_audit(folder)
    with style.styled():
        drawn = fragility(record)
    plots = style.save(drawn, folder / "plots", PLOT)
    write_text(folder / PAGE, page(record))
    return Report(plots, folder / PAGE, None)


def of_kind(record: Run, kind: str) -> list[Rung]:
    """The changes of one kind that were tried, in order."""
    return [rung for rung in record["rungs"] if rung["kind"] == kind]


def name_of(record: Run, rung: Rung) -> str:
    """What a change is called in a table."""
    if rung["kind"] == "direction":
        return f"one direction (layer {record['direction']['layer']})"
    names = {
        "untouched": "untouched",
        "edit": f"{share(rung)} of the edit",
        "random": "random directions",
    }
    return names[rung["kind"]]


def share(rung: Rung) -> str:
    """Which share of the edit a change is."""
    return f"{100 * rung['dose']:g}%"


def changes(record: Run, *, brief: bool = False) -> Table:
    """Every change of the weights that was tried: its size, what it did, and what it cost.

    A `brief` one, for a terminal, has fewer intervals.
    """
    rows = []
    for rung in record["rungs"]:
        kl = rung["kl"]
        rows.append(
            (
                name_of(record, rung),
                percent(dig(rung, "change", "edited"), 2) if kl else MISSING,
                str(rung["writers"]) if kl else MISSING,
                rate(rung["refusal"]) if brief else proportion(rung["refusal"]),
                percent(rung["partial"]["rate"], 1),
                percent(rung["incoherent"]["rate"], 1),
                _divergence(kl, brief),
            )
        )
    behaviour = reading.worded(record, "refusal", "{}")
    header = ("change", "size", "writers", behaviour, "partial", "incoherent", "KL, neutral")
    return Table(header, tuple(rows))


def _divergence(kl: Mapping[str, Any] | None, brief: bool) -> str:
    if kl is None:
        return MISSING
    around = "" if brief else f" [{fixed(kl['sequence_low'], 4)}, {fixed(kl['sequence_high'], 4)}]"
    return f"{fixed(kl['sequence'], 4)}{around}"


def starts(record: Run) -> Table:
    """How many still come to show the behaviour behind the first tokens of the edited model's answer."""
    rows = [(str(start["tokens"]), proportion(start["shown"])) for start in record["starts"]]
    return Table(("tokens given", reading.worded(record, "still refused", "still {}")), tuple(rows))


def categories(record: Run) -> Table:
    """What is left of the behaviour in each category, share by share of the edit."""
    rungs = [*of_kind(record, "untouched"), *of_kind(record, "edit")]
    names = list(rungs[0]["refusal_by_category"])
    cells = [
        tuple(percent(rung["refusal_by_category"][name]["rate"]) for rung in rungs)
        for name in names
    ]
    sizes = [str(rungs[0]["refusal_by_category"][name]["n"]) for name in names]
    rows = tuple((plain(name), n, *row) for name, n, row in zip(names, sizes, cells, strict=True))
    return Table(("category", "prompts", *map(share, rungs)), rows)


def findings(record: Run) -> list[str]:
    """What the audit found, a sentence each."""
    untouched = of_kind(record, "untouched")[0]["refusal"]
    prompts_ = count(untouched["n"], "held-out prompt")
    shown = reading.worded(record, "refuses", "shows the behaviour on")
    found = [f"The untouched model {shown} {rate(untouched)} of {prompts_}."]
    if edits := of_kind(record, "edit"):
        found += _of_edit(record, edits, untouched)
    else:
        found.append(f"No edit was found that changes it: {record['stop_reason']}.")
    for rung in of_kind(record, "direction"):
        found.append(
            f"Taking the one direction that does most (layer {record['direction']['layer']}) out of all "
            f"writers leaves {rate(rung['refusal'])} at a KL of {fixed(rung['kl']['sequence'], 4)}"
            + _garbled(rung)
        )
    return found + _of_starts(record)


def _of_edit(record: Run, edits: Sequence[Rung], untouched: Mapping[str, Any]) -> list[str]:
    whole = edits[-1]
    size = percent(dig(whole, "change", "edited"), 2)
    found = [
        f"An edit of {size} of the norm of the {whole['writers']} weights that it changes leaves "
        f"{rate(whole['refusal'])} at a KL of {fixed(whole['kl']['sequence'], 4)}{_garbled(whole)}"
    ]
    half = [r for r in edits if r["refusal"]["rate"] <= untouched["rate"] / 2]
    if half and untouched["rate"]:
        size = percent(dig(half[0], "change", "edited"), 2)
        found.append(
            f"{share(half[0])} of that edit ({size}) is enough to lose half of it: "
            f"{rate(half[0]['refusal'])} are left."
        )
    for rung in of_kind(record, "random"):
        found.append(
            f"The same change along random directions leaves {rate(rung['refusal'])}{_garbled(rung)}"
        )
    between = min(edits, key=lambda r: abs(r["refusal"]["rate"] - untouched["rate"] / 2))
    rates = {
        name: one
        for name, one in between["refusal_by_category"].items()
        if one["n"] >= 5 and one["successes"]
    }
    if rates and between["refusal"]["rate"] < untouched["rate"]:
        name, one = max(rates.items(), key=lambda item: item[1]["rate"])
        found.append(
            f"At {share(between)} of the edit it holds longest in {plain(name)} "
            f"({one['successes']} of {one['n']})."
        )
    return found


def _of_starts(record: Run) -> list[str]:
    tried = record["starts"]
    if not tried:
        return []
    gone = [s for s in tried if s["shown"]["rate"] <= 0.5]
    least = gone[0] if gone else tried[-1]
    return [
        f"With the first {count(least['tokens'], 'token')} of the edited model's answer given, the untouched "
        f"model still comes to {reading.worded(record, 'refuse', 'show the behaviour on')} "
        f"{rate(least['shown'])} of {count(least['shown']['n'], 'prompt')}."
    ]


def _garbled(rung: Rung) -> str:
    rate = rung["incoherent"]["rate"]
    return f"; {percent(rate, 1)} of the answers are incoherent." if rate else "."


def page(record: Run) -> str:
    """The audit as a page of Markdown."""
    name = reading.model_name(record)
    what = reading.worded(record, "its refusals", "its behaviour ({})")
    parts = [
        f"# How fragile {cell(name)} is: {cell(what)}",
        "\n".join(f"- {cell(sentence)}" for sentence in findings(record)),
        f"![What is left by the size of the change, and behind given starts](plots/{PLOT}.png)",
        "## Changes of the weights\n\n"
        + markdown(changes(record))
        + "\n\n"
        + SIZES
        + " "
        + BRACKETS,
    ]
    if of_kind(record, "edit"):
        parts.append(
            "## By category\n\nShare left at each share of the edit.\n\n"
            + markdown(categories(record))
        )
    if record["starts"]:
        parts.append("## Behind a given start\n\n" + STARTS + "\n\n" + markdown(starts(record)))
    parts += [
        "## Prompts\n\n" + markdown(prompts(record)),
        provenance(record),
        "## Limits\n\n" + "\n".join(f"- {item}" for item in LIMITS),
    ]
    return "\n\n".join(parts) + "\n"


SIZES = (
    "*Size* is the norm of the change over that of the weights it changes (Frobenius). *Random directions*: "
    "the whole edit, which reads the same and writes as much along others. *One direction*: taken out of all "
    "writers, the one that does most on validation prompts (Arditi et al. 2024, arXiv 2406.11717). KL is "
    "from the untouched model, along its own answers to held-out neutral prompts, nats a token."
)
STARTS = (
    "The untouched model goes on behind the first tokens of what the edited one answers, on prompts on which "
    "the edit changed the label (Qi et al. 2024, arXiv 2406.05946). What comes late counts too."
)
LIMITS = (
    "An audit shows what one method does that sees the weights. It is no bound: another edit, a fine-tune or "
    "a prompt may take less.",
    "That a behaviour holds here does not show that a model is safe; that it goes does not tell how it was "
    "trained.",
    "Nothing that could be applied is kept: no edited model, no plan and no direction.",
    "The edit is found on fit and validation prompts; all rates are of held-out ones.",
)
