"""An engine is used only where its own logits are the model's, whatever the names in the model say."""

from types import SimpleNamespace

import pytest
import torch

from sparsebench import engines
from sparsebench.engines import check, fused_cpu
from sparsebench.modules.input_sparse import InputSparseLinear, replace
from sparsebench.sites import find_blocks
from tests.families import family
from tests.helpers import tiny_model

IDS = torch.randint(0, 320, (1, 28), generator=torch.Generator().manual_seed(5))
CPU = SimpleNamespace(engine="auto", skips=True, torch_device=torch.device("cpu"))


def thresholded(model, threshold=0.3, kernel="cpu_numba"):
    for block in find_blocks(model):
        for site in block.sites.values():
            linear = model.get_submodule(site.path)
            replace(model, site.path, InputSparseLinear(linear, site.name, threshold, kernel=kernel))
    return model


def verified(model, engine="fused", hardware=CPU, **options):
    return engines.verified(model, IDS[:, :20], 4, hardware, engine, IDS[0, 20:24], **options)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "seed_oss"])
def test_a_step_that_is_the_model_is_used(kind):
    decoder, errors, refused = verified(thresholded(family(kind)))
    assert decoder.engine == "fused" and refused is None
    assert set(errors) == {"cache", "dense", "sparse", "sparse_by_rounding", "kernels"} and max(errors.values()) < 1e-4


# built from Llama's module names, but: no rotary in some layers, scalar multipliers, other rotary, norms elsewhere
LOOKALIKES = {
    "smollm3": {"num_hidden_layers": 4}, "granite": {}, "helium": {}, "hunyuan_v1_dense": {}, "ernie4_5": {}, "cohere": {},
    "olmo2": {}, "stablelm": {}, "diffllama": {}, "gemma": {},
}  # fmt: skip


@pytest.mark.parametrize("kind", LOOKALIKES)
def test_a_lookalike_runs_eagerly_and_says_why(kind):
    decoder, errors, refused = verified(thresholded(family(kind, **LOOKALIKES[kind])))
    assert decoder.engine == "eager" and refused.startswith("fused: ")
    assert errors["dense"] < 1e-4 and errors["sparse"] < 1e-4


def test_a_refused_step_leaves_the_dense_model_as_it_was():
    model = family("granite")
    before = dict(model.named_modules())
    decoder, errors, refused = verified(model)
    assert decoder.engine == "eager" and "differ from the model's with nothing dropped" in refused
    assert dict(model.named_modules()) == before and "sparse" not in errors


def test_fused_by_order_is_an_error_where_it_is_not_the_model():
    with pytest.raises(ValueError, match=r"hardware.engine=fused: its logits differ"):
        verified(thresholded(family("granite")), hardware=SimpleNamespace(**{**vars(CPU), "engine": "fused"}))


def test_keep_all_is_compared_with_the_model_that_drops_nothing():
    decoder, errors, refused = verified(thresholded(tiny_model(), 0.5), keep_all=True)
    assert refused is None and errors["dense"] < 1e-4 and "sparse" not in errors
    dense = check.stepped(decoder, IDS[0, 20:24])
    sparse = check.stepped(verified(thresholded(tiny_model(), 0.5))[0], IDS[0, 20:24])
    assert check.distance(sparse, dense) > 1e-2


def test_a_step_with_other_thresholds_is_refused(monkeypatch):
    """The dense comparison can't see it: with nothing dropped the step is right."""
    fill = fused_cpu.Decoder.fill

    def wrong(self, block, row):
        fill(self, block, row)
        for i in range(len(fused_cpu.MAPS)):
            linear = self.module.get_submodule(block.sites[fused_cpu.MAPS[i]].path)
            scale = torch.full((linear.weight.shape[1],), 0.3)
            self.held.append(scale)
            row[fused_cpu.table.SCALE + i] = scale.data_ptr()

    monkeypatch.setattr(fused_cpu.Decoder, "fill", wrong)
    monkeypatch.setattr(fused_cpu.Decoder, "parity", lambda self, token: {})
    decoder, _, refused = verified(thresholded(tiny_model(), 0.3))
    assert decoder.engine == "eager" and "at its thresholds" in refused


def test_a_wrong_kernel_stops_the_run(monkeypatch):
    from sparsebench import kernels

    backend = kernels.load("cpu_numba")
    right = backend.input_sparse_linear
    monkeypatch.setattr(backend, "input_sparse_linear", lambda *a, **k: right(*a, **k) * 1.01)
    with pytest.raises(ArithmeticError, match="differs from masked-dense at"):
        verified(thresholded(tiny_model()), engine="eager")


def test_a_cache_that_is_not_the_model_is_no_decode(monkeypatch):
    """A prompt one token short: the cached steps are not those of the whole forward pass."""
    step = engines.Decoder.step
    monkeypatch.setattr(engines.Decoder, "step", lambda self, token: step(self, (token + 1) % 320))
    with pytest.raises(ArithmeticError, match="decode with a cache differs from the whole forward pass"):
        verified(tiny_model(), engine="eager")


def test_rewinding_restores_a_sliding_window_that_was_full():
    model = tiny_model("mistral", sliding_window=8)
    decoder = engines.Decoder(model, IDS[:, :20], 4, compiled=False)
    first = check.stepped(decoder, IDS[0, 20:24])
    assert torch.equal(check.stepped(decoder, IDS[0, 20:24]), first)
    assert check.cache_error(model, IDS[:, :20], IDS[0, 20:24]) < 1e-4
