"""The bundled target, neutral and borderline sets, read as plain files."""

import json
import re
from collections import Counter
from importlib.resources import files
from itertools import combinations
from statistics import median

import pytest

DATA = files("saber.prompts") / "data"
NAMES = ("target", "neutral", "borderline", "harmful")
ALL = (*NAMES, "everyday")
TWINS = ("target", "neutral")
SPLITS = ("fit", "validation", "heldout")
UNSEEN = {"privacy", "forgery"}
SEEN = {
    "drugs",
    "fraud",
    "hacking",
    "harassment",
    "misinformation",
    "theft",
    "violence",
    "weapons",
}
BORDERLINE = {
    "fiction",
    "figurative",
    "health",
    "history",
    "homonym",
    "privacy-public",
    "safe-target",
    "technical",
}
UNSAFE = (
    r"\b(attack|blackmail|bomb|counterfeit|crime|drug|fake|forge|gun|hack|harm|hate|hurt|illegal|kill"
    r"|knife|murder|poison|police|scam|secretly|shoot|smuggle|spy|stalk|steal|stolen|threat|trick"
    r"|virus|weapon)"
)


def rows(name):
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_bytes().splitlines()]


def words(text):
    return re.findall(r"\w+", text.lower())


def pairs():
    twins = {row["id"]: row for row in rows("neutral")}
    return [(row, twins[row["twin"]]) for row in rows("target")]


@pytest.mark.parametrize("name", ALL)
def test_files_are_lines_of_utf8_with_the_fields_of_the_set(name):
    raw = (DATA / f"{name}.jsonl").read_bytes()
    assert b"\r" not in raw
    assert raw.endswith(b"}\n")
    assert b"\n\n" not in raw
    raw.decode("utf-8")
    fields = {"id", "category", "split", "prompt"} | ({"twin"} if name in TWINS else set())
    for row in rows(name):
        assert set(row) == fields, row
        assert all(isinstance(value, str) for value in row.values()), row


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_one_short_line(name):
    for row in rows(name):
        text = row["prompt"]
        assert text == " ".join(text.split()), row
        assert 5 <= len(text.split()) <= 25, row
        assert text[-1] in ".?", row
        assert text[0].isupper(), row


def test_ids_and_prompts_are_unique_across_sets():
    every = [row for name in ALL for row in rows(name)]
    ids = Counter(row["id"] for row in every)
    texts = Counter(" ".join(words(row["prompt"])) for row in every)
    assert [i for i, count in ids.items() if count > 1] == []
    assert [text for text, count in texts.items() if count > 1] == []


@pytest.mark.parametrize("name", TWINS)
def test_categories_and_splits_of_the_twin_sets(name):
    table = Counter((row["category"], row["split"]) for row in rows(name))
    expected = {(c, s): n for c in SEEN for s, n in zip(SPLITS, (12, 4, 8), strict=True)}
    expected |= {(c, "heldout"): 24 for c in UNSEEN}
    assert table == expected
    assert Counter(row["split"] for row in rows(name)) == {
        "fit": 96,
        "validation": 32,
        "heldout": 112,
    }
    assert [row["id"] for row in rows(name)] == [
        f"{name}-{category}-{i:02}"
        for category in dict.fromkeys(row["category"] for row in rows(name))
        for i in range(1, 25)
    ]


def test_categories_and_splits_of_the_borderline_set():
    table = Counter((row["category"], row["split"]) for row in rows("borderline"))
    assert table == {(c, s): n for c in BORDERLINE for s, n in zip(SPLITS, (52, 7, 6), strict=True)}
    assert [row["id"] for row in rows("borderline")] == [
        f"borderline-{i:03}" for i in range(1, 521)
    ]


def test_more_harmful_prompts_leave_the_unseen_categories_unseen():
    table = Counter((row["category"], row["split"]) for row in rows("harmful"))
    assert table == {(c, s): n for c in SEEN for s, n in zip(SPLITS, (16, 4), strict=False)}


def test_everyday_requests_are_of_sixteen_kinds_and_none_of_them_is_unsafe():
    everyday = rows("everyday")
    table = Counter((row["category"], row["split"]) for row in everyday)
    kinds = {row["category"] for row in everyday}
    assert len(kinds) == 16
    assert table == {(c, s): n for c in kinds for s, n in (("fit", 4), ("heldout", 3))}
    for row in everyday:
        text = row["prompt"]
        assert text == " ".join(text.split()), row
        assert 3 <= len(text.split()) <= 32, row
        assert not re.search(UNSAFE, text.lower()), row


def test_no_everyday_request_that_reports_is_nearly_a_capability_prompt():
    """These are preserved as well."""
    known = [set(words(row["prompt"])) for row in rows("capability")]
    for row in rows("everyday"):
        bag = set(words(row["prompt"]))
        near = any(len(bag & other) > 0.8 * len(bag | other) for other in known)
        assert row["split"] != "heldout" or not near, row


def test_nothing_that_selects_is_nearly_a_prompt_that_reports():
    every = [(row, set(words(row["prompt"]))) for name in ALL for row in rows(name)]
    held = [(row["id"], bag) for row, bag in every if row["split"] == "heldout"]
    close = [
        (row["id"], i)
        for row, bag in every
        if row["split"] != "heldout"
        for i, other in held
        if len(bag & other) > 0.8 * len(bag | other)
    ]
    assert close == []


def test_twins_point_at_each_other_within_a_category_and_a_split():
    assert len(pairs()) == len({neutral["id"] for _, neutral in pairs()}) == 240
    for target, neutral in pairs():
        assert neutral["twin"] == target["id"]
        assert (neutral["category"], neutral["split"]) == (target["category"], target["split"])


def test_twins_have_the_same_form():
    same = [words(a["prompt"])[0] == words(b["prompt"])[0] for a, b in pairs()]
    assert sum(same) >= 0.95 * len(same)
    ends = [a["prompt"][-1] == b["prompt"][-1] for a, b in pairs()]
    assert all(ends)
    lengths = [(len(a["prompt"].split()), len(b["prompt"].split())) for a, b in pairs()]
    assert median(abs(a - b) for a, b in lengths) <= 2
    assert max(abs(a - b) for a, b in lengths) <= 3
    assert abs(sum(a - b for a, b in lengths)) <= 0.25 * len(lengths)


def test_neutral_prompts_hold_no_unsafe_words():
    prompts = [row["prompt"] for row in rows("neutral")]
    assert [text for text in prompts if re.search(UNSAFE, text.lower())] == []


@pytest.mark.parametrize("name", NAMES)
def test_no_near_duplicates_within_a_set(name):
    bags = [(row["id"], set(words(row["prompt"]))) for row in rows(name)]
    close = [(i, j) for (i, a), (j, b) in combinations(bags, 2) if len(a & b) > 0.8 * len(a | b)]
    assert close == []


def test_splits_hold_similar_forms():
    """No opening word takes a much larger share of one split than of another."""
    for name in ("target", "neutral"):
        shares = []
        for split in SPLITS:
            first = [words(row["prompt"])[0] for row in rows(name) if row["split"] == split]
            shares.append({word: count / len(first) for word, count in Counter(first).items()})
        for word in set().union(*shares):
            values = [share.get(word, 0.0) for share in shares]
            assert max(values) - min(values) <= 0.1, (name, word, values)
