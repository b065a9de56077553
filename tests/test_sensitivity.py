"""What answers feel of a direction, and how lambda follows it."""

import pytest
import torch
from conftest import make_lm
from test_architectures import language_model
from test_selective import moe

from saber.errors import NonFinite
from saber.linalg import unit
from saber.lm.chat import Encoded
from saber.lm.layers import stream, with_stream
from saber.lm.substitution import streams_axis
from saber.lm.tap import plain_experts
from saber.sensitivity import RANGE, TEXTS, fisher, information, sample, weights

STEP = 0.02
COPIES = 400


def unit_rows(lm, k, seed):
    return unit(torch.randn(k, lm.d_model, generator=torch.Generator().manual_seed(seed)))


def moved(lm, text, layer, token, change):
    """Log-probabilities of the answer's tokens with the stream changed behind a layer, at a token."""

    def add(_module, _inputs, output):
        hidden = stream(output).clone()
        hidden[0, token] += change
        return with_stream(output, hidden)

    hook = lm.layers[layer].register_forward_hook(add)
    try:
        with torch.no_grad(), plain_experts(lm):
            logits = lm.model(input_ids=torch.tensor([text.ids]), use_cache=False).logits[0]
    finally:
        hook.remove()
    return logits[text.answer_positions].double().log_softmax(-1)


def by_differences(lm, text, layer, direction):
    """2 KL / e^2 of a change of e at each token in turn, its mean over tokens."""
    nothing = torch.zeros(lm.d_model)
    p = moved(lm, text, layer, 0, nothing)
    total = 0.0
    for token in range(len(text.ids)):
        for sign in (1, -1):
            q = moved(lm, text, layer, token, sign * STEP * direction)
            total += float((p.exp() * (p - q)).sum()) / STEP**2
    return total / len(text.ids)


@pytest.mark.parametrize("make", [make_lm, lambda: make_lm("gemma2"), lambda: make_lm("gpt2"), moe])
def test_it_is_the_curvature_of_the_divergence(make):
    lm = make()
    lm.model.double()
    short, long = Encoded((5, 9, 70, 33, 12), 3), Encoded((5, 9, 18, 44, 60, 101, 7, 8), 4)
    directions = {0: unit_rows(lm, 1, 0), 1: unit_rows(lm, 2, 1)}
    found = information(lm, directions, [short, long] * COPIES, seed=3)
    for layer, rows in directions.items():
        assert found[layer].shape == (2 * COPIES, len(rows))
        for start, text in enumerate((short, long)):
            felt = found[layer][start::2]
            noise = felt.std(0) / COPIES**0.5
            for i, row in enumerate(rows):
                expected = by_differences(lm, text, layer, row.double())
                assert abs(float(felt[:, i].mean()) - expected) < 4.5 * float(noise[i])
                assert float(noise[i]) < 0.25 * expected


@pytest.mark.parametrize("family", ["deepseek_v4", "gemma3n_text"])
def test_what_moves_the_mean_of_several_streams_moves_each(family, monkeypatch):
    drawn = 7
    monkeypatch.setattr(
        torch, "multinomial", lambda p, _n, generator: torch.full((len(p), 1), drawn)
    )
    lm = language_model(family)
    lm.model.double()
    text = Encoded((5, 9, 70, 33, 12), 4)  # one token that is predicted
    (row,) = unit_rows(lm, 1, 0).double()
    with plain_experts(lm):
        axis = streams_axis(lm)

    def after(token, change):
        def add(_module, _inputs, output):
            hidden = stream(output).clone()
            by_streams = hidden.movedim(axis, 0)
            by_streams[:, 0, token] += change * row
            return with_stream(output, hidden)

        hook = lm.layers[1].register_forward_hook(add)
        with torch.no_grad(), plain_experts(lm):
            logits = lm.model(input_ids=torch.tensor([text.ids]), use_cache=False).logits[0, 3]
        hook.remove()
        return float(logits.log_softmax(-1)[drawn])

    slopes = [(after(t, 1e-4) - after(t, -1e-4)) / 2e-4 for t in range(len(text.ids))]
    expected = sum(s**2 for s in slopes) / len(text.ids)
    found = information(lm, {1: row[None]}, [text, Encoded((5, 9, 18), 1)])[1]
    assert found.shape == (2, 1)
    assert float(found[0]) == pytest.approx(expected, rel=0.02)


def test_the_median_text_decides_and_the_seed_the_draws(llama):
    directions = {2: unit_rows(llama, 2, 0)}
    texts = [Encoded((5, 9, *range(20, 20 + n)), 2) for n in (3, 4, 5)]
    each = information(llama, directions, texts)[2]
    torch.testing.assert_close(fisher(llama, directions, texts)[2], each.sort(0).values[1])
    assert torch.equal(fisher(llama, directions, texts)[2], fisher(llama, directions, texts)[2])
    assert not torch.equal(each, information(llama, directions, texts, seed=1)[2])


def test_nothing_is_left_behind_in_the_model(lm):
    before = {n: p.clone() for n, p in lm.model.named_parameters()}
    ids = torch.tensor([[5, 9, 7]])
    with torch.no_grad():
        logits = lm.model(input_ids=ids).logits
    fisher(lm, {1: unit_rows(lm, 1, 0)}, [Encoded((5, 9, 7, 8), 2)])
    for name, parameter in lm.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert not parameter.requires_grad
    again = lm.model(input_ids=ids).logits
    assert torch.equal(again, logits)
    assert not again.requires_grad


def test_a_model_that_computes_no_numbers_is_named(llama):
    with torch.no_grad():
        llama.layers[3].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(NonFinite, match="own answers"):
        fisher(llama, {1: unit_rows(llama, 1, 0)}, [Encoded((5, 9, 7, 8), 2)])


def test_weights_follow_a_power_of_what_is_felt():
    felt = {3: torch.tensor([4.0, 1.0]).double(), 7: torch.tensor([1.0]).double()}
    assert weights(felt, 2.0) == {3: [4.0, 0.25], 7: [0.25]}
    assert weights(felt, 0.0) == {3: [1.0, 1.0], 7: [1.0]}


def test_weights_stay_in_range_where_hardly_anything_is_felt():
    felt = {0: torch.tensor([1.0]).double(), 1: torch.tensor([0.0]).double()}
    assert weights(felt, 4.0) == {0: [16.0], 1: [1 / RANGE]}
    assert weights({0: torch.zeros(2).double()}, 1.5) == {0: [1.0, 1.0]}


@pytest.mark.parametrize("count", [1, 5, 16, 25, 31, 92])
def test_a_sample_is_spread_over_all_texts(count):
    taken = [text.ids[0] for text in sample([Encoded((i,), 1) for i in range(count)])]
    assert len(taken) == min(TEXTS, count)
    gaps = {b - a for a, b in zip(taken, [*taken[1:], count], strict=True)}
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1
    assert sample([]) == []
