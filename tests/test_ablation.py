"""Laws of edit plans."""

import pytest
import torch
from conftest import make_lm

from saber import ablation
from saber.ablation import (
    EditPlan,
    Factor,
    Removal,
    applied,
    apply,
    in_scope,
    originals_kept,
    orthogonal,
    read_off,
)
from saber.errors import DataError
from saber.linalg import accumulated_removal, unit
from saber.lm.writers import find_writers


def directions(n, d=32, seed=0):
    return unit(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))


def removals(strengths, seed=0, layers=None):
    layers = layers or [1] * len(strengths)
    return [
        Removal(v, s, k)
        for v, s, k in zip(directions(len(strengths), seed=seed), strengths, layers, strict=True)
    ]


def snapshot(lm):
    return {k: v.clone() for k, v in lm.model.state_dict().items()}


def kept(vs, strengths):
    q, s = accumulated_removal(vs.double(), torch.tensor(strengths, dtype=torch.float64))
    return torch.eye(vs.shape[1], dtype=torch.float64) - q.T @ s @ q


def test_full_strength_removes_the_whole_span_at_any_angle():
    vs = directions(4)
    vs[1] = unit(vs[0] + 0.1 * vs[1])
    rest = kept(vs, [1.0] * 4)
    assert (rest @ vs.T.double()).abs().max() < 1e-9
    torch.testing.assert_close(rest @ rest, rest)
    assert round(float(rest.trace())) == 28


def test_orthogonal_directions_lose_their_own_shares():
    vs = torch.eye(32)[:3]
    expected = torch.eye(32, dtype=torch.float64)
    expected[[0, 1, 2], [0, 1, 2]] = torch.tensor([0.0, 0.5, 0.15], dtype=torch.float64)
    torch.testing.assert_close(kept(vs, [1.0, 0.5, 0.85]), expected)


def test_a_direction_taken_three_times_leaves_the_cube():
    v = directions(1)
    rest = kept(v.repeat(3, 1), [0.85] * 3)
    torch.testing.assert_close(float(v[0].double() @ rest @ v[0].double()), 0.15**3)


def test_what_is_undone_is_bit_equal(lm):
    before = snapshot(lm)
    with applied(lm.model, orthogonal(lm, find_writers(lm), removals([1.0, 0.3]), "all")):
        assert any(not torch.equal(v, before[k]) for k, v in lm.model.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in lm.model.state_dict().items())


