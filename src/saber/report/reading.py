"""Take numbers out of a run and put them into words; what is missing reads as a dash."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

Run = Mapping[str, Any]
"""The content of run.json, schema 1."""

MISSING = "–"
MINUS = "\N{MINUS SIGN}"
PRIME = "\N{PRIME}"


def dig(value: Any, *keys: str) -> Any:
    """The value at a path of keys, or None where the path breaks off."""
    for key in keys:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def known(value: Any) -> float | None:
    """A finite number as a float; anything else is None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def number(value: Any, *, signed: bool = False) -> str:
    """About three significant digits: 0.0135, 1.04, 12.3, 498, 1,204."""
    x = known(value)
    if x is None:
        return MISSING
    size = abs(x)
    if size == 0 or (isinstance(value, int) and size < 1000):
        text = f"{size:.0f}"
    elif size >= 99.95:
        text = f"{size:,.0f}"
    elif size >= 9.995:
        text = f"{size:.1f}"
    elif size >= 0.9995:
        text = f"{size:.2f}"
    else:
        text = f"{size:.1e}" if size < 1e-4 else f"{size:.2g}" if size < 0.01 else f"{size:.3g}"
    return ("" if x >= 0 and not signed else "+" if x >= 0 else MINUS) + text


def fixed(value: Any, digits: int = 2) -> str:
    """A number with so many digits behind the point, for columns that are read downwards."""
    x = known(value)
    return MISSING if x is None else f"{x:.{digits}f}".replace("-", MINUS)


def percent(value: Any, digits: int | None = None) -> str:
    """A rate in per cent, whole unless the rate is within a point of none or all."""
    x = known(value)
    if x is None:
        return MISSING
    if digits is None:
        digits = 1 if 0 < x < 0.01 or 0.99 < x < 1 else 0
    return f"{100 * x:.{digits}f}%"


def points(before: Any, after: Any) -> str:
    """The change of a rate in percentage points."""
    a, b = known(before), known(after)
    if a is None or b is None:
        return MISSING
    change = round(100 * (b - a), 1)
    return f"{'+' if change > 0 else MINUS if change < 0 else ''}{abs(change):.1f} points"


def relative(before: Any, after: Any) -> str:
    """The change of a positive amount in per cent of what it was."""
    a, b = known(before), known(after)
    if a is None or b is None or a <= 0:
        return MISSING
    change = round(100 * (b / a - 1), 1)
    return f"{'+' if change > 0 else MINUS if change < 0 else ''}{abs(change):.1f}%"


def proportion(value: Any) -> str:
    """A proportion with its 95% interval and counts: `0.9% [0.2, 4.9], 1/112`."""
    if dig(value, "rate") is None:
        return MISSING
    text = percent(value["rate"], 1)
    low, high = known(dig(value, "low")), known(dig(value, "high"))
    if low is not None and high is not None:
        text += f" [{100 * low:.1f}, {100 * high:.1f}]"
    if dig(value, "n") is not None and dig(value, "successes") is not None:
        text += f", {value['successes']}/{value['n']}"
    return text


def rate(value: Mapping[str, Any]) -> str:
    """A rate with its interval: `3.1% (0.6-15.7)`."""
    return f"{percent(value['rate'], 1)} ({100 * value['low']:.1f}-{100 * value['high']:.1f})"


def p_value(value: Any) -> str:
    """`p = 0.031`, or an upper bound where the digits no longer matter."""
    p = known(value)
    if p is None:
        return f"p {MISSING}"
    return "p < 0.000001" if p < 1e-6 else f"p = {p:.2g}" if p < 0.9995 else "p = 1"


def count(n: Any, noun: str, plural: str | None = None) -> str:
    """A number of things: `1 layer`, `10 layers`."""
    if known(n) is None:
        return f"{MISSING} {plural or noun + 's'}"
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def amount(value: Any) -> str:
    """A large count in short: 135M, 7.2B."""
    x = known(value)
    if x is None:
        return MISSING
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:.3g}{unit}"
    return f"{x:.0f}"


def duration(seconds: Any) -> str:
    """Seconds as a person says them: `9.1 s`, `4 min 12 s`, `2 h 05 min`."""
    x = known(seconds)
    if x is None:
        return MISSING
    if x < 59.95:
        return f"{x:.1f} s"
    if x < 3600:
        return f"{int(x) // 60} min {int(x) % 60:02d} s"
    return f"{int(x) // 3600} h {int(x) % 3600 // 60:02d} min"


def short(name: str) -> str:
    """A name of the code in a word: `instruction_following` -> `instruction`."""
    words = plain(name)
    return words if len(words) <= 10 else words.split()[0][:11]


def plain(name: str) -> str:
    """A name of the code as words: `instruction_following` -> `instruction following`."""
    return name.replace("_", " ")


def passes(run: Run) -> list[Mapping[str, Any]]:
    """The passes in order; none in a run that only measured."""
    return list(run.get("passes") or [])


def search_note(run: Run) -> str:
    """What was not as usual when strengths were tried; empty where nothing was."""
    notes = []
    for one in passes(run):
        where = f"pass {one.get('index', MISSING)}"
        if one.get("by_answers"):
            notes.append(
                f"In {where} first tokens told nothing of the behaviour: each strength was told by answers."
            )
        notes += [
            f"In {where} λ {number(t.get('lambda'))} with boost {number(t.get('boost'))} failed "
            f"and ended the search: {t['failed']}"
            for t in one.get("search") or []
            if t.get("failed")
        ]
    return " ".join(notes)


