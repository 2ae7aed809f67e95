"""Charts of what batches and chunks still skip."""

from types import SimpleNamespace

from sparsebench.report import unions, vega


def row(**extra):
    return SimpleNamespace(series="teal", label="teal, 0.5", record={"extra": extra})


def values(spec):
    return spec["layer"][0]["data"]["values"] if "data" in spec["layer"][0] else spec["data"]["values"]


def test_unions_are_drawn_by_kind_over_the_batch():
    figures = {"1": {"kinds": {"channels": 0.5, "heads": 0.4}}, "8": {"kinds": {"channels": 0.1, "heads": 0.05}}}
    look = vega.styles(["teal"])
    spec = unions.over_batch([row(union={"by_size": figures}), row()], look)
    assert sorted((c["unit"], c["batch"], c["skipped"]) for c in values(spec)) == [
        ("channels", 1, 0.5), ("channels", 8, 0.1), ("heads", 1, 0.4), ("heads", 8, 0.05),
    ]  # fmt: skip
    assert unions.over_batch([row()], look) is None and b"svg" in vega.as_svg(spec).encode()


def test_chunks_are_drawn_beside_independent_tokens():
    lengths = {"1": {"sparsity": 0.5, "tokens": 0.5}, "4": {"sparsity": 0.1, "tokens": 0.5}}
    spec = unions.over_chunk([row(chunk={"dense": None, "sparse": {"lengths": lengths}})], vega.styles(["teal"]))
    drawn = {(c["what"], c["tokens"]): c["skipped"] for c in values(spec)}
    assert drawn == {
        ("measured", 1): 0.5,
        ("were they independent", 1): 0.5,
        ("measured", 4): 0.1,
        ("were they independent", 4): 0.0625,
    }
