"""Files of anybody as text: every format that is invited, wrong types by name, nothing that eats the memory."""

import bz2
import dataclasses
import functools
import gzip
import json
import lzma
import random
import resource
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparsebench.data import documents
from tests.helpers import EVIL_TEXT, EVIL_VALUES, built

ROWS = [{"text": f"row {i} says something of its own", "label": i % 3} for i in range(50)]


def zst(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst}


@functools.cache
def settings_of(name="text"):
    return built("dataset", f"dataset={name}")


def loaded(path, **changes):
    return dataclasses.replace(settings_of(), path=str(path), **changes).load(0)


def splits(data):
    return {s.name: [d.text for d in s.documents] for s in (data.fit, data.dev, data.test)}


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("name", ["rows.jsonl", "c4-train.00000-of-01024.json", "array.json", "rows.csv", "plain.txt"])
def test_every_format_and_packing(tmp_path, name, packing):
    """Before: `.json` arrays and packed files (C4's own form) were refused, or read as binary."""
    content = "\n".join(map(json.dumps, ROWS))
    if name.startswith("array"):
        content = json.dumps(ROWS, indent=1)
    if name.endswith("csv"):
        content = "text,label\n" + "\n".join(f"{r['text']},{r['label']}" for r in ROWS)
    file = tmp_path / (name + packing)
    file.write_bytes(PACK[packing](content.encode()))
    data = splits(loaded(file))
    if name == "plain.txt":
        assert sum(map(len, data.values())) > 20
    else:
        assert [len(part) for part in data.values()] == [40, 5, 5] and ROWS[49]["text"] in data["test"]


@pytest.mark.parametrize(
    ("value", "held"),
    [(3, "a number"), (True, "true or false"), ([1], "a list"), ({"a": 1}, "an object"), (0.5, "a number")],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_what_is_no_text_is_not_scored_as_its_str(tmp_path, name, value, held):
    rows = [{"text": value, "other": "x"} for _ in range(20)]
    file = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text(json.dumps(rows) if name == "rows.json" else "\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=f"dataset.text_field=text must name a field of text, got {held} in row 0 of"):
        loaded(file)


def test_other_columns_may_hold_anything(tmp_path):
    """Before: one column of mixed types, which nobody asked for, refused the file; so did a line over 1 MB."""
    mixed = [{**row, "extra": [1, "a", None, {"b": []}, [2.5]][i % 5]} for i, row in enumerate(ROWS)]
    mixed[7]["text"] = "long " * 300_000
    file = tmp_path / "rows.jsonl"
    file.write_text("\r\n".join(map(json.dumps, mixed)) + "\n\n")
    assert sum(map(len, splits(loaded(file)).values())) == 50
    file.write_text("\n".join(json.dumps({"text": None} if i % 2 else row) for i, row in enumerate(ROWS)))
    assert sum(map(len, splits(loaded(file)).values())) == 25  # rows without a text are left out
    assert len(splits(loaded(file, max_documents=10))["fit"]) == 8


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "can't be read as jsonl, line 2: Expecting value"),
        ("a.jsonl", b"[" * 200_000, "can't be read as jsonl, as one array: nested without end"),
        ("a.jsonl", b'{"text": "x"}\n3\n', "row 1 is no object"),
        ("a.json", b'{\n"text": "x"\n}\n', "can't be read as json, line 1"),
        ("a.json", b"\xff\xfe{}", "not UTF-8"),
        ("a.json", b"", "must be one of no fields at all"),
        ("a.jsonl", b'{"body": "x"}\n', "dataset.text_field must be one of body, got 'text'"),
        ("a.csv", b"body\n1\n", "dataset.text_field must be one of body, got 'text'"),
        ("a.csv", b'text\n"' + b"x" * 300_000, "document"),
        ("a.parquet", b"PAR1 nothing", "can't be read as parquet"),
        ("a.json.gz", b"no gzip", "can't be unpacked as gz"),
        ("a.json.gz", gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-12], "can't be unpacked as gz"),
        ("a.txt.xz", lzma.compress(b"x" * 999)[:40], "can't be unpacked as xz"),
        ("a.jsonl.zst", zst(b'{"text": "x"}\n' * 999)[:30], "can't be unpacked as zst"),
        ("a.jsonl.zst", b"no zstd", "can't be unpacked as zst"),
        ("a.jsonl.bz2", b"no bz2", "can't be unpacked as bz2"),
        ("a.txt.gz", gzip.compress(b"a\0b" * 9, mtime=0), "binary"),
    ],
)  # fmt: skip
def test_damaged_files_are_one_line(tmp_path, name, content, said):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        loaded(file)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_windows_line_ends_are_line_ends(tmp_path):
    """Before: WikiText with CRLF had "no text for the dev split"."""
    for name, count in (("valid.txt", 20), ("test.txt", 5)):
        articles = [f" \n = Title {name} {i} = \n \n Text number {i} of {name}. \n" for i in range(count)]
        (tmp_path / name).write_bytes("".join(articles).replace("\n", "\r\n").encode())
    data = splits(dataclasses.replace(settings_of("wikitext2"), path=str(tmp_path)).load(0))
    assert [len(part) for part in data.values()] == [18, 2, 5] and "\r" not in "".join(data["test"])


