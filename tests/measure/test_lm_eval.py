"""lm-eval on the live dense and sparse model, with a local task; and what is said where the extra is missing."""

import importlib.util
import json
import math

import pytest
import torch

from sparsebench import config
from sparsebench.config.compose import compose_all
from sparsebench.config.settings import Harness
from sparsebench.measure import lm_eval
from sparsebench.modules.input_sparse import swap
from sparsebench.sites import sites
from tests.helpers import record_of, tiny_model, tiny_tokenizer

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install sparsebench[lm-eval]"
)
TASK = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
ROWS = [
    {"question": f"Paragraph {i}. word{i}" + " and more" * (i % 5), "choices": [" of", " word", " zz"], "answer": i % 3}
    for i in range(12)
]


@pytest.fixture
def task_folder(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "words.yaml").write_text(TASK.format(file=folder / "rows.jsonl"))
    return folder


def settings(**changes):
    return Harness(**{"tasks": ["words"], "task_limit": None, "task_path": None, **changes})


def by_hand(model, tokenizer) -> float:
    """Accuracy of picking the continuation with the largest summed log-probability."""
    right = 0
    for row in ROWS:
        scores = []
        for choice in row["choices"]:
            start = tokenizer(row["question"], add_special_tokens=False)["input_ids"]
            whole = tokenizer(row["question"] + choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logs = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(logs[i - 1, whole[i]]) for i in range(len(start), len(whole))))
        right += scores.index(max(scores)) == row["answer"]
    return right / len(ROWS)


@needs_lm_eval
def test_score_is_what_a_loop_by_hand_gives(task_folder):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    actual = lm_eval.score(model, tokenizer, settings(task_path=str(task_folder)), 4)
    assert actual["words/acc"]["value"] == pytest.approx(by_hand(model, tokenizer))
    assert actual["words/acc"]["higher_is_better"] and actual["words/acc"]["stderr"] > 0
    with pytest.raises(ValueError, match="lm-eval knows no task nothing_like_it"):
        lm_eval.score(model, tokenizer, settings(tasks=["nothing_like_it"]), 4)


@needs_lm_eval
def test_the_batch_changes_no_answer(task_folder):
    """With half of each question sparse, padding would move the boundary and with it the answers."""
    values = []
    for batch in (1, 8, 32):
        model = tiny_model()
        for site in sites(model):
            swap(model, site, 0.8, prompt="half")
        values.append(lm_eval.score(model, tiny_tokenizer(), settings(task_path=str(task_folder)), batch)["words/acc"])
    assert values[0]["rows"] == values[1]["rows"] == values[2]["rows"] and len(values[0]["rows"]) == len(ROWS)


def test_paired_error_by_hand():
    dense, sparse = {0: 1.0, 1: 1.0, 2: 0.0, 3: 1.0}, {3: 1.0, 2: 1.0, 1: 0.0, 0: 1.0}  # differences 0, -1, 1, 0
    assert lm_eval.paired(dense, sparse) == pytest.approx((2 / 3) ** 0.5 / 2)
    assert lm_eval.paired(dense, None) is None


@needs_lm_eval
def test_a_run_scores_dense_and_sparse(forked, model_folder, text_file, task_folder, tmp_path):
    process = forked(
        "model=hf", f"model.path={model_folder('llama')}", "dataset=text", f"dataset.path={text_file}",
        "dataset.sequence_length=32", "method.calibration_tokens=512", "eval.text.test_sequences=8", "measure.latency=false",
        "wandb.mode=disabled", "hardware=cpu", "hardware.threads=1", "method.sparsity=0.8", "eval.lm_eval.tasks=[words]",
        f"eval.lm_eval.task_path={task_folder}",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    record = record_of(process, tmp_path)["quality"]
    assert next(iter(record)) == "perplexity"
    accuracy = record["words/acc"]
    assert 0 <= accuracy["sparse"] <= 1 and math.isfinite(accuracy["dense_stderr"])
    assert accuracy["difference_stderr"] is not None and record["perplexity"]["little_text"]
    assert accuracy["protocol"]["prompt_policy"] == "p99" and "lm-eval" in accuracy["protocol"]["harness"]


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(config.ConfigError) as error:
        config.build_settings(compose_all(["eval.lm_eval.tasks=[hellaswag]"])[0])
    assert error.value.problems == ["eval.lm_eval.tasks=hellaswag needs lm-eval: pip install 'sparsebench[lm-eval]'"]


def test_a_wrong_folder_is_named(tmp_path):
    with pytest.raises(config.ConfigError, match="eval.lm_eval.task_path must be an existing file or folder"):
        config.build_settings(compose_all([f"eval.lm_eval.task_path={tmp_path}/no"])[0])
