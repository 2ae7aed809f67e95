"""Decode engines: every fused step equals the same arithmetic in torch; what can't be fused says why."""

import ctypes
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from sparsebench import engines
from sparsebench.engines import fused_cpu, fused_cuda
from sparsebench.kernels import _nvrtc, cuda_gather
from sparsebench.kernels.cuda_gather import Tuning
from sparsebench.methods.rsparse.low_rank import factors
from sparsebench.modules.input_sparse import InputSparseLinear, replace
from sparsebench.sites import find_blocks
from tests.helpers import check_against_the_model, emulate, special_model, tiny_model

IDS = torch.randint(0, 320, (1, 24), generator=torch.Generator().manual_seed(5))


def sparse_model(kind="llama", threshold=0.3, dtype=torch.float32, scale=False, rank=0, **changes):
    model = tiny_model(kind, **changes).to(dtype)
    for block in find_blocks(model):
        for i, site in enumerate(block.sites.values()):
            linear = model.get_submodule(site.path)
            weights = torch.rand(linear.weight.shape[1]) + 0.5 if scale else None
            low_rank = tuple(f.to(dtype) for f in factors(linear.weight, rank)) if rank else None
            sparse = InputSparseLinear(
                linear, site.name, threshold * (1 + 0.1 * i), scale=weights, low_rank=low_rank, kernel="masked_dense"
            )
            replace(model, site.path, sparse)
    return model


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("threshold", [-1.0, 0.3, 1e9])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_cpu_step_equals_torch(kind, threshold, scale, threads):
    model = sparse_model(kind, threshold, scale=scale)
    fused = fused_cpu.Decoder(model, IDS[:, :20], 4)
    assert max(fused.parity(IDS[:, 20:21]).values()) < 1e-5
    fused.threads = threads  # also where one would have been faster
    reference = engines.Decoder(model, IDS[:, :20], 4, compiled=False)
    for i in range(20, 24):
        expected, actual = reference.step(IDS[:, i : i + 1]), fused.step(IDS[:, i : i + 1])
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threshold", [-1.0, 0.3, 1e9])
def test_cpu_step_takes_a_low_rank_remainder(threshold, dtype):
    model = sparse_model(threshold=threshold, dtype=dtype, scale=True, rank=3)
    fused = fused_cpu.Decoder(model, IDS[:, :20], 4)
    assert max(fused.parity(IDS[:, 20:21]).values()) < 1e-5
    if dtype == torch.float32:
        expected = engines.Decoder(model, IDS[:, :20], 4, compiled=False).step(IDS[:, 20:21])
        torch.testing.assert_close(fused.step(IDS[:, 20:21]), expected, rtol=1e-3, atol=1e-3)
    for site in (s for b in find_blocks(model) for s in b.sites.values()):
        model.get_submodule(site.path).low_rank = None
    assert (max(fused.parity(IDS[:, 20:21]).values()) > 1e-3) == (threshold > 0)  # the step has it still


def test_cpu_step_in_bfloat16():
    model = sparse_model(dtype=torch.bfloat16, threshold=-1.0)
    fused = fused_cpu.Decoder(model, IDS[:, :20], 4)
    assert max(fused.parity(IDS[:, 20:21]).values()) < 1e-5  # the same bf16 cache and weights, sums in fp32
    expected = engines.Decoder(model, IDS[:, :20], 4, compiled=False).step(IDS[:, 20:21]).float()
    assert float((fused.step(IDS[:, 20:21]) - expected).norm() / expected.norm()) < 2e-2


def test_cpu_keep_all_is_dense_and_rewinds():
    dense, model = tiny_model(), sparse_model(threshold=0.5)
    fused = fused_cpu.Decoder(model, IDS[:, :20], 4, keep_all=True)
    fused.cache, _ = engines.prefilled(dense, IDS[:, :20], 4)  # the prompt densely, too
    fused.fill_all()
    expected = engines.Decoder(dense, IDS[:, :20], 4, compiled=False).step(IDS[:, 20:21])
    for _ in range(2):
        fused.rewind()
        torch.testing.assert_close(fused.step(IDS[:, 20:21]), expected, rtol=1e-4, atol=1e-4)


