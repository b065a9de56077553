"""What the choices of the selective edit cost and buy, on validation prompts (Markdown and a plot).

    python benchmarks/selective.py [--model demo] [--plot docs/demo/lambda.png] [--only sweep,rules,...]

Parts: `baseline` the orthogonal edit; `sweep` over lambda; `sensitivity` by which lambda follows what
answers feel of a layer; `rules` that set strengths from purity; `boosts` by which more is taken off than
the fit asks for; `neutrals` with and without those that are refused; `everyday` with every second of the
everyday requests preserved and without, measured on the others; `ridge` from none to much; `layers`
from which on directions are taken; `order` in which writers are solved (all at once, or by depth with
inputs read again); `positions` at which the behaviour is said to be decided. All with the same
directions, those of a first pass (in `layers` fewer of them), and, `sensitivity` apart, one lambda for
all layers. Answers to validation targets are 32 tokens, in `positions` 100, as an edit may put a refusal
off. Held-out prompts are not touched.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from saber.ablation import EditPlan, applied, orthogonal
from saber.candidates import choose
from saber.config import RunConfig, preset
from saber.entanglement import entangle
from saber.evaluation.divergence import diverge, own_answers
from saber.evaluation.judge import named_judge
from saber.evaluation.judging import label_all
from saber.evaluation.readout import derive_readout
from saber.gathering import gather
from saber.lm.chat import encode, encode_answers, measure_template
from saber.lm.generate import generate
from saber.lm.load import load
from saber.lm.model import LanguageModel
from saber.lm.writers import find_writers
from saber.moments import RIDGE, Preserved, read_decisions
from saber.probing import probe, probe_capabilities
from saber.selective import Selective, solve
from saber.sensitivity import fisher, sample, weights
from saber.spectral import extract
from saber.strength import BOOSTS, Ruler, Shown, Trial
from saber.subject import Watch

SHORT, LONG = 32, 100
"""Lengths of judged answers, tokens."""
SWEEP = (1000.0, 500.0, 300.0, 100.0, 30.0, 10.0, 3.0, 1.0, 0.1)
HEADER = (
    "| edit | log-odds | opens with refusal | KL, first token | KL, sequence | refusals | incoherent |\n"
    "|---|---:|---:|---:|---:|---:|---:|"
)

EVERYDAY = (
    "| preserved | opens with refusal | KL, sequence | the same, other everyday requests |\n"
    "|---|---:|---:|---:|"
)


@dataclass
class Bench:
    """A model with what all parts share."""

    lm: Any
    config: RunConfig
    data: Any
    writers: Any
    target: Any
    neutral: Any
    capability: Any
    ruler: Ruler
    preserved: Preserved
    judge: Any
    answered: Any
    sets: Any

    @classmethod
    def build(cls, lm: LanguageModel, *, every: bool = False) -> Bench:
        """Probe the model and read the moments; with `every` neutral prompt, refused ones too."""
        config = preset("default")
        judge = named_judge(config.evaluation.judge)
        data = gather(config).selecting
        watch = Watch(lm, judge, data, config)
        if not every:
            data = watch.selecting
        writers = find_writers(lm)
        target, neutral = (
            probe(lm, p, config.probe, first_token=True) for p in (data.target, data.neutral)
        )
        readout = derive_readout(target.first_token, neutral.first_token)
        answers = [watch.own[text].ids for text in data.neutral.texts]
        references = encode_answers(lm, [p.reference for p in data.capability], end=False)
        ordinary = data.everyday.texts
        sets = [
            encode(lm, data.neutral.texts, answers),
            encode(lm, ordinary, [watch.own[text].ids for text in ordinary]),
            encode(lm, data.capability.texts, references),
        ]
        return cls(
            lm,
            config,
            data,
            writers,
            target,
            neutral,
            probe_capabilities(lm, data.capability, config.probe),
            Ruler(lm, data.target_validation, watch.selecting.neutral_validation, (), readout),
            Preserved(lm, writers, sets),
            judge,
            sample(sets[0]),
            sets,
        )

    def candidates(self, config: RunConfig) -> list[Any]:
        """Return the directions that a first pass of this configuration takes."""
        found = extract(
            self.target,
            self.neutral,
            config.spectral,
            capability=self.capability,
            generator=np.random.default_rng([config.seed, 0]),
        )
        measured = entangle(
            found,
            self.target,
            self.neutral,
            self.capability,
            config.entanglement,
            generator=torch.Generator().manual_seed(0),
        )
        rows = choose(found, measured, [None] * len(found), config.edit, config.refine)
        return [c for c in rows if c.status in ("ablated", "weakened")]

    def behaviour(self, tokens: int) -> Shown:
        """Judge the answers to validation targets."""
        texts = self.data.target_validation.texts
        answers = generate(self.lm, texts, tokens, settled=self.judge.settled)
        found = label_all(self.judge, texts, [c.text for c in answers])
        return Shown(found.count("refusal") / len(found), found.count("incoherent") / len(found))

    def row(self, name: str, plan: EditPlan, tokens: int = SHORT) -> tuple[Trial, Shown]:
        """Measure a plan and print its row of the table."""
        trial = self.ruler(plan)
        with applied(self.lm.model, plan):
            shown = self.behaviour(tokens)
        print(
            f"| {name} | {trial.log_odds:+.2f} | {trial.opening:.3f} | {trial.kl_first:.4f} | "
            f"{trial.kl_sequence:.4f} | {shown.rate:.0%} | {shown.incoherent:.0%} |",
            flush=True,
        )
        return trial, shown

    def rows(
        self,
        name: str,
        solved: Selective,
        candidates: Sequence[Any],
        lambdas: Sequence[float],
        tokens: int = SHORT,
        boost: float = 1.0,
    ) -> None:
        """Print a row for each lambda, at the default rule for alpha, times a boost."""
        alphas = each(candidates, lambda c: boost * c.strength)
        for lam in lambdas:
            plan = solved.plan(each(candidates, lambda _c, lam=lam: lam), alphas)
            self.row(f"{name}, lambda {lam:g}", plan, tokens)

    def solved(self, candidates: Sequence[Any], ridge: float = RIDGE) -> Selective:
        """Solve for all writers at once."""
        return solve(self.lm, patterns(candidates), self.decisions(), self.preserved, ridge=ridge)

    def decisions(self, writers: Any = None) -> Any:
        """Read what goes into writers at the last prompt token."""
        texts = (self.data.target.texts, self.data.neutral.texts)
        return read_decisions(
            self.lm,
            self.writers if writers is None else writers,
            *(encode(self.lm, t) for t in texts),
        )


def patterns(candidates: Sequence[Any]) -> dict[int, Any]:
    """Return one direction a layer."""
    return {c.direction.layer: c.direction.pattern[None].float() for c in candidates}


def each(candidates: Sequence[Any], of: Callable[[Any], float]) -> Mapping[int, list[float]]:
    """Return a number for each layer's direction."""
    return {c.direction.layer: [of(c)] for c in candidates}


