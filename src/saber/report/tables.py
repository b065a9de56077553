"""The tables of a report as plain cells, for the card's Markdown and the page's HTML alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from saber.report import reading
from saber.report.reading import (
    MISSING,
    PRIME,
    Run,
    both,
    categories,
    dig,
    fixed,
    known,
    number,
    p_value,
    percent,
    plain,
    points,
    proportion,
    relative,
)

Form = Callable[[Any], str]
"""Puts a value into words."""


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; nothing in it is escaped."""

    header: tuple[str, ...]
    """Names of the columns."""
    rows: tuple[tuple[str, ...], ...]
    """As many cells in each row as the header has."""
    words: bool = False
    """Whether the columns are text rather than numbers."""


BRACKETS = (
    "Brackets are 95% intervals: of rates Wilson's, in per cent; of KL a bootstrap's, in nats."
)
"""What stands under the table of results."""


def results(run: Run) -> Table:
    """Every headline measurement: base, edited, change; a bracket is a 95% interval."""
    rows: list[tuple[str, ...]] = []

    def add(name: str, form: Form, gap: Callable[[Any, Any], str], *path: str) -> None:
        before, after = both(run, *path)
        if before is None and after is None:
            return
        rate = form is proportion
        change = gap(dig(before, "rate"), dig(after, "rate")) if rate else gap(before, after)
        rows.append((name, form(before), form(after), change))

    name = reading.behaviour(run)
    over = "over-refusal" if reading.refusals(run) else name
    narrow = reading.narrow(run)
    if narrow:
        lead = reading.inside(reading.lowered_name(run))
        add(f"{lead}, held-out borderline prompts", proportion, points, *reading.lowered(run))
        if run.get("edited") is not None:
            right = f"{reading.inside(reading.right_name(run))}, held-out target prompts"
            rows.append((right, number(dig(run, "baseline", "refusal", "successes")),
                         reading.right_kept(run), ""))  # fmt: skip
    add(f"{name}, held-out target prompts", proportion, points, "refusal")
    add("· seen categories", proportion, points, "refusal_seen")
    add("· unseen categories", proportion, points, "refusal_unseen")
    add("partial answers, target prompts", proportion, points, "partial")
    add("incoherent answers, target prompts", proportion, points, "incoherent")
    if not narrow:
        add(f"{over}, borderline prompts", proportion, points, "over_refusal", "borderline")
    add(f"{over}, neutral prompts", proportion, points, "over_refusal", "neutral")
    add(f"{over}, everyday prompts", proportion, points, "over_refusal", "everyday")
    for kept in categories(run, "kept"):
        title = plain(kept.removesuffix("/heldout"))
        add(f"{name}, kept prompts ({title})", proportion, points, "kept", kept, "refusal")
        kl = dig(run, "edited", "kept", kept, "kl", "sequence")
        if known(kl) is not None:
            alone = _alone(dig(run, "baseline", "kept", kept, "kl") or {}, "sequence")
            rows.append((f"· KL(base ‖ edited) per token, {title}, nats", alone, number(kl), ""))
    add("perplexity, battery reference answers", number, relative, "perplexity", "overall")
    for name in categories(run, "perplexity", "by_category"):
        add(f"· {plain(name)}", number, relative, "perplexity", "by_category", name)
    add("perplexity, the base's own answers", number, relative, "perplexity", "own_answers")
    add("perplexity, user-prompt text (the original card's)", number, relative,
        "perplexity", "prompt_text", "overall")  # fmt: skip
    before, after = both(run, "accuracy")
    if before is not None:
        rows.append(("accuracy, battery", _accuracy(before), _accuracy(after),
                     points(dig(before, "overall"), dig(after, "overall"))))  # fmt: skip
    for name in categories(run, "accuracy", "by_category"):
        add(f"· {plain(name)}", lambda x: percent(x, 1), points, "accuracy", "by_category", name)
    for kind, where in (("kl", ""), ("kl_everyday", ", everyday prompts")):
        rows += _divergence(dig(run, "edited", kind), dig(run, "baseline", kind) or {}, where)
    return Table(("metric", "base", "edited", "change"), tuple(rows))


