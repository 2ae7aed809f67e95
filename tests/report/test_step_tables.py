"""Tables of a protocol's steps: a batch that no kernel serves never counts as a gain."""

from sparsebench.report import step_tables
from sparsebench.report.groups import groups
from sparsebench.report.rows import collect
from tests.helpers import laid, made


def pays(tmp_path, *rows):
    content = made()
    content["latency"]["batches"] = [
        {"batch": b, "dense_ms": 2.0, "sparse_ms": ms, "kernel": "k", "simulated": simulated}
        for b, ms, simulated in rows
    ]
    (group,) = groups(collect([laid(tmp_path, content)]).finished)
    table = step_tables.batches(group)
    return table.rows[0][table.head.index("pays")], [row[table.head.index("speed-up")] for row in table.rows]


def test_simulated_batches_never_pay(tmp_path):
    """Faster at 1 and, where masks alone ran, at 4: it pays up to 1."""
    assert pays(tmp_path, (1, 1.0, False), (4, 1.5, True)) == ("up to 1", ["2.00x", "simulated"])


def test_it_pays_up_to_the_first_batch_that_is_slower(tmp_path):
    """A larger one that is faster again is no end of the range."""
    assert pays(tmp_path, (4, 1.5, False), (1, 1.0, False), (2, 2.5, False))[0] == "up to 1"


def test_where_no_batch_is_faster_it_pays_nowhere(tmp_path):
    assert pays(tmp_path, (1, 2.0, False), (2, 3.0, False))[0] == "nowhere"
