"""Archives: no record is lost, figures stand in columns, foreign and damaged files are refused in one line."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparsebench.config.identity import digest
from sparsebench.records import archive
from tests.helpers import failed, made, made_bench


def written(path, *records):
    archive.write(path, records)
    return pq.read_table(path).to_pylist()


def test_records_come_back_as_they_were(tmp_path):
    records = [made(), made(sparsity=0.25, seed=1), failed(trace="é\nü"), made_bench()]
    archive.write(tmp_path / "a.parquet", records)
    assert {digest(r) for r in archive.read(tmp_path / "a.parquet")} == {digest(r) for r in records}
    floats = made(perplexity=0.1 + 0.2, seconds=1e-17)
    archive.write(tmp_path / "b.parquet", [floats])
    assert archive.read(tmp_path / "b.parquet") == [floats]  # to the last digit


def test_equal_records_are_kept_once_and_runs_of_one_hash_all(tmp_path):
    again = {**made(), "started_at": "2026-02-02T00:00:00+00:00"}
    assert len(written(tmp_path / "a.parquet", made(), made(), again)) == 2


def test_the_order_of_records_does_not_matter(tmp_path):
    records = [made(), made(sparsity=0.25), made_bench()]
    archive.write(tmp_path / "a.parquet", records)
    archive.write(tmp_path / "b.parquet", records[::-1])
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_figures_stand_in_columns(tmp_path):
    run = made(sparsity=0.5, perplexity=12.0, speedup=1.25, seed=3)
    run["env"] |= {
        "argv": ["/usr/bin/x/__main__.py", "-m", "seed=3", "a b=1", "hydra.sweep.dir='x'"],
        "git_commit": "c" * 40,
    }
    (row,) = written(tmp_path / "a.parquet", run)
    assert row["kind"] == "run" and row["command"] == "sparsebench -m seed=3 'a b=1'"
    assert (row["model"], row["method"], row["dataset"], row["seed"]) == ("llama-tiny", "teal", "pystdlib", 3)
    assert (row["commit"], row["machine"], row["status"]) == ("c" * 40, "Test CPU", "finished")
    assert (row["perplexity_dense"], row["perplexity_sparse"], row["accuracy_sparse"]) == (10.0, 12.0, None)
    assert (row["sparsity"], row["macs_dense"], row["macs_sparse"], row["bytes_sparse"]) == (0.5, 100, 50, 200)
    assert (row["decode_dense_ms"], row["decode_sparse_ms"], row["speedup"]) == (1.0, 0.8, 1.25)
    assert (row["kernel"], row["schema_version"], row["config_hash"]) == (
        "cpu_numba",
        run["schema_version"],
        run["config_hash"],
    )


def test_classifiers_have_the_time_of_their_smallest_batch(tmp_path):
    pair = {"dense": {"median_ms": 2.0}, "sparse": {"median_ms": 1.0}, "speedup": 2.0, "kernel": "cpu_numba"}
    run = made(latency={"kernel": None, "forward": {"1": pair, "32": {**pair, "speedup": 9.0}}})
    run["quality"] = {"accuracy": {"dense": 0.9, "sparse": 0.8, "higher_is_better": True}}
    (row,) = written(tmp_path / "a.parquet", run)
    assert (row["forward_dense_ms"], row["forward_sparse_ms"], row["speedup"]) == (2.0, 1.0, 2.0)
    assert (row["accuracy_dense"], row["accuracy_sparse"], row["kernel"]) == (0.9, 0.8, "cpu_numba")


def test_benchmarks_and_failures_are_rows_too(tmp_path):
    bench, broken = written(tmp_path / "a.parquet", made_bench(), failed())
    assert (bench["kind"], bench["model"], bench["method"], bench["commit"][-1]) == ("bench", "llama-tiny", None, "+")
    assert bench["command"] == "sparsebench-bench 'parts=[ffn, step]'" and len(bench["config_hash"]) == 64
    assert (broken["status"], broken["perplexity_sparse"], broken["speedup"]) == ("failed", None, None)


def test_the_device_is_the_one_that_computed(tmp_path):
    env = {"cpu": "Test CPU", "gpu": "NVIDIA H200", "hardware": {"device": "cuda:0"}}
    assert archive.device(env) == "NVIDIA H200"
    assert archive.device({**env, "hardware": {"device": "cpu"}}) == "Test CPU"


def test_what_is_no_archive_is_said_in_one_line(tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"], "kind": ["run"]}), file)
    with pytest.raises(archive.ArchiveError, match=r"a\.parquet is no archive of records: it has no column 'record'$"):
        archive.read(file)
    pq.write_table(pa.table({"record": ["{}", "[1]"], "kind": ["run", "run"]}), file)
    with pytest.raises(archive.ArchiveError, match="row 1 holds no record"):
        archive.read(file)
    pq.write_table(pa.table({"record": [1], "kind": ["run"]}), file)
    with pytest.raises(archive.ArchiveError, match="row 0 holds no record"):
        archive.read(file)


def test_a_flipped_byte_is_noticed(tmp_path):
    file = tmp_path / "a.parquet"
    archive.write(file, [made(seed=s) for s in range(20)])
    content = bytearray(file.read_bytes())
    position = content.rfind(b"\x28\xb5\x2f\xfd")  # the last frame of zstd: the column `record`
    content[position + 200] ^= 1
    file.write_bytes(content)
    with pytest.raises(archive.ArchiveError, match="can't be read as an archive") as refused:
        archive.read(file)
    assert "\n" not in str(refused.value)