def test_names_of_files_decide_nothing(tmp_path):
    """Before: renaming a file changed what was scored, and in which order."""
    results = []
    for names in (("a.jsonl", "b.jsonl", "c.txt"), ("z.jsonl", "0.jsonl", "m.txt")):
        folder = tmp_path / names[0]
        folder.mkdir()
        for number, name in enumerate(names):
            rows = [{"text": f"{number} {i} text"} for i in range(30)]
            (folder / name).write_text("\n".join(map(json.dumps, rows)))
        (folder / ".DS_Store").write_bytes(b"\0\1\2")
        results.append(splits(loaded(folder)))
    assert results[0] == results[1]
    one = [tmp_path / name for name in ("x.jsonl", "y.jsonl")]
    for file in one:
        file.write_text("\n".join(map(json.dumps, ROWS)))
    assert splits(loaded(one[0])) == splits(loaded(one[1]))


@pytest.mark.parametrize("splitted", [True, False])
def test_a_folder_of_save_to_disk(tmp_path, splitted):
    """Before: "text_field must be one of splits"."""
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list(ROWS)
    held_out = Dataset.from_list([{"text": f"held out {i}", "label": 0} for i in range(10)])
    (DatasetDict({"train": rows, "validation": held_out}) if splitted else rows).save_to_disk(str(tmp_path / "saved"))
    data = splits(loaded(tmp_path / "saved"))
    assert [len(part) for part in data.values()] == ([50, 5, 5] if splitted else [40, 5, 5])
    assert all(text.startswith("held out") == splitted for text in data["test"])
    with pytest.raises(ValueError, match="dataset.text_field must be one of text, label, got 'body'"):
        loaded(tmp_path / "saved", text_field="body")
    with pytest.raises(ValueError, match="must name a field of text, got a number in row 0"):
        loaded(tmp_path / "saved", text_field="label")
    for file in (tmp_path / "saved").rglob("*.arrow"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"can't be read as a folder of datasets.save_to_disk") as error:
        loaded(tmp_path / "saved")
    assert "\n" not in str(error.value)