def candidates(run: Run, first_pass_only: bool = False) -> list[Mapping[str, Any]]:
    """Every scored direction; those ablated are among them even if a run lists them apart."""
    found: list[Mapping[str, Any]] = []
    for one in passes(run)[: 1 if first_pass_only else None]:
        found.extend(one.get("candidates") or one.get("directions") or [])
    return found


def ablated(run: Run) -> list[tuple[int, Mapping[str, Any]]]:
    """Every direction taken out, with the number of its pass."""
    return [
        (p.get("index", i + 1), d)
        for i, p in enumerate(passes(run))
        for d in p.get("directions") or []
    ]


def taken(run: Run) -> list[Mapping[str, Any]]:
    """The directions that entanglement is told of: those ablated, or else the first pass's candidates."""
    return [d for _, d in ablated(run)] or candidates(run, first_pass_only=True)


def median_purity(run: Run) -> float | None:
    """Median purity of those directions."""
    purities = [x for d in taken(run) if (x := known(d.get("purity"))) is not None]
    return median(purities) if purities else None


def worst(run: Run) -> Mapping[str, Any] | None:
    """The most entangled of those directions."""
    scored = [d for d in taken(run) if known(d.get("worst_entanglement")) is not None]
    return max(scored, key=lambda d: d["worst_entanglement"], default=None)


def entanglement_name(run: Run) -> str:
    """What measured the entanglement, as docs/method.md calls it."""
    measure = str(dig(run, "config", "entanglement", "measure"))
    return {"energy": "energy ratio", "overlap": "subspace overlap"}.get(measure, "entanglement")


def categories(run: Run, *path: str) -> list[str]:
    """The category names at `path` of either measurement, in the order they were measured."""
    names: dict[str, None] = {}
    for side in ("baseline", "edited"):
        names.update(dict.fromkeys(dig(run, side, *path) or {}))
    return list(names)


def both(run: Run, *path: str) -> tuple[Any, Any]:
    """The value at `path` in the baseline and in the edited measurement."""
    return dig(run, "baseline", *path), dig(run, "edited", *path)


def change(run: Run, form: Any, *path: str) -> str:
    """`97% → 0.9%`, or the baseline alone where nothing was edited."""
    before, after = both(run, *path)
    return form(before) if after is None else f"{form(before)} → {form(after)}"


def model_name(run: Run) -> str:
    """What the model is called; of a folder or a file on this machine only the last part."""
    name = str(dig(run, "model", "name") or "model")
    local = dig(run, "model", "source") in ("folder", "gguf")
    return (name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] or name) if local else name


def behaviour(run: Run) -> str:
    """What targets show, in a word or two: `refusal` unless the run says otherwise."""
    return str(dig(run, "config", "data", "behaviour") or "refusal")


def refusals(run: Run) -> bool:
    """Whether the run is about refusals, which the report has words of its own for."""
    return behaviour(run) == "refusal"


def worded(run: Run, refusal: str, other: str) -> str:
    """The wording for refusals, or the one for another behaviour with its name in place of {}."""
    name = behaviour(run)
    if not refusals(run):
        # A name at the start of a heading or a sentence is its start.
        return other.format(name[:1].upper() + name[1:] if other.startswith("{}") else name)
    return refusal


def narrow(run: Run) -> bool:
    """Whether false refusals alone were to go (`--mode over-refusal`)."""
    return dig(run, "config", "data", "mode") == "over-refusal"


def fitted(run: Run) -> str:
    """The prompt set that directions are fitted on, against neutral prompts."""
    return "borderline" if narrow(run) else "target"


def lowered(run: Run) -> tuple[str, ...]:
    """Where the proportion is that the run was to lower."""
    return ("over_refusal", "borderline") if narrow(run) else ("refusal",)


def lowered_name(run: Run) -> str:
    """What that proportion is called at the start of a line."""
    if narrow(run):
        return worded(run, "False refusals", "{} where it is wrong")
    return worded(run, "Refusals", "{}")


def where(run: Run) -> str:
    """The prompts that proportion is of: `112 held-out prompts`."""
    noun = "held-out borderline prompt" if narrow(run) else "held-out prompt"
    n = dig(run, "baseline", *lowered(run), "n")
    return f"{noun}s" if n is None else count(n, noun)


def right_kept(run: Run) -> str:
    """Held-out targets that showed the behaviour and still do: `99/105`; a dash where not compared."""
    shown = dig(run, "baseline", "refusal", "successes")
    lost = dig(run, "comparison", "refusal", "b")
    return MISSING if shown is None or lost is None else f"{shown - lost}/{shown}"


def right_name(run: Run) -> str:
    """What those are called, at the start of a line."""
    return worded(run, "Right refusals kept", "Kept where it is right")


def inside(name: str) -> str:
    """A name within a line or a sentence."""
    return name[:1].lower() + name[1:]


def finding(run: Run) -> str:
    """The run in one line: `Refusals 97% → 0.9% on 112 held-out prompts`."""
    rates, prompts = change(run, percent, *lowered(run), "rate"), where(run)
    if run.get("edited") is None and refusals(run):
        return f"The untouched model refuses {rates} of {prompts}"
    said = f"{lowered_name(run)}{'' if refusals(run) else ':'} {rates} on {prompts}"
    if narrow(run) and run.get("edited") is not None:
        said += f"; {inside(right_name(run))} {right_kept(run)}"
    return said
