"""Models trained from scratch on a data set's fit split: where no hub can be reached, and how the shipped llama-tiny was made.

One way for every kind of model: a folder named after all that decides the result, one process that trains while others
wait, checkpoints, `training.json` beside the weights. What differs (rows, loss, quality, files) the model hands in.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from sparsebench import ranks
from sparsebench.config.identity import digest
from sparsebench.records import files
from sparsebench.training.loop import History, next_token_loss, train
from sparsebench.training.work import Work

log = logging.getLogger(__name__)


def byte_bpe(texts, vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (no unknown token) learnt from `texts`; `<s>` starts a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    learner = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, learner)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def trained(
    model,
    shape: dict[str, Any],
    work: Work,
    begin: Callable[[], tuple[nn.Module, Any]],
    judge: Callable[[nn.Module, History], dict[str, Any]],
    save: Callable[[nn.Module, Path], None],
    loss: Callable[[nn.Module, Any], torch.Tensor] = next_token_loss,
) -> Path:
    """The folder of a model trained by `model.train` with work.seed; trained first where it is missing.

    shape: all that decides the result; its digest names the folder. begin: the module with random weights, float32, and
    the rows to train on. judge: facts about the trained module, for `training.json`. save: its files, into a folder.
    One process of several saves; a kill at any moment loses at most the steps since the last checkpoint.
    """
    folder = work.output_dir / "models" / f"{model.name}-{digest(shape)[:10]}"
    lock, checkpoints, partial = (folder.with_name(folder.name + end) for end in (".lock", ".checkpoints", ".partial"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with ranks.locked(lock):
        if ranks.agreed((folder / "training.json").exists()):
            if ranks.first():
                shutil.rmtree(checkpoints, ignore_errors=True)  # of a process killed while it cleared up
            return folder
        log.info("training %s from scratch into %s", model.name, folder)
        module, rows = begin()
        module.to(work.hardware.torch_device)
        history = train(
            module, rows, model.train, folder=checkpoints, seed=work.seed, loss=loss, track=work.log,
            label=f"train/{model.name}",
        )  # fmt: skip
        facts = {**shape, **judge(module, history), "history": history.rows}
        if ranks.first():
            shutil.rmtree(partial, ignore_errors=True)
            save(module, partial)
            files.write_atomic(
                partial / "training.json", json.dumps(files.scrubbed(files.plain(facts)), indent=1).encode()
            )
            shutil.rmtree(folder, ignore_errors=True)  # without `training.json` it is what a crash left
            partial.rename(folder)
            shutil.rmtree(checkpoints, ignore_errors=True)
        ranks.agreed(True)  # the first one has saved
    return folder
