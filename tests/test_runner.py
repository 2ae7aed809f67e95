"""One run from top to bottom: what stops it before anything slow."""

import pytest

from sparsebench import config, runner
from sparsebench.config.compose import compose_all
from sparsebench.data.text import Text
from sparsebench.records.record import Record


def test_mixed_splits_stop_a_run_before_the_model_is_loaded(tmp_path, text_file, monkeypatch):
    given = [
        "dataset=text",
        f"dataset.path={text_file}",
        "hardware=cpu",
        "hardware.threads=1",
        f"output_dir={tmp_path}",
    ]
    configuration, load = compose_all(given)[0], Text.load

    def mixed(self, seed):
        data = load(self, seed)
        data.test.documents.append(data.fit.documents[0])
        return data

    def loaded(self, work, data):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Text, "load", mixed)
    monkeypatch.setattr(type(config.build_settings(configuration).model), "load", loaded)
    with pytest.raises(ValueError, match="of test has the same text as one of fit"):
        runner.run(configuration, Record("", "", configuration), tmp_path, lambda row: None)
