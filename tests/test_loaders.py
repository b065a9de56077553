import json
import sys
from types import SimpleNamespace

import pytest

from saber.errors import DataError, MissingExtra
from saber.prompts import Prompt, PromptSet, load, normalised


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def refused(source, *parts, **options):
    with pytest.raises(DataError) as caught:
        load(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def test_text_keeps_lines_in_order_and_skips_blanks_and_comments(tmp_path):
    path = write(tmp_path / "p.txt", "\ufeff# head\r\nfirst é\r\n\r\n  second \r\n # note\rthird")
    found = load(path)
    assert found.texts == ["first é", "second", "third"]
    assert found.name == "p"
    assert [p.id for p in found] == ["p:2", "p:4", "p:6"]
    assert found.dropped == 0


def test_marks_that_joined_files_leave_are_no_text(tmp_path):
    path = write(tmp_path / "p.txt", "a\u200b\n\ufeff# head\n\ufeffb \n\u200b\n\u2060 \ufeffc\n")
    assert load(path).texts == ["a", "b", "c"]
    refused(write(tmp_path / "p.jsonl", '{"prompt": "\ufeff"}'), "line 1", "'prompt'", "empty")


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_utf_16_without_a_mark_is_told(tmp_path, name):
    file = tmp_path / name
    file.write_bytes("prompt\none\ntwo\n".encode("utf-16-le"))
    with pytest.raises(DataError, match="NUL character in line 1, as text in UTF-16"):
        load(file)


def test_a_category_that_is_no_number_is_none(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "one", "category": NaN, "split": NaN}\n')
    (found,) = load(file)
    assert (found.category, found.split) == ("", "")


def test_text_is_cut_at_newlines_only(tmp_path):
    path = write(tmp_path / "p.txt", "one\u2028still one\x0c\nTwo")
    assert load(path).texts == ["one\u2028still one", "Two"]


def test_duplicates_are_dropped_and_counted(tmp_path):
    lines = ["What is rain?", "what  is RAIN", "What’s snow?", "What's snow", "hail"]
    path = write(tmp_path / "p.txt", "\n".join(lines))
    found = load(path)
    assert found.texts == ["What is rain?", "What’s snow?", "hail"]
    assert found.dropped == 2


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("كيف أكسر قفلا؟", "كيف أكسر قفلا"),
        ("میں کیسے سوؤں؟ بتاؤ۔", "میں کیسے سوؤں بتاؤ"),
        ("ताला कैसे खोलें।", "ताला कैसे खोलें?"),
        ("如何开锁？", "如何开锁"),
        ("《红楼梦》是谁写的？", "红楼梦 是谁写的"),
        ("\u202bשלום, עולם!\u202c", "שלום עולם"),
    ],
)
def test_normalised_leaves_out_marks_of_other_scripts(a, b):
    assert normalised(a) == normalised(b)


@pytest.mark.parametrize(
    ("a", "b"), [("2+2?", "2*2?"), ("3.5", "3 5"), ("C", "C++"), ("7-5", "7 5"), ("???", "!!!")]
)
def test_normalised_keeps_different_sums_apart(a, b):
    assert normalised(a) != normalised(b)


def test_jsonl_takes_strings_and_objects(tmp_path):
    rows = ["plain", {"Goal": "aimed", "Category": "c", "id": 7, "split": "fit"}, {"text": "t"}]
    path = write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    found = load(path)
    assert found.texts == ["plain", "aimed", "t"]
    assert tuple(found)[1] == Prompt("7", "c", "aimed", "fit")


def test_column_order_is_prompt_text_instruction_goal_question(tmp_path):
    row = {"question": "q", "goal": "g", "instruction": "i", "text": "t", "prompt": "p"}
    for expected in "ptigq":
        assert load(write(tmp_path / "p.jsonl", json.dumps(row))).texts == [expected]
        del row[next(k for k, v in row.items() if v == expected)]


def test_ids_are_unique_even_when_the_file_repeats_them(tmp_path):
    rows = [{"prompt": p, "id": "same"} for p in ("a", "b", "c")]
    found = load(write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows))))
    assert len({p.id for p in found}) == 3


def test_ids_that_are_made_unique_meet_no_other(tmp_path):
    rows = [{"prompt": p, "id": i} for p, i in (("a", "x:3"), ("b", "x"), ("c", "x"))]
    found = load(write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows))))
    assert len({p.id for p in found}) == 3


