"""The line search takes the weakest edit that does, and says what it tried."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conftest import make_lm

from saber import strength
from saber.ablation import EditPlan, Factor
from saber.errors import NonFinite
from saber.evaluation.readout import Readout
from saber.lm.chat import encode
from saber.lm.forward import forward
from saber.lm.writers import find_writers
from saber.prompts import Prompt, PromptSet
from saber.strength import BOOSTS, LAMBDAS, Ruler, Shown, Trial, search


class Fake(Ruler):
    """Openings and answers by lambda, and a record of what was asked."""

    usual = 0.004

    def __init__(self, opening, amiss, monkeypatch):  # no model is asked
        self.opening, self.amiss, self.generated = opening, amiss, []
        self.current = None

        @contextmanager
        def applied(_model, plan):
            self.current = plan
            yield

        monkeypatch.setattr(strength, "applied", applied)

    def openings(self, lambda_):
        return Trial(lambda_, self.opening[lambda_], 0.0)

    def cost(self, trial):
        return replace(trial, kl_sequence=0.01)

    def behaviour(self):
        self.generated.append(self.current.lambda_)
        found = self.amiss[self.current.lambda_]
        return found if isinstance(found, Shown) else Shown(found)

    def run(self, **options):
        plan, trials = search(make_lm(), named, self, self.behaviour, **options)
        chosen = [t.lambda_ for t in trials if t.chosen]
        boosts = [t.boost for t in trials if t.chosen]
        assert [plan.lambda_] in (chosen, [*zip(chosen, boosts, strict=True)])
        return plan.lambda_, trials


class Plan(EditPlan):
    """A plan that says what it is."""


def named(lambda_, boost):
    plan = Plan()
    object.__setattr__(plan, "lambda_", lambda_ if boost == 1 else (lambda_, boost))
    return plan


def openings(threshold):
    return {lam: 0.5 if lam > threshold else 0.001 for lam in LAMBDAS}


def test_the_weakest_edit_that_does_is_taken_and_nothing_stronger_is_tried(monkeypatch):
    fake = Fake(openings(100), dict.fromkeys(LAMBDAS, 0.05), monkeypatch)
    chosen, trials = fake.run()
    assert chosen == 100.0
    assert [t.lambda_ for t in trials] == [1000.0, 300.0, 100.0]
    assert fake.generated == [100.0]
    assert [t.shown for t in trials] == [None, None, Shown(0.05)]
    assert [t.kl_sequence for t in trials] == [None, None, 0.01]


def test_stronger_edits_are_tried_when_answers_are_amiss_and_the_best_is_taken(monkeypatch):
    amiss = {100.0: 0.5, 30.0: 0.3, 10.0: 0.2, 3.0: 0.17, 1.0: 0.0}
    fake = Fake(openings(100), amiss, monkeypatch)
    assert fake.run()[0] == 3.0
    assert fake.generated == [100.0, 30.0, 10.0, 3.0]  # 3.0 set 3 points right: no more


def test_a_stronger_edit_that_sets_nothing_right_is_the_last(monkeypatch):
    fake = Fake(openings(100), {**dict.fromkeys(LAMBDAS, 0.0), 100.0: 0.3, 30.0: 0.28}, monkeypatch)
    assert fake.run()[0] == 30.0
    assert fake.generated == [100.0, 30.0]


def at_once(lambda_, boosts):
    """Shares by lambda, then by boost; all of it shows at once."""
    found = {**dict.fromkeys(LAMBDAS, 0.2), **{(lambda_, b): v for b, v in boosts.items()}}
    return {k: Shown(v, at_once=v) for k, v in found.items()}


def test_where_behaviour_shows_at_once_more_is_taken_off(monkeypatch):
    fake = Fake(openings(100), at_once(100.0, {1.5: 0.1, 2.0: 0.08, 3.0: 0.08}), monkeypatch)
    assert fake.run(aim=0.05, boosts=BOOSTS)[0] == (100.0, 2.0)
    assert fake.generated == [100.0, 30.0, (100.0, 1.5), (100.0, 2.0), (100.0, 3.0)]


def test_fit_targets_do_not_decide_whether_more_is_taken_off(monkeypatch):
    """They are fitted where behaviour shows at once: what others still show goes on to count."""
    shown = at_once(100.0, {1.5: 0.1, 2.0: 0.04})
    shown = {k: replace(v, pooled=0.1, pooled_incoherent=0.0) for k, v in shown.items()}
    fake = Fake(openings(100), shown, monkeypatch)
    assert fake.run(aim=0.05, boosts=BOOSTS)[0] == (100.0, 2.0)


@pytest.mark.parametrize(("lost", "taken"), [(0.05, (100.0, 1.5)), (0.07, 100.0)])
def test_more_is_not_taken_off_at_the_cost_of_kept_answers(lost, taken, monkeypatch):
    """However many targets it would set right: those are few, and one of them weighs more than a kept one."""
    shown = at_once(100.0, {1.5: 0.1, 2.0: 0.1})
    shown = {k: replace(v, lost=0.05) for k, v in shown.items()}
    shown[(100.0, 1.5)] = replace(shown[(100.0, 1.5)], lost=lost)
    fake = Fake(openings(100), shown, monkeypatch)
    assert fake.run(aim=0.05, boosts=BOOSTS)[0] == taken


def test_more_is_taken_off_no_longer_than_needed(monkeypatch):
    fake = Fake(openings(100), at_once(100.0, {1.5: 0.04}), monkeypatch)
    assert fake.run(aim=0.05, boosts=BOOSTS)[0] == (100.0, 1.5)
    assert fake.generated[-1] == (100.0, 1.5)


@pytest.mark.parametrize("left", [Shown(0.3, at_once=0.04), Shown(0.3)])
def test_what_comes_late_or_is_not_told_apart_is_no_reason_to_take_more_off(left, monkeypatch):
    fake = Fake(openings(100), dict.fromkeys(LAMBDAS, left), monkeypatch)
    assert fake.run(aim=0.05, boosts=BOOSTS)[0] == 100.0
    assert fake.generated == [100.0, 30.0]


def test_of_equals_the_weaker_is_taken(monkeypatch):
    fake = Fake(openings(100), dict.fromkeys(LAMBDAS, 0.3), monkeypatch)
    assert fake.run()[0] == 100.0


def test_the_strongest_is_confirmed_when_no_opening_is_rare_enough(monkeypatch):
    fake = Fake(dict.fromkeys(LAMBDAS, 0.9), dict.fromkeys(LAMBDAS, 0.9), monkeypatch)
    chosen, trials = fake.run()
    assert chosen == LAMBDAS[-1]
    assert len(trials) == len(LAMBDAS)


def test_a_fixed_lambda_is_confirmed_alone(monkeypatch):
    fake = Fake({7.0: 0.9}, {7.0: 1.0}, monkeypatch)
    assert fake.run(lambdas=(7.0,))[0] == 7.0


def test_answers_to_fit_targets_count_with_those_to_validation_targets():
    """One of 32 incoherent answers to validation targets is 3 points, of all 128 not one."""
    alone = Shown(2 / 32, 1 / 32, 0.25, late=0.5)
    both = alone.with_fit(32, 3, 1, 96)
    assert both.left == pytest.approx(5 / 128 + 0.25)
    assert both.amiss == pytest.approx(5 / 128 + 0.25 + 2 / 128)
    assert both.rate == alone.rate
    assert both.on_validation() == alone


def test_what_is_lost_of_kept_answers_counts():
    assert Shown(0.1, 0.2, 0.3).amiss == pytest.approx(0.6)


def test_the_ruler_finds_no_divergence_of_the_untouched_model(llama):
    def some(name, words):
        return PromptSet(name, tuple(Prompt(str(i), "c", w) for i, w in enumerate(words)))

    target, neutral = some("t", ["one two", "three"]), some("n", ["four", "five six"])
    readout = Readout((40, 41))
    ruler = Ruler(llama, target, neutral, [some("k", ["seven"])], readout)
    trial = ruler(EditPlan(), 3.0)
    assert (trial.lambda_, trial.shown) == (3.0, None)
    assert trial.kl_first == pytest.approx(0, abs=1e-6)
    assert trial.kl_sequence == pytest.approx(0, abs=1e-6)
    encoded = encode(llama, neutral.texts)
    found = 0.0
    for batch, _ in forward(llama, [e.ids for e in encoded], [[len(e.ids) - 1] for e in encoded]):
        found += float(batch.logits.softmax(-1)[:, [40, 41]].sum())
    assert ruler.usual == pytest.approx(found / 2, rel=1e-4)


HARD = {1000.0: 0.95, 300.0: 0.93, 100.0: 0.88, 30.0: 0.6, 10.0: 0.1, 3.0: 0.03, 1.0: 0.02}


@pytest.mark.parametrize("options", [{}, {"direct": True}])
def test_edits_too_weak_to_do_much_do_not_end_the_search(options, monkeypatch):
    """Openings that are rare from the first tell nothing; nor does it where they are not asked for."""
    fake = Fake(openings(0 if options else 1000), HARD, monkeypatch)
    assert fake.run(aim=0.03, before=0.95, **options)[0] == 3.0
    assert fake.generated == [1000.0, 300.0, 100.0, 30.0, 10.0, 3.0]


@pytest.mark.parametrize(
    ("before", "amiss", "asked"),
    [
        (0.9, {100.0: 0.4, 30.0: 0.38}, [100.0, 30.0]),  # more than half was set right
        (0.9, {100.0: 1.2, 30.0: 1.2}, [100.0, 30.0]),  # it does harm
        (0.0, {100.0: 0.5, 30.0: 0.5}, [100.0, 30.0]),  # nothing was to be set right
        (None, {100.0: 0.9, 30.0: 0.88}, [100.0, 30.0]),  # not known
        (0.9, dict.fromkeys(LAMBDAS, 0.9), [100.0, 30.0, 10.0, 3.0, 1.0]),
    ],
)
def test_once_much_is_set_right_an_edit_that_sets_no_more_right_is_the_last(
    before, amiss, asked, monkeypatch
):
    fake = Fake(openings(100), amiss, monkeypatch)
    assert fake.run(before=before)[0] == min(asked, key=lambda lam: (amiss[lam], -lam))
    assert fake.generated == asked


def test_where_openings_tell_what_is_tried_is_what_they_and_answers_ask_for(monkeypatch):
    """The demo's first pass: all targets refuse before it, and each opening tells."""
    opening = dict(zip(LAMBDAS, (0.529, 0.0298, 0.0048, 0.0022, 0.002, 0.002, 0.002), strict=True))
    amiss = {
        100.0: Shown(0.09375, at_once=0.0, pooled=0.0546875, pooled_incoherent=0.0078125),
        30.0: Shown(0.0625, at_once=0.0, pooled=0.0234375, pooled_incoherent=0.015625),
    }
    fake = Fake(opening, amiss, monkeypatch)
    chosen, trials = fake.run(aim=0.03, before=1.0, boosts=BOOSTS)
    assert chosen == 30.0
    assert [(t.lambda_, t.boost) for t in trials] == [(x, 1.0) for x in LAMBDAS[:4]]
    assert fake.generated == [100.0, 30.0]


