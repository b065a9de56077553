import random
from collections import Counter
from dataclasses import replace

import pytest

from saber.errors import DataError, UsageError
from saber.prompts import Prompt, PromptSet, check_disjoint, normalised, split


def made(sizes, split_of=lambda i: ""):
    prompts = []
    for category, size in sizes.items():
        for i in range(size):
            text = f"{category} question {i}"
            prompts.append(Prompt(f"{category}{i}", category, text, split_of(i)))
    return PromptSet("target", tuple(prompts))


def parts_of(splits):
    return [splits.fit, splits.validation, splits.heldout]


@pytest.mark.slow
def test_splits_are_disjoint_and_complete_and_large_enough_for_hundreds_of_seeds():
    for seed in range(400):
        rng = random.Random(seed)
        sizes = {f"c{j}": rng.randint(1, 25) for j in range(rng.randint(1, 9))}
        sizes["c0"] += 20
        whole = made(sizes)
        parts = parts_of(split(whole, seed=seed))
        keys = [normalised(t) for part in parts for t in part.texts]
        assert len(keys) == len(set(keys))
        assert sorted(keys) == sorted(map(normalised, whole.texts))
        assert [len(p) >= m for p, m in zip(parts, (8, 4, 8), strict=True)] == [True] * 3
        assert [{q.split for q in p} for p in parts] == [{"fit"}, {"validation"}, {"heldout"}]


def test_repeated_prompts_never_straddle_splits():
    whole = made({"a": 60})
    doubled = PromptSet("t", (*whole, *(Prompt(p.id, "b", p.text.upper() + "!") for p in whole)))
    for seed in range(20):
        keys = [normalised(t) for p in parts_of(split(doubled, seed=seed)) for t in p.texts]
        assert len(keys) == len(set(keys)) == 60


def test_sizes_follow_the_fractions_and_every_category_keeps_its_share():
    sizes = {"a": 40, "b": 20, "c": 40, "d": 7, "e": 13}
    for seed in range(50):
        parts = parts_of(split(made(sizes), seed=seed))
        assert [len(p) for p in parts] == [60, 18, 42]
        for fraction, part in zip((0.5, 0.15, 0.35), parts, strict=True):
            counts = Counter(part.categories)
            assert all(abs(counts[c] - fraction * n) < 2 for c, n in sizes.items())


def test_the_odd_prompt_falls_to_another_category_with_another_seed():
    whole = made(dict.fromkeys("abcdef", 11))
    fits = {tuple(sorted(Counter(split(whole, seed=s).fit.categories).items())) for s in range(20)}
    assert len(fits) > 3


def test_same_seed_same_split_other_seed_other_split():
    whole = made({"a": 50, "b": 50})
    assert split(whole, seed=3) == split(whole, seed=3)
    assert split(whole, seed=3).fit.texts != split(whole, seed=4).fit.texts
    heldout = [frozenset(split(whole, seed=s).heldout.texts) for s in range(30)]
    assert len(set(heldout)) == 30


def test_file_order_does_not_matter():
    whole = made({"a": 30, "b": 31, "c": 2})
    whole = PromptSet("target", (*whole, *(Prompt("x", "d", t.upper()) for t in whole.texts[:9])))
    rows = list(whole)
    for seed in range(30):
        random.Random(seed).shuffle(rows)
        assert split(PromptSet("target", tuple(rows)), seed=5) == split(whole, seed=5)


def test_known_split_so_that_releases_keep_it():
    found = split(made({"a": 20}), seed=0)
    assert [p.id for p in found.validation] == KNOWN


KNOWN = ["a16", "a15", "a5", "a9"]


def test_small_sets_are_raised_to_the_minimum_and_smaller_ones_refused():
    assert [len(p) for p in parts_of(split(made({"a": 20}), seed=0))] == [8, 4, 8]
    assert [len(p) for p in parts_of(split(made({"a": 21}), seed=0))] == [9, 4, 8]
    uneven = split(made({"a": 30}), seed=0, fractions=(0.2, 0.2, 0.6))
    assert [len(p) for p in parts_of(uneven)] == [8, 6, 16]
    with pytest.raises(DataError, match=r"19 different prompts; the splits need 20 .*least 1\."):
        split(made({"a": 19}), seed=0)
    with pytest.raises(DataError, match="0 different prompts"):
        split(PromptSet("none", ()), seed=0)


def test_own_splits_are_kept():
    names = ["fit", "validation", "test"]
    whole = made({"a": 30}, lambda i: names[i % 3])
    found = split(whole, seed=9)
    assert found.heldout.texts == whole.where(split="test").texts
    assert {p.split for p in found.heldout} == {"heldout"}


@pytest.mark.parametrize(
    ("split_of", "message"),
    [
        (lambda i: "fit" if i else "", "1 of 30 prompts have no split"),
        (lambda i: "fit", "validation split has 0 prompts and needs 4"),
        (lambda i: "fit" if i else "north", "unknown split 'north'"),
    ],
)
def test_own_splits_that_cannot_be_used(split_of, message):
    with pytest.raises(DataError, match=message):
        split(made({"a": 30}, split_of), seed=0)


def test_own_splits_that_share_a_prompt_are_refused():
    whole = made({"a": 30}, lambda i: ("fit", "validation", "heldout")[i % 3])
    leak = Prompt("leak", "a", "A question 0!", "heldout")
    with pytest.raises(DataError, match=r"target/fit \(a0\) and in target/heldout \(leak\)"):
        split(PromptSet("target", (*whole, leak)), seed=0)


def test_fractions_are_checked():
    for bad in ((0.5, 0.5, 0.5), (1.0, 0.0, 0.0)):
        with pytest.raises(UsageError):
            split(made({"a": 30}), seed=0, fractions=bad)


def test_check_disjoint_names_the_prompt():
    a = PromptSet("target", (Prompt("1", "", "How do I  pick a lock?"),))
    b = PromptSet("neutral", (Prompt("2", "", "x"), Prompt("3", "", "how do i pick a lock")))
    check_disjoint(a, PromptSet("n", (Prompt("2", "", "How do I pick a luck?"),)))
    with pytest.raises(DataError, match=r"target \(1\) and in neutral \(3\): 'how do i pick"):
        check_disjoint(a, b)
    with pytest.raises(DataError, match=r"is in two sets named target \(1, 3\): 'how do i pick"):
        check_disjoint(a, replace(b, name="target"))