def _divergence(kl: Any, base: Any, where: str) -> list[tuple[str, ...]]:
    """Return the rows of a divergence, none where it was not measured."""
    if kl is None:
        return []

    def mean_of(name: str) -> str:
        low, high = known(kl.get(f"{name}_low")), known(kl.get(f"{name}_high"))
        ends = f" [{number(low)}, {number(high)}]" if low is not None else ""
        return number(kl.get(name)) + ends

    rows: list[tuple[str, ...]] = [
        (
            f"KL(base ‖ edited), first token{where}, nats",
            _alone(base, "first_token"),
            mean_of("first_token"),
            "",
        )
    ]
    ends = (("p95", "sequence_p95"), ("max", "sequence_max"))
    tail = [f"{name} {number(kl[key])}" for name, key in ends if known(kl.get(key)) is not None]
    mean = mean_of("sequence") + (f" ({', '.join(tail)})" if tail else "")
    label = f"KL(base ‖ edited), per token of the base's answers{where}, nats"
    rows.append((label, _alone(base, "sequence"), mean, ""))
    if known(kl.get("sequence_median")) is not None:
        median = _alone(base, "sequence_median")
        rows.append(("· median prompt", median, number(kl["sequence_median"]), ""))
    return rows


def _alone(base: Any, name: str) -> str:
    """Return what the base diverges from itself: in 16 bits rounding alone makes it."""
    found = known(base.get(name))
    return f"{number(found)} (rounding alone)" if found else "0"


def _accuracy(value: Any) -> str:
    if known(dig(value, "overall")) is None:
        return MISSING
    text = percent(value["overall"], 1)
    low, high = known(dig(value, "low")), known(dig(value, "high"))
    if low is not None and high is not None:
        text += f" [{100 * low:.1f}, {100 * high:.1f}]"
    return text + (f", n = {value['n']}" if dig(value, "n") is not None else "")


def comparisons(run: Run) -> tuple[str, ...]:
    """The paired tests in words, one sentence each."""
    found = run.get("comparison") or {}
    shown = reading.worded(run, "refused by", "answered with it by")
    pair = (
        ("refusal", (reading.worded(run, "Refusal", "{}"), shown)),
        ("over_refusal", (reading.worded(run, "Over-refusal", "{} on borderline prompts"), shown)),
    )
    what = {
        **dict(pair[::-1] if reading.narrow(run) else pair),
        "accuracy": ("Accuracy", "answered correctly by"),
    }
    said = [
        f"{name}: {reading.count(test.get('b'), 'prompt')} {verb} the base alone, "
        f"{number(test.get('c'))} by the edited model alone "
        f"(exact McNemar test, {p_value(test.get('p_value'))})."
        for key, (name, verb) in what.items() if (test := found.get(key))
    ]  # fmt: skip
    ratio = found.get("perplexity_ratio") or {}
    if known(ratio.get("estimate")) is not None:
        said.append(
            f"Perplexity of the reference answers, edited / base: {ratio['estimate']:.3f}, "
            f"95% interval {fixed(ratio.get('low'), 3)} to {fixed(ratio.get('high'), 3)} "
            "(paired bootstrap)."
        )
    return tuple(said)


def by_category(run: Run) -> Table:
    """Refusals of held-out target prompts, category by category."""
    rows = []
    for name in categories(run, "refusal_by_category"):
        before, after = both(run, "refusal_by_category", name)
        rows.append((plain(name), proportion(before), proportion(after)))
    return Table(("category", "base", "edited"), tuple(rows))


def by_length(run: Run) -> Table:
    """Answers to held-out targets, judged at several lengths, where that was asked for."""
    rows = []
    before, after = both(run, "lengths")
    for i, cut in enumerate(before or []):
        later = (after or [])[i] if i < len(after or []) else {}
        for key in ("refusal", "partial", "incoherent"):
            kind = reading.behaviour(run) if key == "refusal" else key
            rows.append(
                (str(cut["tokens"]), kind, proportion(cut.get(key)), proportion(later.get(key)))
            )
    return Table(("tokens", "label", "base", "edited"), tuple(rows))


def kept_by_category(run: Run) -> Table:
    """Refusals of held-out prompts whose answers were to stay, category by category."""
    rows = []
    for name in categories(run, "kept"):
        for category in categories(run, "kept", name, "refusal_by_category"):
            before, after = both(run, "kept", name, "refusal_by_category", category)
            title = plain(name.removesuffix("/heldout"))
            rows.append((title, plain(category) or MISSING, proportion(before), proportion(after)))
    return Table(("kept set", "category", "base", "edited"), tuple(rows))


def search(run: Run) -> Table:
    """The strengths that were tried on validation prompts, with the one that was taken."""
    rows = []
    for one in reading.passes(run):
        for t in one.get("search") or []:
            shown = t.get("shown") or {}
            rows.append((
                str(one.get("index", MISSING)), number(t.get("lambda")), number(t.get("boost")),
                percent(t.get("opening"), 1),
                number(t.get("kl_first")), number(t.get("kl_sequence")),
                percent(shown.get("rate")), percent(shown.get("incoherent")),
                percent(shown.get("lost")),
                "taken" if t.get("chosen") else "failed" if t.get("failed") else "",
            ))  # fmt: skip
    return Table(
        ("pass", "λ", "boost", reading.worded(run, "opens with a refusal", "opens with it"),
         "KL, first token", "KL, per token", reading.worded(run, "refusals", "show it"),
         "incoherent", "kept answers changed", ""), tuple(rows),
    )  # fmt: skip


