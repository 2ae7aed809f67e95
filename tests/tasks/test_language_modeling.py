"""The task of language models: what is scored is the test split, in the order of its windows."""

import pytest

from sparsebench import config
from sparsebench.config.compose import compose_all
from sparsebench.measure import quality
from sparsebench.tasks.language_modeling import LanguageModeling
from tests.helpers import KINDS


def test_quality_is_of_the_test_split():
    kind = KINDS["language"]
    loaded, data = kind.loaded(), kind.data()
    rows = data.test.sequences(6)
    data.fit = data.dev = None  # touching them would fail
    settings = config.build_settings(compose_all(["method=dense", "hardware=cpu", "eval.text.test_sequences=6"])[0])
    actual = LanguageModeling().assess(loaded, loaded.module, data, settings)
    assert actual.metrics["nll"] == pytest.approx(quality.perplexity(loaded.module, rows, 4)["nll"], rel=1e-6)
    assert actual.metrics["sequences"] == 6
