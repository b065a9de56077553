"""Read prompts from text, JSON lines, CSV, Parquet, or a dataset on the hub."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from saber.errors import DataError, MissingExtra
from saber.paths import expanded
from saber.prompts.model import Prompt, PromptSet

COLUMNS = ("prompt", "text", "instruction", "goal", "question")
KEPT = ("id", "category", "split", "reference")
_SPLIT = r"[\w.+%:\[\]-]+"
_HUB_ID = re.compile(
    rf"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)"
    rf"(?::(?P<config>[^:/\[\]]+):(?P<of>{_SPLIT})?|:(?P<split>{_SPLIT}))?"
)

_AROUND = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\u200b\u2060\ufeff"


class Row(NamedTuple):
    """One record of a file."""

    place: str
    """Where it stands, for errors and ids: `line 3` or `row 3`."""
    fields: Mapping[str, Any]
    """Its columns; a plain text line is under `prompt`."""


def load(source: str | Path, *, column: str | None = None, name: str = "") -> PromptSet:
    """Read a prompt set from a file or a hub dataset, without its duplicates.

    Files: `.txt` (a prompt a line; blank lines and lines that start with # are skipped),
    `.jsonl` (strings or objects), `.csv` (with a header), `.parquet`. Hub: `owner/name`,
    `owner/name:split`, `owner/name:configuration:split` (without a split behind the second colon
    where there is one alone). The text is in `column`, or in `source#column`, or in the first of
    prompt, text, instruction, goal, question. Columns id, category, split and reference are
    kept. DataError: one line that says what is wrong and how to mend it.
    """
    place, column = _place_and_column(str(source), column)
    path = expanded(place)
    local = path.exists() or path.parent.is_dir() or path.suffix.lower() in _READERS
    hub = None if local else _HUB_ID.fullmatch(place)
    if hub:
        dataset = [part for part in hub.group("name", "config") if part]
        rows: Iterable[Row] = _hub_rows(dataset, hub["of"] or hub["split"])
        name = name or ":".join(dataset)
    else:
        rows = _file_rows(path, column)
        name = name or path.stem
    found = PromptSet.unique(name, _prompts(rows, place, column, name))
    if not found:
        raise DataError(f"{place} holds no prompts.", "Put one prompt in each line or row.")
    return found


def _place_and_column(source: str, column: str | None) -> tuple[str, str | None]:
    place, mark, fragment = source.rpartition("#")
    if not mark or not place or not fragment or expanded(source).exists():
        return source, column
    if column is not None and column != fragment:
        raise DataError(
            f"two columns are named for {place}: {fragment!r} in the source and {column!r}.",
            "Name one of them.",
        )
    return place, fragment


def _file_rows(path: Path, column: str | None) -> Iterator[Row]:
    if path.is_dir():
        raise DataError(f"{path} is a directory.", "Name a file inside it.")
    reader = _READERS.get(path.suffix.lower())
    if not path.exists():
        raise DataError(f"there is no prompt file {path}.", "Check the path.")
    if reader is None:
        raise DataError(
            f"{path}: the format {path.suffix or '(no suffix)'} is not known.",
            f"SABER reads {', '.join(_READERS)}; name the file after its format.",
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty.", "Put one prompt in each line or row.")
    if reader is _text_rows and column is not None:
        raise DataError(f"{path} is plain text, without a column {column!r}.", "Leave it out.")
    return reader(path, column)


def _decoded(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} is not UTF-8: byte {error.start} (0x{data[error.start]:02x}) in line {line}.",
            "Save the file as UTF-8.",
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(
            f"{path} holds a NUL character in line {line}, as text in UTF-16 does.",
            "Save the file as UTF-8.",
        )
    return text


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    text = _decoded(path).replace("\r\n", "\n").replace("\r", "\n")
    return enumerate(text.split("\n"), start=1)


def _text_rows(path: Path, _column: str | None) -> Iterator[Row]:
    for number, line in _lines(path):
        if (bare := _bare(line)) and not bare.startswith("#"):
            yield Row(f"line {number}", {"prompt": bare})


def _jsonl_rows(path: Path, _column: str | None) -> Iterator[Row]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}, line {number}: not JSON ({error}).",
                "Each line is one JSON string or object.",
            ) from error
        if isinstance(value, str):
            value = {"prompt": value}
        if not isinstance(value, dict):
            raise DataError(
                f"{path}, line {number}: a {type(value).__name__}, not a string or an object.",
                "Each line is one JSON string or object.",
            )
        yield Row(f"line {number}", value)


def _csv_rows(path: Path, _column: str | None) -> Iterator[Row]:
    text = _decoded(path)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        while reader.fieldnames == []:  # blank lines above the header
            reader.fieldnames = None
        for row in reader:
            if "".join(v if isinstance(v, str) else "".join(v or ()) for v in row.values()).strip():
                extra = row.pop(None, None)
                if extra:
                    raise DataError(
                        f"{path}, line {reader.line_num}: more fields than the header names.",
                        "Put quotes around a prompt that holds a comma.",
                    )
                yield Row(f"line {reader.line_num}", row)
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: not CSV ({error}).",
            "Put quotes around a field that holds a comma, and double the quotes inside it.",
        ) from error


def _parquet_rows(path: Path, column: str | None) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", "parquet") from error
    try:
        names = parquet.read_schema(path).names
        # Other columns may hold what Python has no values for, and take memory.
        wanted = [n for n in names if _folded(n) in (*COLUMNS, *KEPT, _folded(column or ""))]
        records = parquet.read_table(path, columns=wanted).to_pylist()
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(
            f"{path} cannot be read as Parquet: {_first_line(error)}.", "Write it anew."
        ) from error
    for number, record in enumerate(records, start=1):
        yield Row(f"row {number}", {name: record.get(name) for name in names})


_READERS: dict[str, Callable[[Path, str | None], Iterator[Row]]] = {
    ".txt": _text_rows,
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}


def _hub_rows(dataset: Sequence[str], split: str | None) -> Iterator[Row]:
    """Yield the rows of a dataset: its id, and its configuration where one is named."""
    name = ":".join(dataset)
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "hub") from error
    try:
        data = datasets.load_dataset(*dataset, split=split)
    except Exception as error:  # a dataset can be wrong in any way
        said = _first_line(error)
        parts = "the configuration, the split" if dataset[1:] else "the split"
        remedy = f"Check the name, {parts} and the network, or give a local file."
        if said == "Config name is missing":
            said = " ".join(str(error).splitlines()[:2])
            remedy = f"Name one: {name}:CONFIGURATION:SPLIT"
        raise DataError(
            f"the hub dataset {name}{f':{split}' if split else ''} cannot be read: {said}.", remedy
        ) from error
    if split is None:
        if len(data) != 1:
            raise DataError(
                f"the hub dataset {name} has the splits {', '.join(data)}.",
                f"Name one: {name}:{next(iter(data), 'train')}",
            )
        data = next(iter(data.values()))
    for number, record in enumerate(data, start=1):
        yield Row(f"row {number}", record)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _prompts(rows: Iterable[Row], place: str, column: str | None, name: str) -> Iterator[Prompt]:
    used: set[str] = set()
    for row in rows:
        key = _text_column(row, place, column)
        text = row.fields[key]
        if not isinstance(text, str) or not _bare(text):
            empty = text is None or isinstance(text, str)
            kind = "is empty" if empty else f"is a {type(text).__name__}, not text"
            raise DataError(
                f"{place}, {row.place}: the column {key!r} {kind}.",
                "Mend or remove it, or name another column: path#NAME.",
            )
        for column_, value in row.fields.items():
            used_here = column_ == key or _folded(column_) in KEPT
            if used_here and isinstance(value, str) and not _is_text(value):
                raise DataError(
                    f"{place}, {row.place}: the column {column_!r} holds half a character "
                    "(a surrogate alone), which is no text.",
                    "Write the file anew: JSON has \\ud800 to \\udfff in pairs alone.",
                )
        number = row.place.rpartition(" ")[2]
        given = {_folded(k): v for k, v in row.fields.items() if k != key}
        id_ = _string(given.get("id")) or f"{name}:{number}"
        while id_ in used:
            id_ = f"{id_}:{number}"
        used.add(id_)
        yield Prompt(
            id=id_,
            category=_string(given.get("category")),
            text=_bare(text),
            split=_string(given.get("split")),
            reference=_string(given.get("reference")),
        )


def _bare(text: str) -> str:
    """Return the text without white space around it, and without the marks that joined files leave."""
    return text.strip(_AROUND)


def _is_text(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _text_column(row: Row, place: str, column: str | None) -> str:
    folded = {_folded(key): key for key in reversed(list(row.fields))}
    if column is not None:
        if column in row.fields:
            return column
        if _folded(column) in folded:
            return folded[_folded(column)]
        raise DataError(
            f"{place}, {row.place}: no column {column!r}; found: {_names(row)}.",
            "Name the one with the prompts: path#NAME.",
        )
    for known in COLUMNS:
        if known in folded:
            return folded[known]
    raise DataError(
        f"{place}, {row.place}: no column named {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}; "
        f"found: {_names(row)}.",
        "Part fields by commas."
        if len(row.fields) == 1 and re.search(r"[;\t|]", next(iter(row.fields)))
        else "Name the one with the prompts: path#NAME.",
    )


def _folded(name: str) -> str:
    return name.strip().lower()


def _names(row: Row) -> str:
    return ", ".join(map(repr, row.fields)) or "none"


def _string(value: object) -> str:
    nothing = value is None or value != value  # NaN: what pandas writes where there is no value
    return "" if nothing else str(value).strip()
