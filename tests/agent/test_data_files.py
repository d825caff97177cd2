"""Every file format and every shape gives the same examples; every fault names file, line and field."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agent.data import DataConfig, Example, Turn
from agent.data.files import PARAGRAPH_CHARACTERS, rows
from agent.data.shapes import examples
from protocol.errors import BadConfig

RECORDS: list[dict[str, str]] = [
    {"prompt": "a", "completion": "one"},
    {"prompt": "b", "completion": "two, “quoted”\nand more"},
    {"prompt": "c", "completion": "  "},
    {"prompt": "d", "completion": "four"},
]
WANTED = [("a", "one"), ("b", "two, “quoted”\nand more"), ("d", "four")]


def read(path: Path, **config: Any) -> list[Example]:
    found = DataConfig(path=str(path), **config)
    return list(examples(rows(path), found))


def texts(path: Path, **config: Any) -> list[tuple[Any, str]]:
    return [(example.prompt, example.completion) for example in read(path, **config)]


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    return path


def write_json(path: Path, records: list[Any]) -> Path:
    path.write_text("\ufeff" + json.dumps({"version": 1, "data": records}), encoding="utf-8")
    return path


def write_csv(path: Path, records: list[Any]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(records)
    return path


def write_parquet(path: Path, records: list[Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(records), path)
    return path


def write_folder(path: Path, records: list[Any]) -> Path:
    (path / "deep").mkdir(parents=True)
    write_jsonl(path / "1.jsonl", records[:1])
    write_parquet(path / "deep" / "2.parquet", records[1:])
    (path / "README.md").write_text("not data")
    return path


def write_saved(path: Path, records: list[Any]) -> Path:
    datasets.Dataset.from_list(records).save_to_disk(path)
    return path


def write_saved_dict(path: Path, records: list[Any]) -> Path:
    parts = {"test": datasets.Dataset.from_list(records[:1]), "train": datasets.Dataset.from_list(records)}
    datasets.DatasetDict(parts).save_to_disk(path)
    return path


FORMATS = {
    "x.jsonl": write_jsonl,
    "x.json": write_json,
    "x.csv": write_csv,
    "x.tsv": write_csv,
    "x.parquet": write_parquet,
    "folder": write_folder,
    "saved": write_saved,
    "saved-dict": write_saved_dict,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_examples(tmp_path: Path, name: str) -> None:
    assert texts(FORMATS[name](tmp_path / name, RECORDS)) == WANTED


def test_the_key_depends_on_content_alone(tmp_path: Path) -> None:
    more = [{**record, "id": str(n)} for n, record in enumerate(RECORDS)]
    plain, other = write_jsonl(tmp_path / "x.jsonl", RECORDS), write_parquet(tmp_path / "y.parquet", more[::-1])
    assert {example.key for example in read(plain)} == {example.key for example in read(other)}
    assert len({example.key for example in read(plain)}) == len(WANTED)


def test_instruction_with_and_without_input(tmp_path: Path) -> None:
    records = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Sing.", "input": "", "output": "la"},
        {"instruction": "Sit.", "output": "ok"},
    ]
    assert texts(write_jsonl(tmp_path / "x.jsonl", records)) == [
        ((Turn("user", "Add.\n\n1 2"),), "3"),
        ((Turn("user", "Sing."),), "la"),
        ((Turn("user", "Sit."),), "ok"),
    ]


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_each_assistant_turn_is_an_example_of_the_same_key(tmp_path: Path, name: str) -> None:
    turns = [("system", "Be brief."), ("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "ciao")]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    found = read(FORMATS[name](tmp_path / name, [record]))
    as_turns = tuple(Turn(*turn) for turn in turns)
    assert [(e.prompt, e.completion) for e in found] == [(as_turns[:2], "hello"), (as_turns[:4], "ciao")]
    assert found[0].key == found[1].key


def test_plain_text_is_cut_into_paragraphs(tmp_path: Path) -> None:
    long = "word " * 1000
    (tmp_path / "x.txt").write_text(f"One\nparagraph.\n\n\nAnother.\n\n{long}")
    found = texts(tmp_path / "x.txt")
    assert found[:2] == [("", "One\nparagraph."), ("", "Another.")]
    assert " ".join(text for _, text in found[2:]) == long.strip()
    assert all(len(text) <= PARAGRAPH_CHARACTERS for _, text in found)


def test_fields_are_renamed_and_a_shape_can_be_forced(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "x.csv", [{"mr": "name[A]", "ref": "A is.", "text": "other"}])
    assert texts(path, fields={"prompt": "mr", "completion": "ref"}) == [("name[A]", "A is.")]
    assert texts(path, shape="text") == [("", "other")]


FAULTS: list[tuple[str, str, dict[str, Any], str]] = [
    (
        "train.jsonl",
        '{"prompt": "a", "completion": "b"}\n' * 16 + '{"prompt": "a", "completion": 3}',
        {},
        "train.jsonl line 17: field 'completion' must be text, got number",
    ),
    ("x.jsonl", '{"prompt": "a"', {}, "x.jsonl line 1: not JSON"),
    ("x.jsonl", "[1]", {}, "x.jsonl line 1: must be an object with fields, got list"),
    ("x.jsonl", '{"question": "a"}', {}, "x.jsonl line 1: fields ['question'] are none of the known shapes"),
    ("x.jsonl", '{"prompt": "a"}', {"shape": "prompt"}, "x.jsonl line 1: field 'completion' is missing"),
    ("x.jsonl", '{"messages": "hi"}', {}, "x.jsonl line 1: field 'messages' must be a list, got text"),
    (
        "x.jsonl",
        '{"messages": [{"role": "user", "content": ["a"]}]}',
        {},
        "x.jsonl line 1: field 'messages[0].content' must be text, got list",
    ),
    (
        "x.jsonl",
        '{"messages": [{"role": "user", "content": "a"}]}',
        {},
        "x.jsonl line 1: field 'messages' has no assistant turn to learn from",
    ),
    ("x.json", '{"a": 1}', {}, "x.json: must be a list of objects, or an object that holds one"),
    ("x.csv", "prompt,completion\na\n", {"shape": "prompt"}, "x.csv line 2: field 'completion' is missing"),
    ("x.parquet", "PAR1 nonsense", {}, "x.parquet: not Parquet"),
    ("x.arrow", "nonsense", {}, "x.arrow: not an Arrow stream"),
    ("x.pdf", "", {}, "x.pdf: unknown kind of file"),
]


@pytest.mark.parametrize(("name", "content", "config", "message"), FAULTS)
def test_a_fault_names_its_place(tmp_path: Path, name: str, content: str, config: dict[str, Any], message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(BadConfig) as caught:
        read(tmp_path / name, **config)
    assert str(caught.value).startswith(message)


def test_a_parquet_fault_names_its_row(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [{"text": "a"}, {"text": None}])
    with pytest.raises(BadConfig, match=r"x\.parquet row 2: field 'text' must be text, got nothing"):
        read(path)


def test_other_encodings_missing_paths_and_empty_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("schön".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    for path, message in [("x.txt", "not UTF-8"), ("gone", "does not exist"), ("empty", "holds no file of")]:
        with pytest.raises(BadConfig, match=message):
            read(tmp_path / path)
