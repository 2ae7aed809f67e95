"""The head of a GGUF file: what the gguf package's own reader reads, and files that are none, cut or in parts."""

import struct

import pytest
from gguf import GGUFReader

from sparsebench.models import gguf
from sparsebench.models.gguf import header
from tests.helpers import tiny_model, write_gguf


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    fields = {"general__name": "Tiny", "llama__numbers": [1.5, 2.5], "llama__flag": True, "llama__below": [-1, 2]}
    return write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", tiny_model(), "llama", "Q8_0", **fields)


def test_it_is_what_the_packages_reader_reads(whole):
    file, reader = header.read(whole), GGUFReader(whole)
    theirs = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert file.fields == theirs
    assert {(t.name, t.tensor_type, tuple(t.shape[::-1].tolist()), t.data_offset) for t in reader.tensors} == {
        (t.name, t.type, t.shape, t.start) for t in file.tensors.values()
    }


def test_it_is_read_once_and_again_when_it_changed(whole, tmp_path):
    copy = tmp_path / "m.gguf"
    copy.write_bytes(whole.read_bytes())
    assert header.read(copy) is header.read(copy)
    copy.write_bytes(whole.read_bytes()[:-64])
    with pytest.raises(ValueError, match="cut short"):
        header.read(copy)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda b: b"PK" + b[2:], "it is no GGUF file: it starts with b'PKUF', not b'GGUF'"),
        (lambda b: b"", "it is no GGUF file: it has fewer bytes than a head"),
        (lambda b: b[:4] + struct.pack("<I", 1) + b[8:], "it is of version 1, known are 2 and 3"),
        (lambda b: b[:4] + struct.pack(">I", 3) + b[8:], "in the other byte order"),
        (lambda b: b[:-40], "it is cut short: "),
        (lambda b: b[: len(b) // 50], "its head is cut short or damaged"),
        (lambda b: b[:24] + b"\xff" * 8 + b[32:], "its head is cut short or damaged"),
    ],
)
def test_a_file_that_is_none_or_cut_is_said_in_one_line(change, line, whole, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(change(whole.read_bytes()))
    said = gguf.problem(str(path), "model.path")
    assert said.startswith("model.path must be a whole GGUF file") and line in said and "\n" not in said


def test_one_of_several_parts_says_how_to_join_them(tmp_path):
    path = write_gguf(tmp_path / "m-00002-of-00003.gguf", tiny_model(), "llama", split__count=3, split__no=1)
    assert "it is part 2 of 3: join them first" in gguf.problem(str(path), "model.path")
