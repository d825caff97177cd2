"""Files -> rows: JSONL, JSON, Parquet, CSV, TSV, plain text, Arrow, a `datasets` folder, or a folder of any of them.

The format follows from the suffix.  Every row knows its place, so that an error can send its reader to the line.
A folder is read in the order of its sorted paths, so that the same folder gives the same rows.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from protocol.errors import BadConfig

BATCH_ROWS: Final = 1024
PARAGRAPH_CHARACTERS: Final = 2000
"""A longer paragraph of plain text is cut at the last space before this: about 500 tokens."""
MAX_FIELD_CHARACTERS: Final = 2**24


class Row(NamedTuple):
    """One record as it stands in the file; `where` is its place for errors."""

    where: str
    fields: Mapping[str, Any]


def rows(path: Path) -> Iterator[Row]:
    """Every row below `path`.  Raises BadConfig naming the file and line, also for a path without usable files."""
    if not path.exists():
        raise BadConfig(
            f"data path {path} does not exist: correct `path` of this data set in the agent's configuration"
        )
    if path.is_dir():
        yield from _folder(path)
        return
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise BadConfig(f"{path.name}: unknown kind of file; use one of {', '.join(sorted(READERS))}")
    try:
        yield from reader(path)
    except UnicodeDecodeError:
        raise BadConfig(f"{path.name}: not UTF-8 text; convert it first") from None
    except OSError as error:
        raise BadConfig(f"{path.name}: cannot be read: {error.strerror or error}") from None


def _folder(path: Path) -> Iterator[Row]:
    if (path / "state.json").is_file():  # what Dataset.save_to_disk leaves
        for file in _loads((path / "state.json").read_text(), f"{path.name}/state.json").get("_data_files", []):
            yield from rows(path / file["filename"])
    elif (path / "dataset_dict.json").is_file():  # what DatasetDict.save_to_disk leaves
        splits = _loads((path / "dataset_dict.json").read_text(), f"{path.name}/dataset_dict.json")["splits"]
        for split in ["train"] if "train" in splits else splits:
            yield from _folder(path / split)
    else:
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.suffix.lower() in READERS]
        if not files:
            raise BadConfig(f"data folder {path} holds no file of {', '.join(sorted(READERS))}")
        for file in files:
            yield from rows(file)


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path.name} line {number}"
                yield Row(where, _record(_loads(line, where), where))


def _json(path: Path) -> Iterator[Row]:
    whole = _loads(path.read_text(encoding="utf-8-sig"), path.name)
    if isinstance(whole, dict):  # {"data": [...]} and the like
        whole = next((value for value in whole.values() if isinstance(value, list)), None)
    if not isinstance(whole, list):
        raise BadConfig(f"{path.name}: must be a list of objects, or an object that holds one")
    for number, item in enumerate(whole, 1):
        where = f"{path.name} item {number}"
        yield Row(where, _record(item, where))


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        try:
            for fields in reader:
                yield Row(f"{path.name} line {reader.line_num}", {k: v for k, v in fields.items() if v is not None})
        except csv.Error as error:
            raise BadConfig(f"{path.name} line {reader.line_num}: not CSV: {error}") from None


def _text(path: Path) -> Iterator[Row]:
    first, paragraph = 1, ""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate([*lines, ""], 1):
            if line.strip():
                first = first if paragraph else number
                paragraph += line
                continue
            for part in _parts(paragraph.strip()):
                yield Row(f"{path.name} line {first}", {"text": part})
            paragraph = ""


def _parts(paragraph: str) -> Iterator[str]:
    while len(paragraph) > PARAGRAPH_CHARACTERS:
        cut = paragraph.rfind(" ", 1, PARAGRAPH_CHARACTERS) + 1 or PARAGRAPH_CHARACTERS
        yield paragraph[:cut].rstrip()
        paragraph = paragraph[cut:].lstrip()
    if paragraph:
        yield paragraph


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from _batches(path, file.iter_batches(batch_size=BATCH_ROWS))
    except pa.ArrowException as error:
        raise BadConfig(f"{path.name}: not Parquet: {_first_line(error)}") from None


def _arrow(path: Path) -> Iterator[Row]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            yield from _batches(path, pa.ipc.open_stream(source))
    except pa.ArrowException as error:
        raise BadConfig(f"{path.name}: not an Arrow stream: {_first_line(error)}") from None


def _batches(path: Path, batches: Iterator[Any]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for fields in batch.to_pylist():
            number += 1
            yield Row(f"{path.name} row {number}", fields)


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadConfig(f"{where}: not JSON: {error.msg} at column {error.colno}") from None


def _record(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadConfig(f"{where}: must be an object with fields, got {kind(value)}")
    return value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def kind(value: object) -> str:
    """What to call a value's type in an error."""
    match value:
        case None:
            return "nothing"
        case bool():
            return "true or false"
        case int() | float():
            return "number"
        case str():
            return "text"
        case list() | tuple():
            return "list"
        case dict():
            return "object"
        case _:
            return type(value).__name__


READERS: Final[dict[str, Callable[[Path], Iterator[Row]]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _text,
    ".arrow": _arrow,
}
