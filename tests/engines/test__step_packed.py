"""Fused decode steps with quantised weights: the CUDA kernels built for the CPU, and the CPU's own step."""

import ctypes
import math
from types import SimpleNamespace

import pytest
import torch

from sparsebench import engines
from sparsebench.engines import fused_cpu, fused_cuda
from sparsebench.kernels import _nvrtc, cuda_gather, cuda_packed, masked_dense
from sparsebench.kernels._packed import quantised
from sparsebench.kernels.cuda_gather import Tuning
from sparsebench.modules.input_sparse import sparse_of
from sparsebench.modules.quant_sparse import QuantLinear
from sparsebench.sites import find_blocks
from tests.helpers import tiny_model
from tests.kernel_checks import asymmetric, error

IDS = torch.randint(0, 320, (1, 24), generator=torch.Generator().manual_seed(5))
SMALL = {kind: Tuning(2, 4, 1, 2.0) for kind in fused_cuda.DEFAULTS}


def quantised_model(bits, threshold=0.3, dtype=torch.float16, kind="llama", axis="input", zeros=False, **changes):
    """A model whose block maps are quantised, in groups of 32 that do not divide its sizes, and sparse."""
    model = tiny_model(kind, **changes).to(dtype)
    for block in find_blocks(model):
        for i, site in enumerate(block.sites.values()):
            linear = model.get_submodule(site.path)
            packed = asymmetric(linear.weight, 32) if zeros else quantised(linear.weight, bits, 32, axis)
            sparse = sparse_of(QuantLinear(packed, linear.bias), site.name, threshold * (1 + 0.1 * i))
            parent, _, name = site.path.rpartition(".")
            setattr(model.get_submodule(parent), name, sparse)
    return model


CUDA_STEPS = [
    (8, 0.4, False, False, torch.float16), (8, 1e9, False, False, torch.bfloat16), (8, -1.0, True, False, torch.float16),
    (4, 0.4, False, False, torch.bfloat16), (4, -1.0, True, True, torch.bfloat16), (4, 0.4, False, True, torch.float16),
]  # fmt: skip


@pytest.mark.parametrize("bits, threshold, keep_all, zeros, dtype", CUDA_STEPS)
def test_cuda_step_with_packed_weights_on_the_cpu(emulated, bits, threshold, keep_all, zeros, dtype):
    """Every launch against masked-dense in fp32 on the dequantised weights, over two tokens on the same buffers."""
    sizes = {"layers": 1, "hidden_size": 64, "intermediate_size": 136}
    model = quantised_model(bits, threshold, dtype, "qwen2" if bits == 4 else "llama", zeros=zeros, **sizes)
    assert fused_cuda.unsupported(model) is None
    cache, _ = engines.prefilled(model, IDS[:, :20], 4)
    step = fused_cuda.Step(model, cache, processors=4, tunings=SMALL, keep_all=keep_all)
    assert {launch.name.partition("_packed")[0] for launch in step.launches if "packed" in launch.name} == {"gather"}
    library = emulated(**step.defines(SMALL["qkv"]))
    holder = SimpleNamespace(module=model, position=20, cache=cache, blocks=find_blocks(model))
    holder.fixed = [None] * 3 + [keep_all] + [None] * 3 + [t.numpy() for t in (step.cosine, step.sine)]

    def run(launch):
        arguments = launch.arguments if launch.name == "embed" else [ctypes.byref(launch.arguments[0])]
        getattr(library, f"run_{launch.name}")(*launch.grid, launch.shared_bytes, *arguments)

    for i in (20, 21):
        holder.position = i
        expected = fused_cpu.reference_step(holder, int(IDS[0, i]))
        step.token.fill_(int(IDS[0, i]))
        step.position.fill_(i)
        errors = step.check(run, lambda: None)
        assert max(errors.values()) < 1e-5, errors
        assert float((step.logits - expected).norm() / expected.norm()) < (5e-3 if dtype == torch.float16 else 3e-2)
        assert not library.count_overruns()


SHAPES = [(8, 1), (72, 45), (640, 130), (1096, 70)]


@pytest.mark.parametrize("bits, zeros", [(8, False), (4, False), (4, True)])
def test_cuda_product_with_packed_weights_on_the_cpu(emulated, bits, zeros):
    """cuda_packed.packed_linear's launch: poisoned outputs, used twice, odd sizes, all, some, one and no channels kept."""
    tuning = Tuning(2, 4, 1, 2.0)
    library = emulated(WARPS=2, LOADS=4, WIDE=1, HEAD_DIM=64, GROUP=1, SPLITS=1, BITS=bits)
    for seed, (m, n) in enumerate(SHAPES):
        torch.manual_seed(seed)
        weight, x, bias = torch.randn(m, n).half(), torch.randn(n).half(), torch.randn(m).half()
        packed = asymmetric(weight, 32) if zeros else quantised(weight, bits, 32)
        largest = x.abs().float().sort().values
        for threshold in (-1.0, 0.7, float(largest[-2]) if n > 1 else -1.0, 1e9):
            reference = masked_dense.input_sparse_linear(
                x.float(), packed.dequantised(torch.float32), bias.float(), threshold=threshold
            )
            sums, arrived = torch.zeros(m), torch.zeros(-(-m // 256), dtype=torch.int32)
            limit = torch.tensor(threshold)
            for _ in range(2):
                y = torch.full((m,), math.nan).half()
                arguments = cuda_packed.PackedGather()
                arguments.set_part(0, packed, x, sums, limit)
                arguments.of.result, arguments.of.arrived = y.data_ptr(), arrived.data_ptr()
                arguments.of.bias = bias.data_ptr()
                grid = cuda_packed.grid([m], packed, tuning, 4)
                library.run_gather_packed_half(*grid, cuda_packed.shared_bytes(tuning, bits), ctypes.byref(arguments))
                assert error(y, reference) < 1e-3, (m, n, threshold)
                assert threshold < 1e9 or torch.equal(y, bias)
                assert not sums.any() and not arrived.any() and not library.count_overruns()


def test_packed_cuda_kernels_compile_without_a_gpu():
    source = _nvrtc.source_of(cuda_gather.SOURCE)
    assert "gather_packed_norm" in source
    defines = {"WARPS": 4, "LOADS": 8, "WIDE": 1, "HEAD_DIM": 128, "GROUP": 4, "SPLITS": 16, "BITS": 4}
    assert len(_nvrtc.compile_cubin(source, "sm_90", defines)) > 10_000