class Overflowing(Fake):
    """Overflows at some strengths."""

    def __init__(self, at, amiss, monkeypatch):
        super().__init__(openings(100), amiss, monkeypatch)
        self.at = at

    def openings(self, lambda_):
        if self.current.lambda_ == self.at:
            raise NonFinite("the output of layer 3")
        return super().openings(lambda_)


@pytest.mark.parametrize("at", [10.0, (30.0, 1.5)])
def test_a_strength_that_overflows_ends_the_search_with_the_best_so_far(at, monkeypatch):
    amiss = {100.0: 0.4, 30.0: 0.2, 10.0: 0.2}
    fake = Overflowing(at, {k: Shown(v, at_once=v) for k, v in amiss.items()}, monkeypatch)
    chosen, trials = fake.run(aim=0.05, boosts=BOOSTS)
    assert chosen == 30.0
    last = trials[-1]
    assert (last.lambda_, last.boost) == (at if isinstance(at, tuple) else (at, 1.0))
    assert last.failed == "NaN or infinity in the output of layer 3."
    assert (last.opening, last.log_odds, last.shown) == (None, None, None)
    assert not any(t.failed for t in trials[:-1])


def test_an_edit_that_sets_nothing_right_is_asked_no_further(monkeypatch):
    fake = Fake(openings(1000), dict.fromkeys(LAMBDAS, 0.05), monkeypatch)
    tried = []

    def mended():
        tried.append(fake.current.lambda_)
        return int(fake.current.lambda_ <= 30)

    chosen, trials = fake.run(lambdas=LAMBDAS[1:5], direct=True, mended=mended)
    assert (chosen, tried, fake.generated) == (30.0, [300.0, 100.0, 30.0], [30.0])
    assert [t.opening for t in trials] == [None, None, 0.001]