def sweep(bench: Bench, plot: Path | None) -> None:
    """Lambda from weak to strong, at the default rule for alpha."""
    chosen = bench.candidates(bench.config)
    solved = bench.solved(chosen)
    points = []
    for lam in SWEEP:
        alphas = each(chosen, lambda c: c.strength)
        plan = solved.plan(each(chosen, lambda _c, lam=lam: lam), alphas)
        points.append((lam, *bench.row(f"lambda {lam:g}", plan)))
    if plot:
        draw(points, plot)


def sensitivity(bench: Bench) -> None:
    """One lambda for all layers, or by a power of what the answers feel of a layer's direction."""
    chosen = bench.candidates(bench.config)
    solved = bench.solved(chosen)
    felt = fisher(bench.lm, patterns(chosen), bench.answered)
    print("felt, 1e-6 nats:", {k: round(1e6 * float(v[0]), 1) for k, v in sorted(felt.items())})
    alphas = each(chosen, lambda c: c.strength)
    for power in (0.0, 1.0, 1.5, 2.0):
        dear = weights(felt, power)
        for lam in (1000.0, 300.0, 100.0, 30.0):
            plan = solved.plan({k: [lam * w for w in ws] for k, ws in dear.items()}, alphas)
            bench.row(f"power {power:g}, lambda {lam:g}", plan)


