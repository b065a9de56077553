"""The line search takes the weakest edit that does, and says what it tried."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
from conftest import make_lm

from saber import strength
from saber.ablation import EditPlan
from saber.evaluation.readout import Readout
from saber.lm.chat import encode
from saber.lm.forward import forward
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
        return trial

    def behaviour(self):
        self.generated.append(self.current.lambda_)
        found = self.amiss[self.current.lambda_]
        return found if isinstance(found, Shown) else Shown(found)

    def run(self, **options):
        class Plan(EditPlan):
            pass

        def make(lambda_, boost):
            plan = Plan()
            object.__setattr__(plan, "lambda_", lambda_ if boost == 1 else (lambda_, boost))
            return plan

        plan, trials = search(make_lm(), make, self, self.behaviour, **options)
        chosen = [t.lambda_ for t in trials if t.chosen]
        boosts = [t.boost for t in trials if t.chosen]
        assert [plan.lambda_] in (chosen, [*zip(chosen, boosts, strict=True)])
        return plan.lambda_, trials


def openings(threshold):
    return {lam: 0.5 if lam > threshold else 0.001 for lam in LAMBDAS}


def test_the_weakest_edit_that_does_is_taken_and_nothing_stronger_is_tried(monkeypatch):
    fake = Fake(openings(100), dict.fromkeys(LAMBDAS, 0.05), monkeypatch)
    chosen, trials = fake.run()
    assert chosen == 100.0
    assert [t.lambda_ for t in trials] == [1000.0, 300.0, 100.0]
    assert fake.generated == [100.0]
    assert [t.shown for t in trials] == [None, None, Shown(0.05)]


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