REFUSED = {
    "gpt2": ("gpt2", {}, "qkv"),
    "gelu": ("llama", {"hidden_act": "gelu"}, "SiLU"),
    "window": ("mistral", {"sliding_window": 8}, "sliding window"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_fused_says_why(name):
    kind, changes, reason = REFUSED[name]
    model = tiny_model(kind, **changes)
    assert reason in fused_cpu.unsupported(model)
    hardware = SimpleNamespace(engine="auto", skips=True, torch_device=torch.device("cpu"))
    assert engines.choose(model, hardware) == "eager"
    with pytest.raises(ValueError, match=f"engine=fused: .*{reason}"):
        engines.choose(model, SimpleNamespace(**{**vars(hardware), "engine": "fused"}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["rotated", "rotated by thresholds", "cats", "cats and rotated"])
def test_cpu_step_rotates_and_chooses_neurons(kind, dtype, threads):
    """RotatedNorm (LaRoSA, WINA) and GateSparseFFN (CATS) against torch, then against the model over four cached steps."""
    model = special_model(kind, dtype)
    assert fused_cpu.unsupported(model) is None
    fused = fused_cpu.Decoder(model, IDS[:, :20], 4)
    assert fused.parity(IDS[:, 20:21])["logits"] < 1e-5
    fused.threads = threads
    assert fused.parity(IDS[:, 20:21])["logits"] < 1e-5
    if dtype == torch.float32:
        check_against_the_model(model, fused, IDS, range(20, 24), 1e-3)
    dense = fused_cpu.Decoder(model, IDS[:, :20], 4, keep_all=True)
    assert dense.parity(IDS[:, 20:21])["logits"] < 1e-5
    changed = float((dense.step(IDS[:, 20:21]) - fused_cpu.Decoder(model, IDS[:, :20], 4).step(IDS[:, 20:21])).norm())
    assert changed > 1e-3, "something is left out"


def test_cpu_step_reads_only_the_neurons_that_the_gate_chooses():
    """NaN in the weights of up and down of all others."""
    model = special_model("cats", layers=1)
    (block,), ffn = find_blocks(model), engines.gate_sparse_of(model, find_blocks(model)[0])
    inputs = []
    hook = ffn.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    reference = engines.Decoder(model, IDS[:, :20], 4, compiled=False)
    expected = reference.step(IDS[:, 20:21]).clone()
    hook.remove()
    fused = fused_cpu.Decoder(model, IDS[:, :20], 4)
    dropped = ~ffn.keep(ffn.activation(ffn.gate(inputs[-1]))).flatten()
    assert 0 < int(dropped.sum()) < len(dropped) and block.index == 0
    ffn.up.weight.data[dropped] = math.nan
    ffn.down.data[:, dropped] = math.nan
    torch.testing.assert_close(fused.step(IDS[:, 20:21]), expected, rtol=1e-4, atol=1e-4)


def test_masked_dense_is_never_fused():
    hardware = SimpleNamespace(engine="auto", skips=False, torch_device=torch.device("cpu"))
    assert engines.choose(sparse_model(), hardware) == "eager"


def test_maps_left_dense_are_stored_for_the_step():
    model = tiny_model()
    before = {n: p.clone() for n, p in model.named_parameters()}
    engines.channel_major(model)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert fused_cpu.Decoder(model, IDS[:, :20], 2).parity(IDS[:, 20:21])["logits"] < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# The CUDA kernels, built for the CPU


SMALL = {kind: Tuning(2, 4, 1, 2.0) for kind in fused_cuda.DEFAULTS}


STEPS = [
    *itertools.product(("llama", "qwen2"), (-1.0, 0.4, 1e9), (0,), (torch.float16, torch.bfloat16)),
    ("llama", -1.0, 5, torch.bfloat16), ("llama", 0.4, 5, torch.float16), ("qwen2", 1e9, 11, torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize("kind, threshold, rank, dtype", STEPS)
def test_cuda_step_on_the_cpu(emulated, kind, threshold, rank, dtype):
    """Two layers of different ranks, one map without a remainder; dense there is none."""
    sizes = {"layers": 2 if rank else 1, "hidden_size": 64, "intermediate_size": 136}
    model = sparse_model(kind, threshold, dtype, scale=True, rank=rank, **sizes)
    if rank:
        model.model.layers[0].self_attn.k_proj.low_rank = None
        wider = model.model.layers[1].mlp.up_proj
        wider.low_rank = tuple(torch.cat([f, f], axis) for f, axis in zip(wider.low_rank, (1, 0), strict=True))
    cache, _ = engines.prefilled(model, IDS[:, :20], 4)
    step = fused_cuda.Step(model, cache, processors=4, tunings=SMALL)
    rests = [launch.label for launch in step.launches if launch.label.endswith("remainder")]
    assert len(rests) == (8 if rank else 0)
    follow(model, cache, step, emulated)


@pytest.mark.parametrize("kind, dtype", [("llama", torch.bfloat16), ("qwen2", torch.float16)])
def test_the_dense_cuda_step_knows_no_thresholds(emulated, kind, dtype):
    """Kernels of their own: thresholds above every value and remainders change nothing."""
    model = sparse_model(kind, 1e9, dtype, scale=True, rank=5, layers=1, hidden_size=64, intermediate_size=136)
    cache, _ = engines.prefilled(model, IDS[:, :20], 4)
    step = fused_cuda.Step(model, cache, processors=4, tunings=SMALL, keep_all=True)
    assert step.defines(SMALL["qkv"])["DENSE"] and not any("remainder" in launch.label for launch in step.launches)
    follow(model, cache, step, emulated)


def test_a_cuda_step_in_parts_is_the_whole_step(emulated):
    """As on two devices: each part runs its blocks on the residual stream that the one before it left."""
    model = sparse_model(threshold=0.4, dtype=torch.float16, layers=3, hidden_size=64, intermediate_size=136)
    cache, _ = engines.prefilled(model, IDS[:, :20], 4)
    blocks, logits = find_blocks(model), []
    for cut in ([blocks], [blocks[:2], blocks[2:]], [[block] for block in blocks]):
        parts = [fused_cuda.Step(model, cache, processors=4, tunings=SMALL, blocks=each) for each in cut]
        names = [launch.name for part in parts for launch in part.launches]
        assert names.count("embed") == names.count("rows") == 1 and names.count("attend") == 3
        parts[0].token.copy_(IDS[0, 20:21])
        for before, part in zip([None, *parts], parts, strict=False):
            if before is not None:
                part.residual.copy_(before.residual)
            part.position.fill_(20)
            library = emulated(**part.defines(SMALL["qkv"]))
            assert max(part.check(emulate(library), lambda: None).values()) < 1e-5
        logits.append(parts[-1].logits)
        assert int(parts[-1].position) == 21
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[2], logits[0], rtol=1e-4, atol=1e-4)


def follow(model, cache, step, emulated):
    """Two tokens of a CUDA step on the CPU beside the same in torch."""
    dtype = step.dtype
    library = emulated(**step.defines(SMALL["qkv"]))
    reference = fused_cpu.reference_step
    holder = SimpleNamespace(module=model, position=20, cache=cache, blocks=find_blocks(model))
    holder.fixed = [None] * 3 + [step.keep_all] + [None] * 3 + [t.numpy() for t in (step.cosine, step.sine)]
    for i in (20, 21):  # twice: buffers must be left as they were found
        holder.position = i
        expected = reference(holder, int(IDS[0, i]))
        step.token.fill_(int(IDS[0, i]))
        step.position.fill_(i)
        errors = step.check(emulate(library), lambda: None)
        assert max(errors.values()) < 1e-5, errors
        assert float((step.logits - expected).norm() / expected.norm()) < (5e-3 if dtype == torch.float16 else 3e-2)
        assert int(step.token) == int(step.logits.argmax()) and int(step.position) == i + 1


def test_cuda_neuron_sparse_ffn_on_the_cpu(emulated):
    """The two launches of cuda_gather.cuda_ffn, on buffers that held garbage."""
    generator = torch.Generator().manual_seed(0)
    d, f = 72, 136
    x, up, down = (torch.randn(*shape, generator=generator).half() for shape in ((d,), (f, d), (f, d)))
    activation = torch.relu(torch.randn(f, generator=generator)).half()
    scores, sums, y = torch.full((f,), math.nan), torch.zeros(d), torch.full((d,), math.nan).half()
    arrived, zero = torch.zeros(1, dtype=torch.int32), torch.zeros(())
    tuning = Tuning(2, 4, 1, 2.0)
    library = emulated(WARPS=2, LOADS=4, WIDE=1, HEAD_DIM=64, GROUP=1, SPLITS=1)
    rows, gather = cuda_gather.Rows(), cuda_gather.Gather()
    rows.weight, rows.half, rows.gate = up.data_ptr(), x.data_ptr(), activation.data_ptr()
    rows.out, rows.m, rows.n = scores.data_ptr(), f, d
    library.run_rows(3, 1, cuda_gather.rows_bytes(d, tuning), ctypes.byref(rows))
    assert torch.equal(scores == 0, activation == 0)
    gather.set_part(0, down, activation, sums, zero)
    gather.second, gather.result, gather.arrived = scores.data_ptr(), y.data_ptr(), arrived.data_ptr()
    library.run_gather_neuron(1, 3, cuda_gather.gather_bytes(tuning), ctypes.byref(gather))
    expected = (activation.float() * (up.float() @ x.float())) @ down.float()
    assert float((y.float() - expected).norm() / expected.norm()) < 2e-3
    assert not sums.any() and not arrived.any()


def test_cuda_kernels_compile_without_a_gpu():
    source = _nvrtc.source_of(fused_cuda.SOURCE)
    defines = {"WARPS": 8, "LOADS": 4, "WIDE": 1, "HEAD_DIM": 128, "GROUP": 4, "SPLITS": 16}
    for architecture in ("sm_80", "sm_90"):
        assert len(_nvrtc.compile_cubin(source, architecture, defines)) > 10_000
        assert len(_nvrtc.compile_cubin(source, architecture, {**defines, "BF16": 1, "DENSE": 1})) > 10_000
    with pytest.raises(RuntimeError, match="NVRTC: .*error"):
        _nvrtc.compile_cubin("__global__ void broken( {", "sm_90", {})


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU
