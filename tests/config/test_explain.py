"""Every key is explained by a comment of the YAML files, and what it allows is what the checks say."""

from sparsebench.config import explain


def test_every_key_has_a_meaning():
    silent = {e.key for e in explain.entries() if not e.meaning and not e.option.startswith("experiment=")}
    assert not silent, "add a comment behind these keys in conf/"


def test_every_key_says_what_it_allows():
    mine = [e for e in explain.entries() if e.option != "experiment" and not e.option.startswith("experiment=")]
    assert not [e.key for e in map(explain.describe, mine) if "." in e.key and not e.allowed]
    (stop,) = [e for e in mine if e.option == "method=teal" and e.key == "method.greedy.stop"]
    assert explain.describe(stop).allowed == "a number in (0, 1)"


def test_a_training_block_is_part_of_its_method():
    found = {e.key: e for e in explain.entries() if e.option == "method=moefication"}
    assert found["method.train.steps"].default == 150 and found["method.train.clip"].default == 1.0
    assert found["method.router.clip"].default is None
    assert found["method.train.clip"].file == "train/adamw.yaml"