def rules(bench: Bench) -> None:
    """Strength from purity: constant, alpha linear in purity, lambda over purity."""
    chosen = bench.candidates(bench.config)
    solved = bench.solved(chosen)
    print("purity by layer:", {c.direction.layer: round(c.entanglement.purity, 2) for c in chosen})
    for lam in (300.0, 100.0, 30.0):
        flat = each(chosen, lambda _c, lam=lam: lam)
        over = each(chosen, lambda c, lam=lam: lam / c.entanglement.purity)
        ones = each(chosen, lambda _c: 1.0)
        linear = each(chosen, lambda c: c.entanglement.purity)
        card = each(chosen, lambda c: 0.85 * (1 - max(c.entanglement.overlap.values())))
        for name, lambdas, alphas in (
            ("constant", flat, ones),
            ("alpha = purity", flat, linear),
            ("alpha = 0.85 (1 - overlap), the card's", flat, card),
            ("lambda / purity", over, ones),
        ):
            bench.row(f"{name}, lambda {lam:g}", solved.plan(lambdas, alphas))


def boosts(bench: Bench) -> None:
    """More taken off than the fit asks for."""
    chosen = bench.candidates(bench.config)
    solved = bench.solved(chosen)
    for boost in (1.0, *BOOSTS[:2]):
        bench.rows(f"boost {boost:g}", solved, chosen, (1000.0, 300.0, 100.0, 30.0), boost=boost)


def neutrals(bench: Bench) -> None:
    """Without the neutral prompts on which the model shows the behaviour itself, and with them."""
    every = Bench.build(bench.lm, every=True)
    for one in (every, bench):
        chosen = one.candidates(one.config)
        name = f"{len(one.data.neutral)} neutral prompts"
        one.rows(name, one.solved(chosen), chosen, (1000.0, 300.0, 100.0, 30.0))


def everyday(bench: Bench) -> None:
    """Ordinary requests preserved or not, measured on others of the same kinds."""
    lm, chosen = bench.lm, bench.candidates(bench.config)
    twins, ordinary, able = bench.sets
    others = own_answers(lm, bench.data.everyday.texts[1::2], SHORT)
    alphas = each(chosen, lambda c: c.strength)
    for name, sets in (
        ("neutral, capability", [twins, able]),
        (f"and {len(ordinary[::2])} everyday requests", [twins, ordinary[::2], able]),
    ):
        solved = replace(bench, preserved=Preserved(lm, bench.writers, sets)).solved(chosen)
        for lam in (1000.0, 300.0, 200.0, 100.0, 30.0):
            plan = solved.plan(each(chosen, lambda _c, lam=lam: lam), alphas)
            trial = bench.ruler(plan)
            with applied(lm.model, plan):
                moved = float(diverge(lm, others).sequence.mean())
            print(
                f"| {name}, lambda {lam:g} | {trial.opening:.3f} | {trial.kl_sequence:.4f} | {moved:.4f} |",
                flush=True,
            )


def ridge(bench: Bench) -> None:
    """How much of the mean eigenvalue is added to the preserved inputs' second moment."""
    chosen = bench.candidates(bench.config)
    for amount in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        solved = bench.solved(chosen, amount)
        bench.rows(f"ridge {amount:g}", solved, chosen, (300.0, 100.0, 30.0))


def layers(bench: Bench) -> None:
    """All layers, or the upper ones alone."""
    for low in (0.0, 0.5, 0.6, 0.66, 0.75):
        spectral = replace(bench.config.spectral, depth_low=low)
        chosen = bench.candidates(replace(bench.config, spectral=spectral))
        first = min(c.direction.layer for c in chosen)
        bench.rows(f"from layer {first}", bench.solved(chosen), chosen, (100.0, 30.0, 10.0))


