import numpy as np
import pytest

from saber.errors import DataError
from saber.evaluation import statistics
from saber.evaluation.statistics import bootstrap_mean, mcnemar_exact, paired_bootstrap, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 20, 0.0, 0.1611),
        (20, 20, 0.8389, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe (1998), table I
        (15, 148, 0.0624, 0.1605),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_published_values(successes, n, low, high):
    found = wilson(successes, n)
    assert (found.low, found.high) == pytest.approx((low, high), abs=6e-5)
    assert found.rate == successes / n
    assert (found.n, found.successes) == (n, successes)


def test_wilson_bounds_enclose_the_rate_and_narrow_with_confidence():
    for n in (1, 2, 7, 100):
        for k in range(n + 1):
            wide, narrow = wilson(k, n, 0.99), wilson(k, n, 0.8)
            assert 0 <= wide.low <= narrow.low <= k / n <= narrow.high <= wide.high <= 1


@pytest.mark.slow
def test_wilson_covers_the_true_rate():
    rng = np.random.default_rng(0)
    for p in (0.05, 0.3, 0.5):
        draws = rng.binomial(100, p, size=1500).tolist()
        covered = np.mean([(w := wilson(k, 100)).low <= p <= w.high for k in draws])
        assert 0.92 < covered < 0.985


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_of_nothing_is_an_error(successes, n):
    with pytest.raises(DataError):
        wilson(successes, n)


def test_mcnemar_known_values():
    before = [True] * 6 + [False] * 10 + [True] * 4
    after = [False] * 6 + [False] * 10 + [True] * 4
    found = mcnemar_exact(before, after)
    assert (found.b, found.c) == (6, 0)
    assert found.p_value == pytest.approx(2 / 2**6)
    back = mcnemar_exact(after, before)
    assert (back.b, back.c, back.p_value) == (0, 6, found.p_value)
    assert mcnemar_exact([True] * 3 + [False], [False] * 3 + [True]).p_value == pytest.approx(0.625)
    assert mcnemar_exact([True, False], [True, False]).p_value == 1.0
    assert mcnemar_exact([True, False], [False, True]).p_value == 1.0
    with pytest.raises(DataError):
        mcnemar_exact([True], [])


@pytest.mark.slow
def test_mcnemar_holds_its_level():
    rng = np.random.default_rng(1)
    pairs = rng.random((800, 2, 60)) < 0.4
    rejected = np.mean([mcnemar_exact(x.tolist(), y.tolist()).p_value <= 0.05 for x, y in pairs])
    assert rejected <= 0.06


def test_bootstrap_of_an_exact_shift_has_no_width():
    before = [1.0, 4.0, 2.5]
    found = paired_bootstrap(before, [x + 0.5 for x in before], n_resamples=200)
    assert (found.estimate, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_perplexity_ratio_is_token_weighted():
    tokens = np.array([10, 90])
    before, after = np.array([20.0, 90.0]), np.array([30.0, 90.0])
    found = paired_bootstrap(
        before, after, tokens=tokens, statistic="perplexity_ratio", n_resamples=500
    )
    assert found.estimate == pytest.approx(np.exp(120 / 100) / np.exp(110 / 100))
    assert found.low == pytest.approx(1.0)
    assert found.high == pytest.approx(np.exp(1.0))


def test_bootstrap_is_seeded_and_orders_its_bounds():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=30), rng.normal(size=30)
    one, again = paired_bootstrap(x, y, seed=4), paired_bootstrap(x, y, seed=4)
    assert one == again
    assert one != paired_bootstrap(x, y, seed=5)
    assert one.low < one.estimate < one.high


def test_resamples_drawn_in_parts_are_the_same_ones(monkeypatch):
    x, y = np.arange(50.0), np.arange(50.0) ** 1.5
    whole = paired_bootstrap(x, y, n_resamples=101)
    monkeypatch.setattr(statistics, "COUNTS", 50 * 7)
    parts = paired_bootstrap(x, y, n_resamples=101)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), rel=1e-12)


def test_bootstrap_covers_the_true_difference_and_uses_the_pairing():
    rng = np.random.default_rng(3)
    covered, widths = [], []
    for trial in range(200):
        level = rng.normal(scale=50, size=50)
        found = paired_bootstrap(
            level, level + 0.3 + rng.normal(size=50), n_resamples=400, seed=trial
        )
        covered.append(found.low <= 0.3 <= found.high)
        widths.append(found.high - found.low)
    assert 0.88 < np.mean(covered) < 0.985
    assert np.mean(widths) == pytest.approx(2 * 1.96 / np.sqrt(50), rel=0.1)


def test_bootstrap_refuses_what_is_not_paired():
    with pytest.raises(DataError):
        paired_bootstrap([1.0], [1.0, 2.0])
    with pytest.raises(DataError):
        paired_bootstrap([1.0], [1.0], tokens=[1, 2])
    with pytest.raises(DataError):
        paired_bootstrap([1.0], [1.0], tokens=[0])
    with pytest.raises(DataError):
        paired_bootstrap([], [])


def test_a_mean_comes_with_an_interval_that_its_spread_and_number_set():
    rng = np.random.default_rng(5)
    values = rng.exponential(0.02, 400)
    found = bootstrap_mean(values, n_resamples=4000)
    assert found.estimate == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    few = bootstrap_mean(values[:25])
    assert few.high - few.low > 2 * (found.high - found.low)
    with pytest.raises(DataError, match="at least one item"):
        bootstrap_mean([])