def test_a_change_is_made_where_its_weight_is_if_float64_is_there(llama, monkeypatch):
    plan = orthogonal(llama, find_writers(llama), removals([1.0]), "all")
    factor, elsewhere = next(iter(plan.factors.values())), torch.device("meta")
    assert torch.equal(factor.delta(elsewhere), factor.delta())
    monkeypatch.setattr(ablation, "has_float64", lambda device: device == elsewhere)
    assert factor.delta(elsewhere).device == elsewhere
    assert factor.delta(elsewhere).shape == factor.delta().shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "axis"), [((24, 40), 0), ((40, 24), 1), ((5, 24, 8), 1), ((5, 8, 24), 2), ((24,), 0)]
)
def test_a_change_made_in_blocks_is_the_whole_one_rounded_once(shape, axis, dtype, monkeypatch):
    torch.manual_seed(0)
    rest = [n for i, n in enumerate(shape) if i != axis]
    factor = Factor(torch.randn(24, 3), torch.randn(3, *rest), None, axis)
    weight = torch.randn(shape).to(dtype)
    expected = (weight.float() + factor.delta()).to(dtype)
    sizes, add = [], ablation.add_in_place

    def noted(part, delta):
        sizes.append(delta.numel())
        add(part, delta)

    monkeypatch.setattr(ablation, "add_in_place", noted)
    for entries in (1, 50, 1000):
        changed = weight.clone()
        sizes.clear()
        factor.add_to(changed, entries)
        assert torch.equal(changed, expected)
        assert sum(sizes) == weight.numel()
        assert max(sizes) <= max(entries, weight.numel() // weight.shape[0])


def test_what_a_large_weight_is_read_in_changes_next_to_nothing():
    torch.manual_seed(0)
    for shape, axis in (((32, 40), 0), ((40, 32), 1), ((5, 8, 32), 2)):
        basis, weight = torch.randn(2, 32), torch.randn(shape)
        whole = read_off(basis, weight, axis)
        assert whole.shape == (2, *(n for i, n in enumerate(shape) if i != axis))
        assert torch.equal(whole.reshape(2, -1), basis @ weight.movedim(axis, 0).reshape(32, -1))
        torch.testing.assert_close(read_off(basis, weight, axis, 100), whole, atol=1e-4, rtol=1e-4)


def test_plans_in_force_one_after_another_share_one_copy(llama, monkeypatch):
    writers, before = find_writers(llama), snapshot(llama)
    one, other = (
        orthogonal(llama, some, removals([1.0]), "all") for some in (writers[:4], writers[2:])
    )
    expected = {}
    for name, plan in (("one", one), ("other", other)):
        with applied(llama.model, plan):
            expected[name] = snapshot(llama)
    copies, of = [], ablation.Originals.of

    def counted(self, parameter):
        known = id(parameter) in self._kept
        copies.extend([] if known else [parameter])
        return of(self, parameter)

    monkeypatch.setattr(ablation.Originals, "of", counted)
    with originals_kept(llama.model):
        for name, plan, new in (("one", one, 4), ("one", one, 0), ("other", other, 4)):
            copies.clear()
            with applied(llama.model, plan):
                assert len(copies) == new
                assert all(torch.equal(v, expected[name][k]) for k, v in snapshot(llama).items())
                kept = llama.model._saber_originals._kept
                assert len(kept) == len(plan.factors)
                with applied(llama.model, one):  # on top of the other, undone to it
                    pass
                assert all(torch.equal(v, expected[name][k]) for k, v in snapshot(llama).items())
            assert all(torch.equal(v, before[k]) for k, v in snapshot(llama).items())
    assert not hasattr(llama.model, "_saber_originals")


def test_undone_after_an_error(llama):
    before = snapshot(llama)
    with (
        pytest.raises(RuntimeError),
        applied(llama.model, orthogonal(llama, find_writers(llama), removals([1.0]), "all")),
    ):
        raise RuntimeError
    assert all(torch.equal(v, before[k]) for k, v in llama.model.state_dict().items())


def test_strength_zero_changes_no_bit(lm):
    before = snapshot(lm)
    with applied(lm.model, orthogonal(lm, find_writers(lm), removals([0.0, 0.0]), "all")):
        assert all(torch.equal(v, before[k]) for k, v in lm.model.state_dict().items())


def test_editing_twice_at_full_strength_equals_editing_once(lm):
    writers, wanted = find_writers(lm), removals([1.0, 1.0])
    apply(lm.model, orthogonal(lm, writers, wanted, "all"))
    once = snapshot(lm)
    apply(lm.model, orthogonal(lm, writers, wanted, "all"))
    for name, value in lm.model.state_dict().items():
        torch.testing.assert_close(value, once[name], atol=1e-5, rtol=1e-4)


def test_repeated_passes_from_the_original_weights_equal_edits_one_after_the_other(llama):
    writers, one = find_writers(llama), removals([0.85])[0]
    with applied(llama.model, orthogonal(llama, writers, [one] * 3, "all")):
        together = snapshot(llama)
    for _ in range(3):
        apply(llama.model, orthogonal(llama, writers, [one], "all"))
    for name, value in llama.model.state_dict().items():
        torch.testing.assert_close(value, together[name], atol=1e-5, rtol=1e-4)


def test_only_writers_in_scope_are_edited(llama):
    writers = find_writers(llama)
    layers = {
        scope: sorted(
            {
                int(n.split(".")[2])
                for n in orthogonal(llama, writers, removals([1.0]), scope).factors
            }
        )
        for scope in ("own", "upstream", "all")
    }
    assert layers == {"own": [1], "upstream": [0, 1], "all": [0, 1, 2, 3]}


def test_nearest_scope_takes_each_writers_next_selected_layer_pass_by_pass():
    made = [
        Removal(v, 1.0, layer, step)
        for v, layer, step in zip(directions(3), (1, 2, 0), (1, 1, 2), strict=True)
    ]
    assert [in_scope(k, made, "nearest") for k in range(4)] == [(0, 2), (0,), (1,), ()]
    assert [in_scope(k, made, "upstream") for k in range(4)] == [(0, 1, 2), (0, 1), (1,), ()]
    assert [in_scope(k, made, "own") for k in range(4)] == [(2,), (0,), (1,), ()]


def test_fractional_strength_leaves_its_share_behind_any_gain(lm):
    direction = directions(1)[0]
    writer = find_writers(lm)[0]
    module = lm.model.get_submodule(writer.name)
    read = direction if writer.gain is None else direction * writer.gain

    def written():
        weight = module.weight if writer.axis == 0 else module.weight.T
        return read @ weight

    before = written()
    with applied(lm.model, orthogonal(lm, [writer], [Removal(direction, 0.85, 0)], "own")):
        torch.testing.assert_close(written(), 0.15 * before, atol=1e-4, rtol=1e-3)


def test_plans_survive_the_disk(tmp_path):
    lm = make_lm("gpt2")
    plan = orthogonal(lm, find_writers(lm), removals([1.0, 0.4]), "all")
    plan.save(tmp_path / "plan", {"note": "x"})
    again = EditPlan.load(tmp_path / "plan")
    assert again.factors.keys() == plan.factors.keys()
    for name, factor in plan.factors.items():
        assert torch.equal(again.factors[name].delta(), factor.delta())
        assert torch.equal(again.factors[name].bias, factor.bias)


def test_loading_no_plan_is_one_clear_error(tmp_path):
    with pytest.raises(DataError, match=r"meta\.json"):
        EditPlan.load(tmp_path)