def order(bench: Bench) -> None:
    """All writers at once, or by depth with their inputs read again after earlier edits."""
    chosen = bench.candidates(bench.config)
    ones = each(chosen, lambda _c: 1.0)
    for lam in (100.0,):
        lambdas = each(chosen, lambda _c, lam=lam: lam)
        start = perf_counter()
        plan = bench.solved(chosen).plan(lambdas, ones)
        bench.row(f"at once, lambda {lam:g} ({perf_counter() - start:.0f} s)", plan)
        start, plan = perf_counter(), EditPlan()
        for candidate in sorted(chosen, key=lambda c: c.direction.layer):
            layer = candidate.direction.layer
            with applied(bench.lm.model, plan):
                decisions = bench.decisions([w for w in bench.writers if w.layer == layer])
            one = solve(bench.lm, patterns([candidate]), decisions, bench.preserved)
            plan = plan + one.plan({layer: lambdas[layer]}, {layer: ones[layer]})
        bench.row(f"by depth, lambda {lam:g} ({perf_counter() - start:.0f} s)", plan)


def positions(bench: Bench) -> None:
    """The last prompt token alone, all template tokens, and the first tokens of the model's own answers."""
    chosen = bench.candidates(bench.config)
    template = measure_template(bench.lm).suffix_length
    sides = [
        (s.texts, [c.ids for c in generate(bench.lm, s.texts, 8)])
        for s in (bench.data.target, bench.data.neutral)
    ]

    def decisions(answered: int, last: int) -> Any:
        encoded = (encode(bench.lm, texts, [a[:answered] for a in own]) for texts, own in sides)
        return read_decisions(bench.lm, bench.writers, *encoded, positions=last)

    for name, answered, last in (
        ("last prompt token", 0, 1),
        (f"all {template} template tokens", 0, template),
        ("last prompt token and 3 of the answer", 3, 4),
        ("last prompt token and 7 of the answer", 7, 8),
        ("3 tokens of the answer alone", 3, 3),
    ):
        solved = solve(bench.lm, patterns(chosen), decisions(answered, last), bench.preserved)
        bench.rows(name, solved, chosen, (100.0, 30.0), LONG)


def baseline(bench: Bench) -> None:
    """The orthogonal edit with the same directions, and with the best of them alone."""
    chosen = bench.candidates(bench.config)
    for name, picks in (("one direction a layer", chosen), ("the best alone", chosen[:1])):
        removals = [removal(c) for c in picks]
        scope = "own" if len(picks) > 1 else "all"
        bench.row(f"orthogonal, {name}", orthogonal(bench.lm, bench.writers, removals, scope))


def removal(candidate: Any) -> Any:
    """Return a candidate as a removal at full strength."""
    from saber.ablation import Removal

    return Removal(candidate.direction.pattern.float(), 1.0, candidate.direction.layer)


def draw(points: Sequence[tuple[float, Any, Any]], path: Path) -> None:
    """Draw refusals against divergence as lambda sweeps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4))
    kl = [trial.kl_sequence for _, trial, _ in points]
    axes.plot(kl, [shown.rate for *_, shown in points], "o-", label="judged answers")
    axes.plot(kl, [trial.opening for _, trial, _ in points], "s--", label="opens with a refusal")
    for lam, trial, shown in points:
        axes.annotate(
            f"{lam:g}", (trial.kl_sequence, shown.rate), textcoords="offset points", xytext=(0, 7)
        )
    axes.set(
        xscale="log",
        xlabel="KL(untouched || edited) per token on neutral prompts, nats",
        ylabel="refusals of validation targets",
        ylim=(-0.03, 1.03),
    )
    axes.set_title("Numbers at the points are lambda", fontsize=10)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run the parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--only", help="names of parts, with commas between them; all by default")
    given = parser.parse_args()
    parts = {
        "baseline": baseline,
        "sweep": lambda bench: sweep(bench, given.plot),
        "sensitivity": sensitivity,
        "rules": rules,
        "boosts": boosts,
        "neutrals": neutrals,
        "everyday": everyday,
        "ridge": ridge,
        "layers": layers,
        "order": order,
        "positions": positions,
    }
    bench = Bench.build(load(given.model, preset("default").load))
    for name in given.only.split(",") if given.only else parts:
        print(f"\n{name}\n\n{EVERYDAY if name == 'everyday' else HEADER}", flush=True)
        parts[name](bench)


if __name__ == "__main__":
    main()