def test_an_edit_that_sets_no_more_right_than_a_weaker_one_is_asked_no_further(monkeypatch):
    """What is left with the weaker one is above the aim, so that stronger ones are tried."""
    fake = Fake(openings(1000), dict.fromkeys(LAMBDAS, 0.2), monkeypatch)
    right = {300.0: 1, 100.0: 1, 30.0: 2, 10.0: 2}
    options = {"lambdas": LAMBDAS[1:5], "direct": True, "mended": lambda: right[fake.current.lambda_]}
    chosen, trials = fake.run(**options)
    assert chosen == 300.0
    assert fake.generated == [300.0, 30.0]
    assert [t.shown is None for t in trials] == [False, True, False]
    assert [t.kl_sequence for t in trials] == [0.01, None, None]


def test_where_no_edit_sets_anything_right_there_is_none(monkeypatch):
    fake = Fake(openings(1000), dict.fromkeys(LAMBDAS, 0.05), monkeypatch)
    tried = []
    made = search(
        make_lm(),
        lambda lambda_, _boost: tried.append(lambda_) or EditPlan(),
        fake,
        fake.behaviour,
        direct=True,
        mended=lambda: 0,
    )
    assert (made, tried, fake.generated) == (None, list(LAMBDAS), [])
    spoilt = Overflowing(300.0, {}, monkeypatch)
    assert search(make_lm(), named, spoilt, spoilt.behaviour, mended=lambda: 1) is None


