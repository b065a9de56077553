"""Probing that several workers share: to the last digit what one of them reads."""

import dataclasses

import pytest
import torch
from conftest import make_lm

from saber.errors import NonFinite
from saber.lm import forward as forwards
from saber.lm.forward import Share
from saber.lm.writers import find_writers
from saber.probing import Look, ProbeSpec, join, probe
from saber.prompts import Prompt, PromptSet


@pytest.fixture(scope="module")
def lm():
    return make_lm("llama")


@pytest.fixture
def several():
    """Prompts of many lengths, which make several batches."""
    texts = [f"Say {'word ' * (7 * i % 31)}number {i}." for i in range(150)]
    return PromptSet(
        "many", tuple(Prompt(f"many-{i}", "ab"[i % 2], text) for i, text in enumerate(texts))
    )


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
@pytest.mark.parametrize("of", [1, 2, 3, 50])
def test_parts_are_to_the_last_digit_what_one_reads(lm, several, of):
    spec, writers = ProbeSpec(positions=2), tuple(find_writers(lm))
    look = Look(several, spec, (), writers)
    before = lm.work.tokens
    whole = probe(lm, several, spec, first_token=True, writers=writers)
    spent = lm.work.tokens
    parts = [look.part(lm, Share(i, of)) for i in range(of)]
    assert lm.work.tokens - spent < 1.05 * (spent - before) + 30 * of  # and the template's start
    assert sorted(row for p in parts for row in p.rows) == list(range(len(several)))
    assert sum(len(p.rows) > 0 for p in parts) == min(of, 15)  # batches
    found = join(parts)
    for field in dataclasses.fields(found):
        a, b = getattr(found, field.name), getattr(whole, field.name)
        plain = field.name in ("categories", "pairs")
        assert a == b if plain else same(a, b), field.name
    assert found.pairs == several.pairs


@pytest.mark.parametrize("twins", [False, True])
def test_what_is_read_can_be_paired_whatever_was_left_out(lm, several, twins):
    if twins:
        rows = tuple(dataclasses.replace(p, twin=f"other-{p.id}") for p in several)
        several = dataclasses.replace(several, prompts=rows)
    kept = [i % 4 != 1 for i in range(len(several))]
    expected = tuple(pair for pair, keep in zip(several.pairs, kept, strict=True) if keep)
    fewer = several.only(kept)
    look = Look(fewer, ProbeSpec())
    assert join([look.part(lm, Share(i, 2)) for i in range(2)]).pairs == expected
    once_more = [i % 5 != 1 for i in range(len(fewer))]
    assert fewer.only(once_more).pairs == tuple(
        pair for pair, keep in zip(expected, once_more, strict=True) if keep
    )


def test_a_part_that_is_missing_is_told(lm, several):
    look = Look(several, ProbeSpec())
    parts = [look.part(lm, Share(i, 2)) for i in range(2)]
    with pytest.raises(ValueError, match="missing"):
        join(parts[:1])
    with pytest.raises(ValueError, match="missing"):
        join([])


def test_shares_are_whole_batches_and_each_is_in_one():
    batches = [[i] for i in range(11)]
    for of in (1, 2, 4, 20):
        cuts = [Share(i, of).cut(batches) for i in range(of)]
        assert [b for cut in cuts for b in cut] == batches
        assert max(map(len, cuts)) - min(map(len, cuts)) <= 1
    assert forwards.WHOLE.cut(batches) == batches


def test_a_layer_that_gives_nan_at_any_token_is_named(lm):
    """Not only at the positions that are read."""
    prompts = PromptSet("two", (Prompt("a", "a", "one"), Prompt("b", "a", "a longer one")))

    def spoil(_module, _args, output):
        output = output.clone()
        output[0, 1, 3] = float("nan")
        return output

    handle = lm.layers[2].register_forward_hook(spoil)
    with pytest.raises(NonFinite, match="output of layer 2"):
        probe(lm, prompts, ProbeSpec())
    handle.remove()
    probe(lm, prompts, ProbeSpec())