BOMBS = {
    "line.jsonl": (b'{"text": "' + b"x" * 5000, "a line of more than"),
    "line.jsonl.gz": (gzip.compress(b'{"text": "' + b"x" * 500_000), "a line of more than"),
    "array.json": (b"[" + b"{}," * 5000, "one JSON array of more than"),
    "rows.jsonl.gz": (gzip.compress(b'{"text": ""}\n' * 100_000), "of text: give a part"),
    "plain.txt": (b"word\n" * 50_000, "of text: give a part"),
    "plain.txt.zst": (zst(b"word\n" * 500_000), "of text: give a part"),
    "line.txt.xz": (lzma.compress(b"x" * 500_000), "of text: give a part"),
    "field.csv": (b'text\n"' + b"x" * 5000, "a line of more than"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_unpacks_without_end_is_one_line(tmp_path, monkeypatch, name):
    for key, size in (
        ("MOST_BYTES", 100_000),
        ("LONGEST", 4000),
        ("LARGEST_ARRAY", 9000),
        ("ROW", 64),
        ("BLOCK", 4096),
    ):
        monkeypatch.setattr(documents, key, size)
    content, said = BOMBS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        loaded(tmp_path / name)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one.jsonl.gz", "one.txt.gz", "lines.txt.gz", "rows.jsonl.zst", "array.json.gz"])
def test_real_bombs_stay_within_memory(tmp_path, name):
    """4 GB of text packed, in 6 GB of address space: one line of error."""
    piece = {
        "one": b"x" * (1 << 20),
        "lines": b"a\n\n" * 349_525,
        "rows": b'{"text": "a"}\n' * 74_898,
        "array": b"[]," * 349_525,
    }
    start = {"one.jsonl.gz": b'{"text": "', "array.json.gz": b"["}.get(name, b"")
    body = piece[name.partition(".")[0]]
    opening = gzip.open if name.endswith("gz") else lambda f, _, level: pa.output_stream(str(f), compression="zstd")
    with opening(tmp_path / name, "wb", 1) as file:
        file.write(start)
        for _ in range(4096):
            file.write(body)
    code = f"""
from tests.helpers import built
try:
    built("dataset", "dataset=text", path={str(tmp_path / name)!r}).load(0)
except ValueError as error:
    print(error)
"""
    limit = 6 << 30
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600,
                             preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))  # fmt: skip
    assert process.returncode == 0, process.stderr[-500:]
    assert "of more than" in process.stdout or "holds more than" in process.stdout


def damaged_file(chance: random.Random):
    """(name, bytes) of a data set with foreign values, wrong structure or damaged bytes."""
    rows = [{"text": f"document {i} of some words", "label": i % 2} for i in range(12)]
    for _ in range(chance.randrange(3)):
        chance.choice(rows)[chance.choice(["text", "label", chance.choice(EVIL_TEXT)])] = chance.choice(EVIL_VALUES)
    if chance.random() < 0.1:
        rows[chance.randrange(len(rows))] = chance.choice([None, 3, [], "x"])
    lines = [json.dumps(row) for row in rows]
    forms = {
        "x.jsonl": "\n".join(lines), "x.json": json.dumps(rows), "x.csv": "text,label\n" + "\n".join(lines), "x.txt": "\n\n".join(lines),
    }  # fmt: skip
    name = chance.choice(list(forms))
    content = forms[name].encode()
    if chance.random() < 0.4:
        packing = chance.choice(list(PACK))
        name, content = name + packing, PACK[packing](content)
    for _ in range(chance.randrange(3)):
        at = chance.randrange(len(content))
        content = chance.choice(
            [content[:at], content[:at] + bytes([chance.randrange(256)]) + content[at + 1 :], content * 2]
        )
        content = content or b"x"
    return name, content


@pytest.mark.parametrize("count", [150, pytest.param(3000, marks=pytest.mark.slow)])
def test_damaged_data_sets_end_in_one_line_or_in_text(tmp_path, count):
    chance, read = random.Random(7), 0
    for _ in range(count):
        name, content = damaged_file(chance)
        (tmp_path / name).write_bytes(content)
        try:
            data = loaded(tmp_path / name)
        except ValueError as error:
            assert str(error).startswith("dataset") and "\n" not in str(error), (name, content)
            continue
        data.check_disjoint()
        read += 1
        assert all(isinstance(text, str) and text.strip() for part in splits(data).values() for text in part)
    assert count / 10 < read < count


def test_labelled_rows(tmp_path):
    rows = [{"text": f"text {i} {'a' * (i % 7)}", "label": i % 2} for i in range(60)]
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    settings = built("dataset", "model=bert-tiny", "dataset=labelled-text", "method=lte")
    settings.path = str(tmp_path / "x.jsonl.gz")
    assert not settings.problems(None) and settings.load(0).classes == ["0", "1"]
    rows[5]["label"] = [1]
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    with pytest.raises(ValueError, match="dataset.label_field=label must name a field of text, got a list in row 5 of"):
        settings.load(0)