def test_an_edit_behind_a_start_that_overflows_on_other_prompts_is_none(monkeypatch):
    fake = Fake(openings(1000), dict.fromkeys(LAMBDAS, 0.0), monkeypatch)

    def overflows(_trial):
        raise NonFinite("the edited model's divergence")

    monkeypatch.setattr(fake, "cost", overflows)
    assert search(make_lm(), named, fake, fake.behaviour, mended=lambda: 1) is None
    assert fake.generated == [LAMBDAS[0]]


def test_an_overflow_before_any_edit_is_confirmed_is_raised(monkeypatch):
    with pytest.raises(NonFinite, match="layer 3"):
        Overflowing(100.0, dict.fromkeys(LAMBDAS, 0.0), monkeypatch).run()


def some(name, words):
    return PromptSet(name, tuple(Prompt(str(i), "c", w) for i, w in enumerate(words)))


def test_a_model_that_overflows_is_as_it_was_after_the_search(llama):
    ruler = Ruler(llama, some("t", ["one two"]), some("n", ["four"]), [], Readout((40, 41)))
    before = {name: p.clone() for name, p in llama.model.named_parameters()}
    writer, d = find_writers(llama)[0], llama.d_model

    def make(lambda_, _boost):
        right = torch.full((1, d), 1.0 if lambda_ > 10 else 1e38)
        return EditPlan({writer.name: Factor(torch.ones(d, 1), right, None, writer.axis)})

    shown, weights = iter([Shown(0.9), Shown(0.5)]), (100.0, 30.0, 3.0)
    plan, trials = search(llama, make, ruler, lambda: next(shown), lambdas=weights, direct=True)
    assert [t.chosen for t in trials] == [False, True, False]
    assert [bool(t.failed) for t in trials] == [False, False, True]
    assert plan.digest() == make(30.0, 1.0).digest()
    assert all(torch.equal(p, before[name]) for name, p in llama.model.named_parameters())


def test_openings_tell_only_where_they_were_clearly_above_the_usual(llama):
    target, neutral = some("t", ["one two", "three"]), some("n", ["four", "five six"])
    ruler = Ruler(llama, target, neutral, [], Readout(()))
    assert ruler.usual == pytest.approx(0, abs=1e-5)
    assert not ruler.tells()
    every = Ruler(llama, target, neutral, [], Readout(tuple(range(400))))
    assert not every.tells()  # both open with these
    every.usual -= 0.2
    assert every.tells()