def test_csv_as_spreadsheets_leave_it(tmp_path):
    """Blank lines above the header, rows of blanks, and a prompt beyond csv's own limit."""
    long = "word " * 40_000
    path = write(tmp_path / "p.csv", f'\r\n\r\nprompt,category\r\na,x\r\n , \r\n"{long}",y\r\n')
    assert load(path).texts == ["a", long.strip()]
    refused(write(tmp_path / "p.csv", "\n\na,b\n1,2\n"), "line 4", "'a', 'b'")


def test_fields_that_are_not_parted_by_commas_are_told(tmp_path):
    for mark in ";\t|":
        text = f"prompt{mark}category\nopen it{mark}x\n"
        refused(write(tmp_path / "p.csv", text), "Part fields by commas")


def test_csv_with_quotes_newlines_and_a_named_column(tmp_path):
    path = write(tmp_path / "p.csv", 'n,Ask,category\n1,"a, ""b""\nc",x\n,,\n2,d,y\n')
    for found in (load(f"{path}#Ask"), load(path, column="Ask"), load(f"{path}#ask", column="ask")):
        assert found.texts == ['a, "b"\nc', "d"]
        assert found.categories == ["x", "y"]


def test_a_hash_in_a_real_file_name_is_no_column(tmp_path):
    assert load(write(tmp_path / "a#b.txt", "x")).texts == ["x"]


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "p.parquet"
    parquet.write_table(arrow.table({"question": ["a", "b"], "category": ["x", None]}), path)
    assert load(path).texts == ["a", "b"]
    assert load(path).categories == ["x", ""]
    refused(f"{path}#nope", "'nope'", "'question', 'category'", "path#NAME")
    write(tmp_path / "bad.parquet", "not parquet at all")
    refused(tmp_path / "bad.parquet", "cannot be read as Parquet")


def test_parquet_columns_that_no_one_asks_for_are_not_read(tmp_path):
    """Those of pandas count nanoseconds, which Python's own times do not."""
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    when = arrow.array([1, 2], arrow.timestamp("ns"))
    path = tmp_path / "p.parquet"
    parquet.write_table(arrow.table({"when": when, "a.b": ["x", "y"], "Split ": ["fit"] * 2}), path)
    assert load(f"{path}#A.b").texts == ["x", "y"]
    assert {p.split for p in load(f"{path}#a.b")} == {"fit"}
    refused(path, "'when', 'a.b', 'Split '")
    late = arrow.array([10**12] * 2, arrow.timestamp("s"))  # after the year 9999
    parquet.write_table(arrow.table({"prompt": ["x", "y"], "id": late}), path)
    refused(path, "cannot be read as Parquet")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"pip install 'saber-llm\[parquet\]'"):
        load(write(tmp_path / "p.parquet", "x"))


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("p.txt", "", ["p.txt is empty"]),
        ("p.txt", "# only\n\n", ["holds no prompts"]),
        ("p.csv", "prompt\n", ["holds no prompts"]),
        ("p.md", "x", [".md", ".txt, .jsonl, .csv, .parquet"]),
        ("p", "x", ["(no suffix)"]),
        ("p.jsonl", '"a"\n{"prompt": \n', ["line 2", "not JSON"]),
        ("p.jsonl", '"a"\n\n3\n', ["line 3", "int"]),
        ("p.jsonl", '{"prompt": null}', ["line 1", "'prompt'", "empty"]),
        ("p.jsonl", '{"prompt": ["a"]}', ["line 1", "list"]),
        ("p.jsonl", '{"a": "x", "b": "y"}', ["'a', 'b'", "prompts: path#NAME"]),
        ("p.jsonl", "[" * 100_000, ["line 1", "not JSON"]),
        ("p.jsonl", '"a"\n{"prompt": "\\ud83d b"}', ["line 2", "'prompt'", "half a character"]),
        ("p.jsonl", '{"prompt": "a", "category": "\\udc00"}', ["line 1", "'category'"]),
        ("p.csv", "prompt,x\na,b\nc,d,e\n", ["line 3", "more fields"]),
        ("p.csv", 'prompt\n"a\n', ["not CSV"]),
        ("p.csv", "prompt,x\n ,b\n", ["line 2", "empty"]),
        ("p.csv", "a;prompt\n1;2\n", ["'a;prompt'"]),
    ],
)
def test_each_mistake_has_one_clear_line(tmp_path, name, text, parts):
    refused(write(tmp_path / name, text), *parts)


