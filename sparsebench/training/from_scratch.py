"""Language models trained from scratch on a data set's fit split, tokenizer included: where no hub can be reached, and
how the shipped llama-tiny was made. The result is an ordinary transformers folder with `training.json` beside it.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sparsebench import ranks
from sparsebench.config.identity import digest
from sparsebench.measure.quality import perplexity
from sparsebench.records import files, machine
from sparsebench.training.loop import train
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


def trained(model, architecture: transformers.PretrainedConfig, work: Work, data) -> Path:
    """The folder of a model trained by `model.train` on data.fit with work.seed; trained first where it is missing.

    A kill at any moment loses at most the steps since the last checkpoint.
    """
    shape = {
        "architecture": model.architecture,
        "num_layers": model.num_layers,
        "train": vars(model.train),
        "data": data.fit.describe()["fingerprint"],
        "sequence_length": data.fit.sequence_length,
        "seed": work.seed,
    }
    folder = work.output_dir / "models" / f"{model.name}-{digest(shape)[:10]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with ranks.locked(folder.with_suffix(".lock")):
        if ranks.agreed((folder / "training.json").exists()):
            return folder
        log.info("training %s from scratch into %s", model.name, folder)
        tokenizer = byte_bpe((d.text for d in data.fit.documents), architecture.vocab_size)
        architecture.bos_token_id = architecture.eos_token_id = tokenizer.bos_token_id
        data.set_tokenizer(tokenizer)
        torch.manual_seed(work.seed)
        module = transformers.AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
        module.to(work.hardware.torch_device)
        rows = data.fit.sequences()
        checkpoints = folder.with_suffix(".checkpoints")
        history = train(
            module, rows, model.train, folder=checkpoints, seed=work.seed, track=work.log, label=f"train/{model.name}"
        )
        quality = {
            split.name: perplexity(module, split.sequences(), work.batch_size) for split in (data.dev, data.test)
        }
        if not ranks.first():
            ranks.agreed(True)  # the first one has saved
            return folder
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        module.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        facts = {
            **shape,
            "tokens": history.steps * model.train.batch_size * data.fit.sequence_length,
            "tokens_in_fit": rows.numel(),
            "dataset": data.describe(),
            "quality": quality,
            "precision": "bfloat16 weights as saved; quality measured in float32 before rounding",
            "machine": machine.describe(work.hardware.torch_device.type),
            "seconds_of_last_process": history.seconds,
            "history": history.rows,
        }
        files.write_atomic(partial / "training.json", json.dumps(files.plain(facts), indent=1).encode())
        partial.rename(folder)
        shutil.rmtree(checkpoints, ignore_errors=True)
        ranks.agreed(True)
    return folder