def hydra(run: Run) -> Table:
    """What each pass found, did, and left behind."""
    rows = []
    for i, one in enumerate(reading.passes(run), 1):
        state = one.get("hydra") or {}
        taken = one.get("directions") or []
        layers = sorted({d["layer"] for d in taken})
        kappa = state.get("compensation")
        rows.append((
            str(one.get("index", i)),
            str(len(taken)),
            ", ".join(str(layer) for layer in layers) or MISSING,
            fixed(one.get("log_odds_before")),
            fixed(one.get("log_odds_after")),
            percent(one.get("rate_after")),
            f"{fixed(state.get('top_d_prime'))} (layer {number(state.get('top_layer'))})",
            fixed(state.get("top_auroc"), 3),
            number(state.get("dormant")),
            f"{fixed(kappa.get('estimate'))} [{fixed(kappa.get('low'))}, "
            f"{fixed(kappa.get('high'))}]" if kappa else MISSING,
        ))  # fmt: skip
    return Table(
        ("pass", "directions", "layers", "log-odds before", "after",
         reading.worded(run, "validation refusals after", "validation, {} after"), f"top d{PRIME} at start",
         "top AUROC", "dormant woken", "compensation κ"), tuple(rows),
    )  # fmt: skip


def directions(run: Run) -> Table:
    """Every direction that was ablated, in order."""
    rows = [
        (str(index), str(d["layer"]), str(d.get("component", MISSING)), fixed(d.get("d_prime")),
         f"{fixed(d.get('auroc'), 3)} [{fixed(d.get('auroc_low'), 3)}, "
         f"{fixed(d.get('auroc_high'), 3)}]",
         number(d.get("q_value")), fixed(d.get("causal")), fixed(d.get("purity"), 3),
         f"{number(d.get('worst_entanglement'))} ({plain(str(d.get('worst_category') or MISSING))})",
         percent(d.get("null_percentile")), fixed(d.get("strength")), number(d.get("lambda")),
         percent(d.get("removed")), number(d.get("collateral")), str(d.get("status", "")))
        for index, d in reading.ablated(run)
    ]  # fmt: skip
    return Table(
        ("pass", "layer", "component", f"d{PRIME}", "AUROC", "q", "causal, nats", "purity",
         "worst entanglement", "of random null", "strength", "λ", "removed on targets",
         "collateral", "status"), tuple(rows),
    )  # fmt: skip


def prompts(run: Run) -> Table:
    """The prompt sets: sizes by split, and the fingerprint that names their exact content."""
    rows = []
    sets = dict(run.get("prompts") or {})
    kept = [("kept", one) for one in sets.pop("kept", [])]
    for kind, one in [*sets.items(), *kept]:
        if one is None:
            # A set that the run did without: other targets have no borderline prompts of their own.
            continue
        if "fit" in one:
            size = (f"{one['fit']} fit, {one.get('validation', 0)} validation, "
                    f"{one.get('heldout', 0)} held out")  # fmt: skip
        else:
            size = number(one.get("n"))
            inside = one.get("categories")
            size += f" in {reading.count(len(inside), 'category', 'categories')}" if inside else ""
        if one.get("left_out"):
            size += f"; {one['left_out']} left out, as the behaviour shows there too"
        named = (str(one.get(key, MISSING)) for key in ("name", "fingerprint"))
        stays = kind == "target" and reading.narrow(run)
        rows.append(("target, kept" if stays else kind, size, *named))
    return Table(("set", "prompts", "name", "fingerprint"), tuple(rows), words=True)


def settings(run: Run, words: tuple[str, ...]) -> tuple[str, ...]:
    """The settings whose name holds one of `words`, as `section.name = value`."""
    found: list[str] = []

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                walk(value, f"{path}.{key}" if path else key)
        elif node is not None and any(word in path.rsplit(".", 1)[-1] for word in words):
            found.append(f"{path} = {node}")

    walk(run.get("config") or {}, "")
    return tuple(found)


def facts(value: Any) -> Table:
    """A flat mapping as two columns, nested keys joined with dots."""
    rows: list[tuple[str, str]] = []

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict) and node:
            for key, inner in node.items():
                walk(inner, f"{path}.{key}" if path else str(key))
        else:
            rows.append((path, "not set" if node is None else str(node)))

    walk(dict(value or {}), "")
    return Table(("name", "value"), tuple(rows) if value else (), words=True)