def test_mistakes_of_the_source(tmp_path):
    refused(tmp_path / "none.txt", "no prompt file")
    refused(tmp_path / "none", "no prompt file")
    refused(tmp_path, "is a directory")
    refused(f"{write(tmp_path / 'p.csv', 'a,b')}#a", "two columns", column="b")
    refused(f"{write(tmp_path / 'p.txt', 'x')}#a", "plain text")


def test_other_encodings_name_byte_and_line(tmp_path):
    refused(write(tmp_path / "p.txt", "ab\ncaf\xe9", "latin-1"), "byte 6 (0xe9) in line 2", "UTF-8")
    refused(write(tmp_path / "q.csv", "prompt\na", "utf-16"), "byte 0")


class Hub:
    def __init__(self, splits):
        self.splits, self.calls = splits, []

    def load_dataset(self, name, split=None):
        self.calls.append((name, split))
        if split is None:
            return self.splits
        if split not in self.splits:
            raise ValueError(f'Unknown split "{split}".\nmore')
        return self.splits[split]


def test_hub_ids_with_split_and_column(monkeypatch):
    hub = Hub({"train": [{"prompt": "a", "say": "b"}], "test": [{"prompt": "c", "say": "d"}]})
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=hub.load_dataset))
    assert load("me/set:test").texts == ["c"]
    assert load("me/set:train#say").texts == ["b"]
    assert load("me/set:train").name == "me/set"
    assert hub.calls[0] == ("me/set", "test")
    refused("me/set", "splits train, test", "me/set:train")
    refused("me/set:none", "cannot be read", "Unknown split")
    hub.splits = {"train": [{"prompt": "a"}]}
    assert load("me/set").texts == ["a"]


def test_hub_ids_with_a_configuration(monkeypatch):
    sets = {
        "law": {"train": [{"prompt": "a"}], "train[:2]": [{"prompt": "b"}]},
        "2024-01 all": {"test": [{"prompt": "c", "say": "d"}]},
    }

    def load_dataset(name, config=None, split=None):
        if config is None:
            listed = "Please pick one among the available configs: ['law', '2024-01 all']"
            raise ValueError(f"Config name is missing.\n{listed}\nExample of usage: ...")
        return sets[config] if split is None else sets[config][split]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load("me/set:law:train").texts == ["a"]
    assert load("me/set:law:train[:2]").texts == ["b"]
    assert load("me/set:2024-01 all:").texts == ["c"]
    assert load("me/set:2024-01 all:test#say").texts == ["d"]
    assert load("me/set:law:train").name == "me/set:law"
    refused("me/set:law:", "me/set:law has the splits train, train[:2]", "me/set:law:train")
    refused("me/set:low:train", "me/set:low:train cannot be read: 'low'", "the configuration")
    for source in ("me/set", "me/set:train"):
        refused(
            source,
            "Config name is missing. Please pick one among the available configs: ['law'",
            "me/set:CONFIGURATION:SPLIT",
        )
    refused("me/set:", "no prompt file")


def test_hub_sets_that_cannot_be_read_are_one_line(monkeypatch):
    def load_dataset(name, split=None):
        raise RuntimeError("Dataset scripts are no longer supported, but found set.py")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    refused("me/set:train", "me/set:train cannot be read", "scripts are no longer supported")


def test_hub_without_datasets_prints_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'saber-llm\[hub\]'"):
        load("owner/name")


def test_missing_file_in_an_existing_folder_is_not_taken_for_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    refused("data/prompts", "no prompt file")
    refused("nowhere/prompts.txt", "no prompt file")


def test_set_filters_and_fingerprint():
    rows = (Prompt("1", "x", "a", "fit"), Prompt("2", "y", "b", "fit"), Prompt("3", "x", "c"))
    found = PromptSet("s", rows)
    assert found.where(split="fit").texts == ["a", "b"]
    assert found.where(split="fit", category="x").texts == ["a"]
    assert len(found) == 3
    assert found.fingerprint() == PromptSet("other", rows).fingerprint()
    changed = PromptSet("s", (*rows[:2], Prompt("3", "x", "c", checker={"kind": "exact"})))
    assert len({found.fingerprint(), changed.fingerprint()}) == 2
