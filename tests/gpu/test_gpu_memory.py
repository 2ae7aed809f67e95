"""Memory of a run on a GPU, and one model over two of them."""

import pytest
import torch

import sparsebench
from sparsebench import engines
from sparsebench.engines import fused_cuda
from sparsebench.models import devices
from sparsebench.modules import storage
from tests.helpers import sparse_copy, tiny_model

SMALL = [
    "model=llama2-7b", "model.weights=random", "model.num_layers=8", "hardware=cuda", "hardware.dtype=float16",
    "dataset=pystdlib", "dataset.sequence_length=256", "eval.text.test_sequences=4", "eval.text.batch_size=1",
    "method.calibration_tokens=1024", "measure.samples=30", "wandb.mode=disabled",
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["teal", "topp", "cats", "nm"])
def test_a_run_takes_the_memory_of_one_model(method, tmp_path):
    """Loading, evaluating, calibrating and timing dense beside sparse: at most 1.15 of the weights with the cache."""
    record = sparsebench.run([*SMALL, f"method={method}", f"output_dir={tmp_path}"])
    memory = record["memory"]
    assert memory["peak_of"] == "device" and memory["second_copy"] is None
    phases = {phase["name"]: phase["peak_bytes"] / memory["dense_weight_bytes"] for phase in record["phases"]}
    assert memory["peak_ratio"] <= 1.15, phases
    assert record["latency"]["decode"]["dense"]["median_ms"] > 0


def llama():
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 4}
    return tiny_model(layers=4, **sizes).half()


two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.gpu
@two
@pytest.mark.parametrize("threshold", [-1.0, 0.5])
def test_a_model_over_two_devices_is_the_model_of_one(threshold):
    """Prompt, eager steps and fused steps, dense and sparse; the second half of the blocks lies on the second device."""
    ids, alone = torch.randint(0, 320, (1, 40), device="cuda"), llama().cuda()
    placed = devices.moved_to(llama(), [torch.device("cuda", i) for i in range(2)])
    assert [device.index for device in devices.devices_of(placed)] == [0, 1]
    kernel = {"kernel": "cuda_gather"}
    one, two = (sparse_copy(threshold, model=storage.sharing_copy(m), **kernel) for m in (alone, placed))
    with torch.no_grad():
        logits = [m(input_ids=ids, use_cache=False).logits for m in (one, two)]
    assert logits[1].device == ids.device and relative(logits[1], logits[0]) < 1e-3
    expected = engines.Decoder(one, ids[:, :36], 4, compiled=False)
    eager, fused = engines.Decoder(two, ids[:, :36], 4, compiled=False), fused_cuda.Decoder(two, ids[:, :36], 4)
    assert len(fused.parts) == 2 and max(fused.parity(ids[:, 36:37]).values()) < 1e-4
    for _ in range(2):
        for decoder in (expected, eager, fused):
            decoder.rewind()
        for i in range(36, 40):
            wanted = expected.step(ids[:, i : i + 1]).float()
            for decoder in (eager, fused):
                assert relative(decoder.step(ids[:, i : i + 1]), wanted) < (1e-2 if threshold < 0 else 0.2)
    fused.rewind()
    fused.step(ids[:, 36:37])
    second = fused.step().clone()  # of the token that the last device chose
    fused.rewind()
    first = fused.step(ids[:, 36:37])
    torch.testing.assert_close(fused.step(first.argmax(-1)), second)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.gpu
@two
def test_a_run_over_two_devices_is_timed_dense_and_sparse(tmp_path):
    record = sparsebench.run([*SMALL, "hardware.devices=2", f"output_dir={tmp_path}"])
    decode = record["latency"]["decode"]
    assert set(decode["engines"]) == {"dense/eager", "dense/fused", "sparse/fused"}, decode["refused"]
    assert record["model"]["devices"] == {"cuda:0": 4, "cuda:1": 4} and decode["speedup"] > 1
    assert record["memory"]["peak_ratio"] <= 1.15
