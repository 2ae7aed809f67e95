"""Splits that never mix, deterministic windows, inputs that are refused."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparsebench.data.text import Document, chunks
from tests.helpers import TEXT, built, tiny_tokenizer


def dataset(name, **changes):
    return built("dataset", f"dataset={name}", **changes)


def keys(data):
    return {s.name: {d.key for d in s.documents} for s in (data.fit, data.dev, data.test)}


def test_pystdlib_splits_files_by_a_hash_of_their_path(tmp_path):
    for i in range(200):
        file = tmp_path / f"package{i % 7}" / f"module{i}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"def function_{i}():\n    return {i}\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_x.py").write_text("never")
    data = dataset("pystdlib", path=str(tmp_path)).load(0)
    data.check_disjoint()
    record = keys(data)
    assert sum(map(len, record.values())) == 200 and not any("test" in k for part in record.values() for k in part)
    assert len(record["fit"]) > 160 and record["dev"] and record["test"]
    (tmp_path / "package0" / "module0.py").write_text("changed = 1\n")  # the content does not decide
    assert keys(dataset("pystdlib", path=str(tmp_path)).load(0)) == record


def test_equal_documents_are_kept_once(tmp_path):
    for i in range(300):
        (tmp_path / f"m{i}.py").write_text(f"x = {i % 250}\n")
    data = dataset("pystdlib", path=str(tmp_path)).load(0)
    texts = [d.text for s in (data.fit, data.dev, data.test) for d in s.documents]
    assert len(texts) == len(set(texts)) == 250
    assert data.info["repeated_documents_left_out"] == 50


def test_a_document_in_two_splits_is_found(text_file):
    data = dataset("text", path=str(text_file)).load(0)
    data.check_disjoint()
    data.test.documents.append(Document("stray", data.fit.documents[0].text))
    with pytest.raises(ValueError, match="stray of test has the same text as one of fit"):
        data.check_disjoint()


def test_seed_moves_calibration_rows_and_nothing_else(text_file):
    a, b = (dataset("text", path=str(text_file), sequence_length=32).load(seed) for seed in (0, 1))
    for data in (a, b):
        data.set_tokenizer(tiny_tokenizer())
    assert not a.fit.sequences(4).equal(b.fit.sequences(4))
    assert a.test.sequences(4).equal(b.test.sequences(4)) and a.dev.sequences(2).equal(b.dev.sequences(2))


@pytest.mark.parametrize("bos", ["none", "document", "window"])
def test_windows(text_file, bos):
    data = dataset("text", path=str(text_file), sequence_length=24, bos=bos).load(0)
    data.set_tokenizer(tiny_tokenizer())
    few, more = data.fit.sequences(2), data.fit.sequences()
    assert few.shape == (2, 24) and more[:2].equal(few) and len(more) > 50
    starts = tiny_tokenizer().bos_token_id
    if bos == "window":
        assert (more[:, 0] == starts).all() and not (more[:, 1:] == starts).any()
    elif bos == "none":
        assert not (more == starts).any()
    else:
        assert 0 < int((more == starts).sum()) <= len(data.fit.documents)


def test_a_short_split_says_so(text_file):
    data = dataset("text", path=str(text_file), sequence_length=100_000).load(0)
    data.set_tokenizer(tiny_tokenizer())
    with pytest.raises(ValueError, match="fewer than one sequence of dataset.sequence_length=100000"):
        data.test.sequences(1)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_tables(tmp_path, suffix):
    rows = [{"body": f"row {i} says something of its own"} for i in range(50)]
    file = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    data = dataset("text", path=str(file), text_field="body").load(0)
    assert [len(part) for part in keys(data).values()] == [40, 5, 5]
    with pytest.raises(ValueError, match="dataset.text_field must be one of body, got 'text'"):
        dataset("text", path=str(file)).load(0)


def test_wikitext_folder_without_training_text(tmp_path):
    for name, count in (("valid.txt", 20), ("test.txt", 5)):
        articles = [
            f" \n = Title {name} {i} = \n \n Text number {i} of {name}. \n = = Part = = \n more \n"
            for i in range(count)
        ]
        (tmp_path / name).write_text("".join(articles))
    data = dataset("wikitext2", path=str(tmp_path)).load(0)
    assert [len(part) for part in keys(data).values()] == [18, 2, 5]
    assert all(d.text.lstrip().startswith("= Title") for d in data.test.documents)
    (tmp_path / "test.txt").unlink()
    with pytest.raises(ValueError, match="must hold test.txt"):
        dataset("wikitext2", path=str(tmp_path)).load(0)


def test_real_wikitext(shared_data):
    data = dataset("wikitext2", path=str(shared_data / "wikitext-2")).load(0)
    data.check_disjoint()
    assert len(data.test.documents) >= 60
    assert sum(len(d.text) for d in data.test.documents) > 1_200_000


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no text"), (b"  \n ", "holds no text"), (b"a\0b" * 9, "binary"), (b"\xff\xfe\xfa" * 9, "not UTF-8")],
)
def test_files_that_are_no_text(tmp_path, content, message):
    file = tmp_path / "x.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        dataset("text", path=str(file)).load(0)


def test_chunks_join_to_the_text():
    for text in (TEXT, "line\n" * 50, "one line without end"):
        assert "".join(chunks(text)) == text or not text.strip()
    assert len(chunks(TEXT)) >= 25


def test_builtin_data_is_there_on_any_python():
    data = dataset("pystdlib").load(0)
    data.check_disjoint()
    assert len(data.fit.documents) > 300 and len(data.test.documents) > 10
    assert sum(len(d.text) for d in data.fit.documents) > 5_000_000
