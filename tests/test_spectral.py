"""Planted directions are found, pure noise is not, and held-out scores say which is which."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from saber import spectral
from saber.config import preset
from saber.entanglement import EntanglementSpec, entangle
from saber.linalg import (
    LowRankNoise,
    auroc,
    benjamini_hochberg,
    d_prime,
    ledoit_wolf,
    principal_components,
    unit,
)
from saber.probing import Activations
from saber.spectral import candidate_layers, extract, fit, shrunk

D, N = 48, 60


def spectral_spec(**changes):
    """Several directions a layer, of the middle layers, kept off what is preserved."""
    return replace(preset("orthogonal").spectral, **changes)


def activations(x, categories=None):
    """Wrap (n, d) as activations of a model with five layers, alike at all depths."""
    hidden = x[:, None, None, :].expand(-1, 1, 6, -1).contiguous()
    return Activations(hidden, tuple(categories or ["one"] * len(x)))


def planted(gap, seed=0, scale=None):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.ones(D) if scale is None else scale
    x = torch.randn(N, D, generator=generator) * scale
    y = torch.randn(N, D, generator=generator) * scale
    return x + gap, y


@pytest.mark.parametrize("method", ["means", "svd", "covariance"])
def test_a_planted_direction_is_found_and_separates_held_out(method):
    direction = unit(torch.randn(D, generator=torch.Generator().manual_seed(9)))
    x, y = planted(8 * direction)
    found = extract(
        activations(x),
        activations(y),
        spectral_spec(method=method),
        generator=np.random.default_rng(0),
    )
    best = found[0]
    assert float(best.pattern @ direction) > 0.9
    assert best.auroc > 0.99
    assert best.q_value < 0.05
    assert best.auroc_low < best.auroc <= best.auroc_high


@pytest.mark.parametrize("method", ["means", "svd", "covariance"])
def test_noise_does_not_separate_held_out_even_with_more_dimensions_than_prompts(method):
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(30, 400, generator=generator), torch.randn(30, 400, generator=generator)
    found = extract(
        activations(x),
        activations(y),
        spectral_spec(method=method),
        generator=np.random.default_rng(0),
    )
    assert max(d.auroc for d in found) < 0.75
    assert min(d.q_value for d in found) > 0.01


def test_covariance_aware_detector_beats_plain_svd_under_correlated_noise():
    scale = torch.ones(D)
    scale[:4] = 12.0
    gap = torch.zeros(D)
    gap[10] = 3.0
    x, y = planted(gap, scale=scale)
    best = {
        method: extract(
            activations(x),
            activations(y),
            spectral_spec(method=method),
            generator=np.random.default_rng(0),
        )[0]
        for method in ("svd", "covariance")
    }
    assert best["covariance"].auroc > best["svd"].auroc + 0.1


def test_detectors_and_patterns_are_biorthogonal():
    generator = torch.Generator().manual_seed(4)
    categories = [str(i % 4) for i in range(N)]
    shifts = 3 * torch.randn(4, D, generator=generator)
    x = torch.randn(N, D, generator=generator) + shifts[torch.arange(N) % 4]
    y = torch.randn(N, D, generator=generator)
    found = fit(x.double(), y.double(), categories, spectral_spec(resolve="none"))
    products = found.detectors @ found.patterns.T
    off = products - torch.diag(products.diagonal())
    assert products.shape == (3, 3)
    assert float(off.abs().max() / products.diagonal().abs().min()) < 1e-6


def test_one_cluster_is_the_difference_of_means():
    x, y = planted(torch.ones(D))
    found = fit(x.double(), y.double(), ["one"] * N, spectral_spec(components=1, resolve="none"))
    difference = unit((x.mean(0) - y.mean(0)).double())
    assert float(found.patterns[0] @ difference) == pytest.approx(1.0, abs=1e-6)


def test_candidates_are_the_middle_layers_with_the_cards_count():
    assert len(candidate_layers(35, spectral_spec())) == 22
    assert candidate_layers(30, spectral_spec()) == list(range(6, 25))
    assert candidate_layers(2, spectral_spec(depth_low=0.0, depth_high=1.0)) == [0, 1]


@pytest.mark.parametrize("samples", [7, 20, 500])
def test_noise_is_solved_in_the_smaller_space_and_equals_the_dense_solve(samples, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    z, b = (
        torch.randn(samples, 20, generator=generator).double(),
        torch.randn(20, 3, generator=generator).double(),
    )
    dense = torch.linalg.solve(z.T @ z + 0.3 * torch.eye(20, dtype=torch.float64), b)
    sizes, cholesky = [], torch.linalg.cholesky
    monkeypatch.setattr(torch.linalg, "cholesky", lambda x: sizes.append(len(x)) or cholesky(x))
    torch.testing.assert_close(LowRankNoise(z, 0.3).solve(b), dense)
    assert sizes == [min(samples, 20)]


def test_auroc_agrees_with_scipy_and_its_null_is_uniform():
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.5, 1, (40, 1)), rng.normal(0, 1, (50, 1))
    found = auroc(x, y, permutations=2000, generator=rng)
    u, p = mannwhitneyu(x[:, 0], y[:, 0], alternative="greater")
    assert found.value[0] == pytest.approx(u / (40 * 50))
    assert found.p_value[0] == pytest.approx(p, abs=0.01)
    nulls = auroc(
        rng.normal(size=(25, 300)), rng.normal(size=(25, 300)), permutations=200, generator=rng
    )
    assert 0.4 < nulls.p_value.mean() < 0.6


def test_d_prime_of_shifted_normals():
    x = torch.tensor([[0.0], [2.0]]) + 10
    y = torch.tensor([[0.0], [2.0]])
    assert float(d_prime(x, y)) == pytest.approx(10 / 2**0.5)


def test_benjamini_hochberg_by_hand():
    np.testing.assert_allclose(
        benjamini_hochberg(np.array([0.01, 0.04, 0.03, 0.5])), [0.04, 0.16 / 3, 0.16 / 3, 0.5]
    )


def test_ledoit_wolf_shrinks_few_samples_more_and_identity_fully():
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.1, 5, 30)
    few, many = (torch.randn(n, 30, generator=generator) * scale for n in (12, 4000))
    assert ledoit_wolf(few - few.mean(0)) > ledoit_wolf(many - many.mean(0))
    assert ledoit_wolf(many - many.mean(0)) < 0.05
    white = torch.randn(200, 30, generator=generator)
    assert ledoit_wolf(white - white.mean(0)) > 0.8


def capability(directions, seed=1):
    """Two categories; each varies strongly along its own direction, if it has one."""
    generator = torch.Generator().manual_seed(seed)
    parts, names = [], []
    for name, direction in directions.items():
        z = 0.1 * torch.randn(40, D, generator=generator)
        parts.append(z + 10 * torch.randn(40, 1, generator=generator) * direction)
        names += [name] * 40
    return activations(torch.cat(parts), names)


@pytest.mark.parametrize("measure", ["overlap", "energy"])
def test_a_direction_that_a_capability_uses_is_entangled_with_it_and_a_free_one_is_not(measure):
    basis = torch.eye(D)
    cap = capability({"logic": basis[0], "code": basis[1]})
    for axis, worst, low, high in ((0, "logic", 0.5, 1.0), (7, None, 0.0, 0.45)):
        x, y = planted(4 * basis[axis])
        directions = extract(
            activations(x),
            activations(y),
            spectral_spec(components=1),
            generator=np.random.default_rng(0),
        )[:1]
        spec = EntanglementSpec(measure=measure, components=1)
        found = entangle(
            directions,
            activations(x),
            activations(y),
            cap,
            spec,
            generator=torch.Generator().manual_seed(0),
        )[0]
        assert low <= found.worst <= high
        assert found.purity == 1 - found.worst
        assert worst is None or found.worst_category == worst
        assert set(found.by_category) == {"logic", "code"}


def test_wiener_purity_limits():
    x, y = planted(4 * torch.eye(D)[0])
    cap = capability({"logic": torch.eye(D)[0]})
    directions = extract(
        activations(x),
        activations(y),
        spectral_spec(components=1),
        generator=np.random.default_rng(0),
    )[:1]

    def purity(weight):
        spec = EntanglementSpec(weight=weight)
        return entangle(
            directions,
            activations(x),
            activations(y),
            cap,
            spec,
            generator=torch.Generator().manual_seed(0),
        )[0].purity

    assert purity(0.0) == 1.0
    assert purity(1e9) < 1e-3
    assert purity(0.1) > purity(1.0) > purity(10.0)


def test_auroc_interval_covers_and_stays_sensible_at_one():
    rng = np.random.default_rng(5)
    truth = 0.7602499389065233  # P(N(1, 1) > N(0, 1))
    found = auroc(
        rng.normal(1, 1, (40, 400)), rng.normal(0, 1, (40, 400)), permutations=20, generator=rng
    )
    covered = ((found.low <= truth) & (truth <= found.high)).mean()
    assert 0.9 < covered < 0.99
    perfect = auroc(np.ones((40, 1)), np.zeros((40, 1)), permutations=20, generator=rng)
    assert perfect.high[0] == 1.0
    assert 0.85 < perfect.low[0] < 1.0


@pytest.mark.parametrize("method", ["means", "svd", "covariance"])
@pytest.mark.parametrize(
    ("resolve", "neutral_kept", "capability_kept"),
    [("means", True, True), ("none", False, False)],
)
def test_resolved_patterns_leave_the_mean_streams_alone(
    method, resolve, neutral_kept, capability_kept
):
    gap = torch.zeros(D)
    gap[:24] = 1
    x, y = planted(gap)
    x, y = x + 3, y + 3
    known, _ = planted(4 * gap + torch.randn(D, generator=torch.Generator().manual_seed(1)))
    known[: N // 2, 10:] += 2
    kept = activations(known, ["code"] * (N // 2) + ["logic"] * (N - N // 2))
    spec = spectral_spec(method=method, resolve=resolve, permutations=20)
    rng = np.random.default_rng(0)
    found = extract(activations(x), activations(y), spec, capability=kept, generator=rng)
    first = next(d for d in found if d.component == 0).pattern
    for mean, untouched in (
        (y.mean(0), neutral_kept),
        (known[: N // 2].mean(0), capability_kept),
        (known[N // 2 :].mean(0), capability_kept),
    ):
        shared = abs(float(first @ unit(mean)))
        assert shared < 1e-5 if untouched else shared > 0.05
    assert float(first.norm()) == pytest.approx(1, abs=1e-5)


def test_energy_resolved_patterns_give_up_what_preserved_streams_use():
    generator = torch.Generator().manual_seed(3)
    kept = torch.randn(200, D, generator=generator, dtype=torch.float64) * 0.1
    kept[:, 0] *= 100
    pattern = torch.zeros(1, D, dtype=torch.float64)
    pattern[0, :2] = 1
    energy = 2.0
    found = shrunk(pattern, [kept[:80], kept[80:]], energy)
    moments = sum(part.T @ part / len(part) for part in (kept[:80], kept[80:]))
    expected = torch.linalg.solve(torch.eye(D, dtype=torch.float64) + moments / energy, pattern.T).T
    assert torch.allclose(found, expected, atol=1e-9)
    assert abs(float(found[0, 0])) < 0.02 * float(found[0, 1])
    assert torch.allclose(shrunk(pattern, [kept], 1e12), pattern, atol=1e-6)


def test_energy_resolving_with_more_weight_costs_the_preserved_less():
    gap = torch.zeros(D)
    gap[:12] = 1
    x, y = planted(gap)
    y[:, :4] += 3 * torch.randn(N, 4, generator=torch.Generator().manual_seed(5))
    energies = [
        float(
            (y.double() @ fit(x.double(), y.double(), ["one"] * N, spec).patterns[0]).pow(2).mean()
        )
        for spec in (
            spectral_spec(components=1, resolve="none"),
            spectral_spec(components=1, resolve_energy=1.0),
            spectral_spec(components=1, resolve_energy=0.01),
        )
    ]
    assert energies[0] > 1.2 * energies[1] > 1.2 * energies[2]


def twins(n=N, seed=0):
    """Targets and neutral prompts of shared topics, which vary far more than the sides differ."""
    generator = torch.Generator().manual_seed(seed)
    topic = 6 * torch.randn(n, D, generator=generator)
    x, y = (topic + torch.randn(n, D, generator=generator) for _ in range(2))
    return x + unit(torch.ones(D)) * 2.5, y


def named(x, rows):
    """Activations of some rows of a set, under what they share with their twins."""
    return replace(activations(x[rows]), pairs=tuple(f"pair {i}" for i in rows))


def scores(target, neutral, spec):
    found = extract(target, neutral, spec, generator=np.random.default_rng(0))
    return np.array([(d.d_prime, d.auroc) for d in found])


@pytest.mark.parametrize("method", ["means", "svd", "covariance"])
def test_twins_share_a_fold_and_are_paired_in_whatever_order_they_come(method):
    x, y = twins()
    spec = spectral_spec(method=method, components=1, permutations=20)
    rows, mixed = list(range(N)), torch.randperm(N, generator=torch.Generator().manual_seed(1))
    usual = scores(named(x, rows), named(y, rows), spec)
    np.testing.assert_allclose(
        scores(named(x, rows), named(y, mixed.tolist()), spec), usual, atol=1e-6
    )


@pytest.mark.parametrize("numbered", [False, True])
def test_a_neutral_prompt_that_is_left_out_changes_little(numbered):
    x, y = twins()
    spec = spectral_spec(method="means", components=1, permutations=20)
    rows, fewer = list(range(N)), [i for i in range(N) if i != 3]
    whole = scores(activations(x), activations(y), spec)[0, 1]
    left = replace(activations(y[fewer]), pairs=tuple(fewer)) if numbered else named(y, fewer)
    target = activations(x) if numbered else named(x, rows)
    assert abs(scores(target, left, spec)[0, 1] - whole) < 0.05
    # Twins in different folds: the one in training pushes the other's score the wrong way.
    assert scores(activations(x), activations(y[fewer]), spec)[0, 1] < whole - 0.15


@pytest.mark.parametrize("method", ["means", "svd", "covariance"])
@pytest.mark.parametrize(("n", "m"), [(N, N), (N, 41), (41, N)])
@pytest.mark.parametrize("with_names", [False, True])
def test_where_nothing_is_left_out_folds_are_the_row_numbers(method, n, m, with_names):
    x, y = planted(0.3 * torch.ones(D))
    categories = [str(i % 4) for i in range(n)]
    spec = spectral_spec(method=method, components=1, permutations=20)
    target, neutral = activations(x[:n], categories), activations(y[:m])
    if with_names and n == m:
        names = tuple(f"pair {i}" for i in range(n))
        target, neutral = replace(target, pairs=names), replace(neutral, pairs=names)
    best = extract(target, neutral, spec, generator=np.random.default_rng(0))[0]
    x, y = x[:n].double(), y[:m].double()
    out = [torch.zeros(n, 1, dtype=x.dtype), torch.zeros(m, 1, dtype=x.dtype)]
    for fold in range(spec.folds):
        ins = [torch.arange(len(side)) % spec.folds != fold for side in (x, y)]
        part = [c for c, keep in zip(categories, ins[0].tolist(), strict=True) if keep]
        w = fit(x[ins[0]], y[ins[1]], part, spec).detectors.T
        train = torch.cat([side[inside] @ w for side, inside in zip((x, y), ins, strict=True)])
        for scored, side, inside in zip(out, (x, y), ins, strict=True):
            scored[~inside] = (side[~inside] @ w - train.mean(0)) / train.std(0)
    curve = auroc(*(s.numpy() for s in out), permutations=20, generator=np.random.default_rng(0))
    assert best.d_prime == float(d_prime(*out))
    assert best.auroc == curve.value[0]
    assert torch.equal(best.pattern, fit(x, y, categories, spec).patterns[0].float())


def test_svd_pairs_true_twins_alone():
    x, y = twins()
    spec = spectral_spec(method="svd", components=1, permutations=20, resolve="none")
    some, others = list(range(N - 1)), list(range(1, N))

    def pattern(target, neutral):
        return extract(target, neutral, spec, generator=np.random.default_rng(0))[0].pattern

    def axis(differences):
        """Its line: which way it points is told by the means."""
        found = torch.linalg.svd(differences.double(), full_matrices=False)[2][0].float()
        return found[:, None] * found

    def line(found):
        return found[:, None] * found

    # As many in both, and all but one of each has its twin there.
    own = torch.cat([x[:1] - y[others].mean(0), (x - y)[1 : N - 1]])
    found = pattern(named(x, some), named(y, others))
    torch.testing.assert_close(line(found), axis(own), atol=1e-4, rtol=0)
    # As many in both, and no twin among them.
    half = N // 2
    found = pattern(named(x, list(range(half))), named(y, list(range(half, N))))
    torch.testing.assert_close(line(found), axis(x[:half] - y[half:].mean(0)), atol=1e-4, rtol=0)
    # Numbers alone make no pairs once some are left out.
    numbers = [replace(activations(s[r]), pairs=tuple(r)) for s, r in ((x, some), (y, others))]
    torch.testing.assert_close(
        line(pattern(*numbers)), axis(x[some] - y[others].mean(0)), atol=1e-4, rtol=0
    )


def fold_fits(monkeypatch, rows, sign=1.0):
    """Detectors are axes 0 and 1, in every fold those of `rows(fold)`; axis 0 alone separates."""
    axes, seen = torch.eye(D, dtype=torch.float64), []

    def fake(x, _y, _categories, _spec, _capability, _partners):
        if len(x) == N:
            seen.clear()
            return spectral._Fit(axes[:2], axes[:2])
        seen.append(len(x))
        chosen = axes[rows(len(seen) - 1)] * sign
        return spectral._Fit(chosen, chosen)

    monkeypatch.setattr(spectral, "fit", fake)
    x, y = planted(20 * torch.eye(D)[0])
    found = extract(
        activations(x), activations(y), spectral_spec(), generator=np.random.default_rng(0)
    )
    return [next(d for d in found if d.component == i) for i in range(2)]


def test_a_components_score_is_of_the_folds_directions_that_are_likest_to_it(monkeypatch):
    first, second = fold_fits(monkeypatch, lambda fold: [0, 1] if fold % 2 else [1, 0])
    assert first.auroc == 1.0
    assert second.auroc < 0.7


def test_a_fold_without_a_component_says_nothing_of_it(monkeypatch):
    first, second = fold_fits(monkeypatch, lambda fold: [1] if fold == 2 else [1, 0])
    assert first.auroc == 1.0
    assert first.d_prime > 10
    assert second.auroc < 0.7
    first, second = fold_fits(monkeypatch, lambda fold: [1])
    assert (first.d_prime, first.auroc, first.p_value) == (0.0, 0.5, 1.0)
    assert (first.auroc_low, first.auroc_high) == (0.0, 1.0)
    assert 0.3 < second.auroc < 0.7


def test_which_way_a_folds_direction_points_is_not_told_by_the_prompts_it_scores(monkeypatch):
    """The whole fit has seen them, and would make noise look separable."""
    first, _ = fold_fits(monkeypatch, lambda fold: [1, 0], sign=-1.0)
    assert first.auroc == 0.0


def test_few_samples_have_no_more_components_than_they_span():
    x = 3.0 + torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    basis, centred = principal_components(x, 10), x - x.mean(0)
    assert basis.shape == (4, 32)
    torch.testing.assert_close(centred @ basis.T @ basis, centred, atol=1e-5, rtol=0)
    assert principal_components(x, 3).shape == (3, 32)
    assert principal_components(x[:1], 3).shape == (0, 32)
