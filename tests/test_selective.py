"""The selective edit: its closed form, its limits, its memory, and what it leaves alone."""

from dataclasses import replace

import pytest
import torch
import transformers
from conftest import make_lm

from saber import moments
from saber.ablation import applied
from saber.errors import NonFinite
from saber.linalg import unit
from saber.lm.chat import Encoded, encode
from saber.lm.inputs import last_layer, plan_reading, read_inputs, read_prefix
from saber.lm.layers import find_layers
from saber.lm.writers import find_writers
from saber.moments import Moment, Preserved, affordable, packed, read_decisions
from saber.probing import ProbeSpec, probe
from saber.prompts import Prompt, PromptSet
from saber.selective import solve


def texts(n, seed, low=6, high=10, prefix=3):
    """Random texts of different lengths behind a shared start."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        length = int(torch.randint(low, high, (1,), generator=generator))
        ids = torch.randint(6, 260, (length,), generator=generator).tolist()
        rows.append(Encoded((*range(10, 10 + prefix), *ids), prefix + length))
    return rows


def moe(family="mixtral"):
    """A pico mixture of experts, whose weights are fused in memory."""
    common = {
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 400,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    config = {"mixtral": transformers.MixtralConfig, "gpt_oss": transformers.GptOssConfig}[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(**common))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return replace(
        make_lm("llama"), model=model.eval().requires_grad_(False), layers_path=find_layers(model)
    )


def mamba():
    """A pico state-space model, whose states are not handed on as a key-value cache."""
    config = transformers.MambaConfig(
        hidden_size=32, num_hidden_layers=2, vocab_size=400, state_size=4, expand=2
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return replace(make_lm("llama"), model=model, layers_path=find_layers(model))


def rows_of(lm, writers, encoded, last=0):
    found = {}
    read_inputs(
        lm,
        writers,
        plan_reading(lm, writers, encoded, last=last),
        lambda key, rows: found.setdefault(key, []).append(rows.clone()),
    )
    return {key: torch.cat(parts) for key, parts in found.items()}


def pinned_of(lm, writers, sets):
    """What the prefixes of some sets add to each moment."""
    found = {}
    for prefix in {plan_reading(lm, writers, some).prefix for some in sets} - {()}:
        rows = {}
        read_prefix(lm, writers, prefix, lambda key, r, rows=rows: rows.setdefault(key, []).append(r))
        for key, parts in rows.items():
            all_rows = torch.cat(parts).double()
            found[key] = found.get(key, 0) + all_rows.T @ all_rows / len(prefix)
    return found


def test_rows_are_what_the_module_receives(lm):
    writers = find_writers(lm)
    encoded = texts(3, 0)
    found = rows_of(lm, writers, encoded, last=2)
    for writer in writers:
        seen = []
        hook = lm.model.get_submodule(writer.name).register_forward_hook(
            lambda _m, args, _o, seen=seen: seen.append(args[0])
        )
        for e in sorted(encoded, key=lambda e: len(e.ids)):
            with torch.no_grad():
                lm.model(input_ids=torch.tensor([e.ids]))
        hook.remove()
        # Texts of one length run together, token by token.
        expected = torch.cat([s.reshape(-1, s.shape[-1])[-2:] for s in seen])
        rows = found[writer.name, 0]
        assert rows.shape == expected.shape
        torch.testing.assert_close(rows.sum(0), expected.sum(0), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(rows.T @ rows, expected.T @ expected, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("make", [lambda: moe("mixtral"), lambda: moe("gpt_oss"), mamba])
def test_the_inputs_of_a_writer_times_its_weight_are_what_it_writes(make):
    lm = make()
    writers = find_writers(lm)
    encoded = texts(5, 1)
    every = rows_of(lm, writers, encoded)
    last = rows_of(lm, writers, encoded, last=1)
    tokens = plan_reading(lm, writers, encoded).tokens
    for writer in writers:
        if writer.experts:
            routed = [len(every.get((writer.name, e), ())) for e in range(writer.experts)]
            assert sum(routed) == 2 * tokens
            assert sum(len(last.get((writer.name, e), ())) for e in range(writer.experts)) == 10
        else:
            assert len(every[writer.name, 0]) == tokens
            assert len(last[writer.name, 0]) == 5
    # The last rows are among all rows.
    for key, rows in last.items():
        distance = torch.cdist(rows.double(), every[key].double()).amin(1)
        assert float(distance.max()) < 1e-4 * float(every[key].norm(dim=1).mean())


def test_probing_reads_what_goes_into_writers_in_the_same_pass():
    lm = make_lm()
    writers = find_writers(lm)
    prompts = PromptSet("some", tuple(Prompt(str(i), "", f"say {'so ' * i}on") for i in range(5)))
    for opening in ((), (7, 8)):
        found = probe(lm, prompts, ProbeSpec(), opening=opening, writers=writers)
        plain = probe(lm, prompts, ProbeSpec(), opening=opening)
        torch.testing.assert_close(found.hidden, plain.hidden)
        encoded = encode(lm, prompts.texts, [opening] * 5)
        expected = read_decisions(lm, writers, encoded, encoded).target
        assert plain.inputs is None
        assert set(found.inputs) == set(expected)
        for key, rows in expected.items():
            assert len(found.inputs[key]) == len(rows) == 5
            # The order is free, but each row is there.
            gaps = torch.cdist(found.inputs[key].double(), rows.double())
            assert float(gaps.amin(0).max()) < 1e-4 * float(rows.norm(dim=1).mean())
            assert len(set(gaps.argmin(0).tolist())) == 5


def solved(lm, writers, k=1, lambdas=1.0, alphas=1.0, memory=4e9, prefix=3):
    """Solve with random directions on random texts; return everything that the formula needs."""
    generator = torch.Generator().manual_seed(5)
    directions = {
        layer: torch.linalg.qr(torch.randn(lm.d_model, k, generator=generator))[0].T
        for layer in range(len(lm.layers))
    }
    target, neutral = texts(6, 2, prefix=prefix), texts(7, 3, prefix=prefix)
    sets = [texts(9, 4, prefix=prefix), texts(4, 5, prefix=prefix)]
    decisions = read_decisions(lm, writers, target, neutral)
    preserved = Preserved(lm, writers, sets, memory=memory)
    found = solve(lm, directions, decisions, preserved)
    each = lambda value: dict.fromkeys(directions, [value] * k)  # noqa: E731
    return directions, target, neutral, sets, found, each(lambdas), each(alphas)


@pytest.mark.parametrize("make", [make_lm, lambda: make_lm("gemma2"), lambda: make_lm("gpt2"), moe])
def test_the_plan_is_the_closed_form(make):
    lm = make()
    writers = find_writers(lm)
    lam, alpha = 3.0, 0.7
    directions, target, neutral, sets, found, lambdas, alphas = solved(lm, writers, 2, lam, alpha)
    plan = found.plan(lambdas, alphas)
    x_all, g_all = rows_of(lm, writers, target, 1), rows_of(lm, writers, neutral, 1)
    c_all = [rows_of(lm, writers, s) for s in sets]
    sizes = [plan_reading(lm, writers, s).tokens for s in sets]
    pinned = pinned_of(lm, writers, sets)
    for writer in writers:
        weight = lm.model.get_parameter(writer.weight).double().movedim(writer.axis, 0)
        change = plan.factors[writer.name].delta().double().movedim(writer.axis, 0)
        reading = writer.read(directions[writer.layer]).double()
        for expert in range(writer.experts or 1):
            key = (writer.name, expert)
            w = weight[:, expert] if writer.experts else weight
            d = change[:, expert] if writer.experts else change
            if key not in x_all:
                assert not d.any()
                continue
            x = x_all[key].double()
            mu = g_all[key].double().mean(0) if key in g_all else torch.zeros_like(x[0])
            c = sum(
                s[key].double().T @ s[key].double() / n
                for s, n in zip(c_all, sizes, strict=True)
                if key in s
            )
            t = x.T @ x / len(target)
            c = torch.as_tensor(c) if isinstance(c, torch.Tensor) else torch.zeros_like(t)
            m = c + 1e-3 * max(c.trace(), t.trace()) / len(t) * torch.eye(len(t))
            m = m + pinned.get(key, 0)
            numerator = reading @ w @ ((x - mu).T @ x) / len(target)
            z = numerator @ torch.linalg.inv(t + lam * m)
            expected = -alpha * writer.write(directions[writer.layer].double()) @ z
            torch.testing.assert_close(
                d, expected.to(d), atol=2e-4 * float(w.abs().max()), rtol=1e-2
            )


@pytest.mark.slow
def test_a_small_lambda_takes_the_gap_off_the_targets_and_a_large_one_changes_nothing(llama):
    writers = find_writers(llama)
    for lam, low, high in ((1e-6, 0.98, 1.0), (1e9, 0.0, 1e-6)):
        _, _, _, _, found, lambdas, alphas = solved(llama, writers, 1, lam)
        for balance in found.balance(lambdas, alphas).values():
            assert low <= balance.removed <= high
            assert balance.collateral >= 0


@pytest.mark.slow
def test_the_expected_balance_is_the_one_measured(llama):
    writers = find_writers(llama)
    directions, target, neutral, sets, found, lambdas, alphas = solved(llama, writers, 1, 0.1)
    plan, balance = found.plan(lambdas, alphas), found.balance(lambdas, alphas)
    x, g = rows_of(llama, writers, target, 1), rows_of(llama, writers, neutral, 1)
    kept = [(rows_of(llama, writers, s), plan_reading(llama, writers, s).tokens) for s in sets]
    pinned = pinned_of(llama, writers, sets)
    for layer in lambdas:
        left = wanted = moved = usual = 0.0
        for w in (w for w in writers if w.layer == layer):
            weight = llama.model.get_parameter(w.weight)
            r = directions[layer][0]
            before, after = r @ weight, r @ (weight + plan.factors[w.name].delta())
            rows = x[w.name, 0]
            beyond = (rows - g[w.name, 0].mean(0)) @ before
            wanted += float(beyond.pow(2).mean())
            left += float((beyond + rows @ (after - before)).pow(2).mean())
            usual += sum(float((k[w.name, 0] @ before).pow(2).sum()) / n for k, n in kept)
            moved += sum(float((k[w.name, 0] @ (after - before)).pow(2).sum()) / n for k, n in kept)
            p, change = pinned[w.name, 0].float(), after - before
            usual += float(before @ p @ before)
            moved += float(change @ p @ change)
        assert balance[layer].wanted == pytest.approx(wanted, rel=1e-3)
        assert balance[layer].left == pytest.approx(left, rel=2e-2, abs=1e-5 * wanted)
        assert balance[layer].usual == pytest.approx(usual, rel=1e-3)
        assert balance[layer].moved == pytest.approx(moved, rel=2e-2)


def test_what_keeps_the_behaviours_inputs_costs_more_than_what_does_not(llama):
    """Preserved texts that are the targets themselves leave nothing that could be removed alone."""
    writers = find_writers(llama)
    direction = {0: unit(torch.randn(1, 32, generator=torch.Generator().manual_seed(1)))}
    target, neutral = texts(6, 2), texts(7, 3)
    decisions = read_decisions(llama, writers, target, neutral)

    def removed(kept):
        found = solve(llama, direction, decisions, Preserved(llama, writers, [kept]))
        return found.balance({0: 100.0}, {0: 1.0})[0].removed

    assert removed(target) < 0.5 * removed(texts(6, 9))


@pytest.mark.slow
def test_moments_in_groups_give_the_same_plan(llama):
    writers = find_writers(llama)
    *_, found, lambdas, alphas = solved(llama, writers)
    *_, small, _, _ = solved(llama, writers, memory=1.0)
    for name, factor in found.plan(lambdas, alphas).factors.items():
        other = small.plan(lambdas, alphas).factors[name]
        torch.testing.assert_close(factor.delta(), other.delta())


@pytest.mark.parametrize("make", [make_lm, moe])
def test_no_bit_depends_on_which_writers_are_read_together(make):
    lm = make()
    writers = find_writers(lm)
    *_, found, lambdas, alphas = solved(lm, writers)
    for memory in (1.0, 30e3):
        assert len(packed(lm, writers, memory)) > 1
        *_, small, _, _ = solved(lm, writers, memory=memory)
        assert [s.writer.name for s in small.solutions] == [w.name for w in writers]
        assert small.plan(lambdas, alphas).digest() == found.plan(lambdas, alphas).digest()


@pytest.mark.parametrize("memory", [4e9, 1.0])
def test_what_is_preserved_is_the_untouched_models_in_every_pass(memory):
    """Kept from the first pass or read again in the second, with a plan in force or not."""
    lm = make_lm()
    writers = find_writers(lm)
    directions, target, neutral, sets, found, lambdas, alphas = solved(lm, writers)
    first = found.plan(lambdas, {layer: [1.0] for layer in alphas})
    before = {k: v.clone() for k, v in lm.model.state_dict().items()}
    again = []
    for earlier in (False, True):
        preserved = Preserved(lm, writers, sets, memory=memory)
        if earlier:
            for _ in preserved.groups():
                pass
        with applied(lm.model, first):
            decisions = read_decisions(lm, writers, target, neutral)
        second = solve(lm, directions, decisions, preserved, plan=first)
        again.append(second.plan(lambdas, alphas).digest())
    assert all(torch.equal(v, before[k]) for k, v in lm.model.state_dict().items())
    with applied(lm.model, first):
        moved = Preserved(lm, writers, sets)
        shifted = solve(lm, directions, decisions, moved).plan(lambdas, alphas).digest()
    kept = Preserved(lm, writers, sets)
    for _ in kept.groups():
        pass
    with applied(lm.model, first):
        expected = solve(lm, directions, decisions, kept).plan(lambdas, alphas).digest()
    assert {*again} == {expected}
    assert shifted not in again


def test_writers_are_packed_by_size_the_deepest_together():
    lm = make_lm(layers=12)
    writers = find_writers(lm)
    assert packed(lm, writers, 4e9) == [writers]
    assert packed(lm, [], 4e9) == []
    sizes = {w.name: 8 * lm.model.get_parameter(w.weight).shape[1] ** 2 for w in writers}
    largest = max(sizes.values())
    for memory in (1.0, 2.5 * largest, 4e5):
        groups = packed(lm, writers, memory)
        held = [sum(sizes[w.name] for w in group) for group in groups]
        assert max(held) <= max(memory, largest)
        assert sorted(w.name for g in groups for w in g) == sorted(sizes)
        assert all(g == [w for w in writers if w in g] for g in groups)
        deepest = [max(w.layer for w in group) for group in groups]
        assert deepest == sorted(deepest)
        # In order of depth alone, every small writer beside a large one would open a group of its own.
        assert len(groups) <= 1.25 * sum(sizes.values()) / max(memory, largest) + 1


def test_only_writers_of_asked_layers_are_read_again(llama):
    writers = find_writers(llama)
    few = Preserved(llama, writers, [texts(3, 1)], memory=1.0)
    assert {w.layer for group, _ in few.groups({1, 2}) for w in group} == {1, 2}


def test_what_is_kept_is_read_once_and_of_asked_layers_alone(llama, monkeypatch):
    writers = find_writers(llama)
    whole, parts = (Preserved(llama, writers, [texts(3, 1), texts(2, 7)]) for _ in range(2))
    ((_, expected),) = whole.groups()
    asked = []

    def noted(lm, writers, *rest, **settings):
        asked.append({w.layer for w in writers})
        read_inputs(lm, writers, *rest, **settings)

    monkeypatch.setattr(moments, "read_inputs", noted)
    for layers in ({1, 2}, {2}, {0, 1}, {0, 1, 2}):
        ((group, found),) = parts.groups(layers)
        assert group == [w for w in writers if w.layer in layers]
        for writer in group:
            mine, theirs = found[writer.name, 0], expected[writer.name, 0]
            directions = torch.eye(mine.width, dtype=torch.float64)
            assert torch.equal(mine.energy(directions), theirs.energy(directions))
    assert asked == [{1, 2}] * 2 + [{0}] * 2  # two sets each, and nothing twice


def test_a_reading_ends_behind_the_last_layer_that_it_needs():
    lm = make_lm()
    writers, ran = find_writers(lm), []
    for index, layer in enumerate(lm.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    every = rows_of(lm, writers, texts(5, 0))
    for some in (writers[:2], writers[2:5], writers):
        ran.clear()
        before = lm.work.tokens
        reading = plan_reading(lm, some, texts(5, 0))
        planned, ran[:] = lm.work.tokens, []
        rows = rows_of(lm, some, texts(5, 0))
        assert set(rows) == {(w.name, 0) for w in some}
        assert all(torch.equal(value, every[key]) for key, value in rows.items())
        assert planned > before
        lm.work.tokens, ran[:] = 0, []
        read_inputs(lm, some, reading, lambda _key, _rows: None)
        layers = some[-1].layer + 1
        assert ran == [*range(layers)] * len(reading.batches)
        assert lm.work.tokens == sum(sum(n) * layers // 4 for _, n in reading.batches)


def test_a_weight_that_layers_share_is_read_in_all_of_them():
    lm = make_lm()
    for layer in list(lm.layers)[1:3]:
        layer.mlp.down_proj.weight = lm.layers[0].mlp.down_proj.weight
    shared = next(w for w in find_writers(lm) if w.weight.endswith("0.mlp.down_proj.weight"))
    assert last_layer(lm, [shared]) == 2
    rows = rows_of(lm, [shared], texts(5, 0))[shared.name, 0]
    assert len(rows) == 3 * plan_reading(lm, [shared], texts(5, 0)).tokens
    outside = replace(shared, weight="model.norm.weight")
    assert last_layer(lm, [outside]) == 3


def test_where_a_device_is_short_of_memory_the_cpu_solves(llama, monkeypatch):
    writers = find_writers(llama)
    *_, expected, lambdas, alphas = solved(llama, writers)
    tried, on = [], Moment.on

    def short(self, device):
        tried.append(device)
        if len(tried) % 2:
            raise torch.OutOfMemoryError
        return on(self, device)

    monkeypatch.setattr(Moment, "on", short)
    *_, found, _, _ = solved(llama, writers)
    assert len(tried) == 2 * len(writers)
    assert found.plan(lambdas, alphas).digest() == expected.plan(lambdas, alphas).digest()


def test_moments_take_what_is_free_and_not_less_than_before_where_that_is_there(llama, monkeypatch):
    writers = find_writers(llama)
    copies = sum(llama.model.get_parameter(w.weight).nbytes for w in writers)
    for free, expected in ((100.0, 50.0), (6.0, 4.0), (3.0, 3.0), (0.0, 0.0)):
        monkeypatch.setattr(
            moments, "free_memory", lambda free=free: int(free * 2**30) + copies * bool(free)
        )
        assert affordable(llama, writers) == expected * 2**30


def test_many_rows_that_are_all_there_is_are_summed():
    rows = torch.randn(11, 12, generator=torch.Generator().manual_seed(0))
    moment = Moment(12)
    moment.add(rows, 0.5)
    moment.done()
    solver = moment.solver(0.01)
    assert solver.rows is None
    c = 0.5 * (rows.T @ rows).double()
    e = 0.01 * float(c.trace()) / 12
    rhs = torch.eye(12, dtype=torch.float64)
    expected = torch.linalg.inv(c + e * rhs)
    torch.testing.assert_close(solver.solve(rhs), expected, atol=1e-4, rtol=1e-4)
    again = moment.solver(0.01)
    assert torch.equal(again.factor, solver.factor)  # what was added to the diagonal is off again


@pytest.mark.parametrize("count", [5, 40])
def test_a_solve_in_sample_space_is_the_solve(count):
    rows = torch.randn(count, 12, generator=torch.Generator().manual_seed(0))
    moment = Moment(12)
    for part in rows.split(3):
        moment.add(part, 0.5)
    moment.done()
    c = 0.5 * (rows.T @ rows).double()
    solver = moment.solver(0.01)
    assert (solver.rows is None) == (count > 12)
    e = 0.01 * float(c.trace()) / 12
    rhs = torch.randn(12, 2, dtype=torch.float64)
    expected = torch.linalg.solve(c + e * torch.eye(12, dtype=torch.float64), rhs)
    torch.testing.assert_close(solver.solve(rhs), expected, atol=1e-4, rtol=1e-4)
    v = torch.randn(2, 12, dtype=torch.float64)
    torch.testing.assert_close(moment.energy(v), (v @ c * v).sum(1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [5, 40])
def test_pinned_rows_are_in_the_moment_but_not_in_its_ridge(count):
    generator = torch.Generator().manual_seed(0)
    rows, large = torch.randn(count, 12, generator=generator), 1e4 * torch.ones(1, 12)
    moment = Moment(12)
    moment.pin(large, 0.25)
    moment.add(rows, 0.5)
    moment.done()
    rows, large = rows.double(), large.double()
    c, pinned = 0.5 * rows.T @ rows, 0.25 * large.T @ large
    solver = moment.solver(0.01)
    e = 0.01 * float(c.trace()) / 12
    assert solver.e == pytest.approx(e)
    rhs = torch.randn(12, 2, dtype=torch.float64, generator=generator)
    found = solver.solve(rhs)
    expected = torch.linalg.solve(c + pinned + e * torch.eye(12, dtype=torch.float64), rhs)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    # What is told apart by the small rows alone is not drowned by the large one.
    assert float((large @ found).abs().max()) < 1e-3


@pytest.mark.parametrize("make", [lambda: make_lm("llama"), lambda: moe("mixtral")])
def test_what_all_texts_begin_with_is_preserved_too(make):
    lm = make()
    writers = find_writers(lm)
    encoded = texts(4, 1)
    prefix = plan_reading(lm, writers, encoded).prefix
    assert prefix == encoded[0].ids[: len(prefix)] != ()
    ((_, moments),) = Preserved(lm, writers, [encoded]).groups()
    seen = []
    (writer,) = [w for w in writers if w.layer == 1 and not w.experts and w.weight.endswith("o_proj.weight")]
    hook = lm.model.get_submodule(writer.name).register_forward_hook(
        lambda _m, args, _o: seen.append(args[0])
    )
    with torch.no_grad():
        for e in encoded:
            lm.model(input_ids=torch.tensor([e.ids]))
    hook.remove()
    first = seen[0][0, : len(prefix)].double()
    rest = torch.cat([s[0, len(prefix) :] for s in seen]).double()
    expected = first.T @ first / len(first) + rest.T @ rest / len(rest)
    eye = torch.eye(expected.shape[0], dtype=torch.float64)
    torch.testing.assert_close(
        moments[writer.name, 0].energy(eye), expected.diagonal(), atol=1e-5, rtol=1e-3
    )


def test_an_ill_conditioned_moment_raises_its_ridge_and_says_so():
    moment = Moment(8)
    for _ in range(20):
        moment.add(torch.ones(4, 8) * 1e3, 1.0)
    moment.done()
    solver = moment.solver(1e-30)
    assert solver.ridge > 1e-30
    assert bool(torch.isfinite(solver.solve(torch.ones(8, 1, dtype=torch.float64))).all())


def test_inputs_that_are_not_finite_are_an_error():
    moment = Moment(8)
    moment.add(torch.full((2, 8), float("nan")), 1.0)
    moment.done()
    with pytest.raises(NonFinite, match="input of layer x"):
        moment.solver(1e-3, where="layer x")


def test_an_edit_changes_targets_more_than_what_is_preserved(llama):
    writers = find_writers(llama)
    _, target, _, sets, found, lambdas, alphas = solved(llama, writers, 1, 1.0)

    def outputs(encoded):
        with torch.no_grad():
            return torch.cat([llama.model(torch.tensor([e.ids])).logits[0, -1:] for e in encoded])

    before = outputs(target), outputs(sets[0])
    with applied(llama.model, found.plan(lambdas, alphas)):
        after = outputs(target), outputs(sets[0])
    moved = [float((b - a).norm() / b.norm()) for b, a in zip(before, after, strict=True)]
    assert moved[0] > 0
    assert moved[1] < moved[0]
