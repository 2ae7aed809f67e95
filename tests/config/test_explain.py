"""Every key is explained by a comment of the YAML files, and what it allows is what the checks say."""

from sparsebench.config import explain


def test_every_key_has_a_meaning():
    silent = {e.key for e in explain.entries() if not e.meaning}
    assert not silent, "add a comment behind these keys in conf/"


def test_what_a_key_allows_is_what_its_class_checks():
    (stop,) = [e for e in explain.matching("method.greedy.stop") if e.option == "teal"]
    assert explain.allowed(stop) == "a number in (0, 1)"
    (rows,) = explain.matching("eval.text.test_sequences")
    assert explain.allowed(rows) == "a whole number > 0 or null"


def test_a_training_block_is_part_of_its_method():
    entries = {e.key: e for e in explain.matching("method=moefication")}
    assert entries["method.train.steps"].default == 150 and entries["method.train.clip"].default == 1.0
    assert entries["method.router.clip"].default is None and not entries["method.train.clip"].own


def test_a_key_that_does_not_exist_has_a_nearest_one():
    assert explain.nearest("method.sparsty") == "method.sparsity"
    assert explain.nearest("method=taal") == "method=teal"
    assert explain.nearest("test_sequence") == "eval.text.test_sequences"
