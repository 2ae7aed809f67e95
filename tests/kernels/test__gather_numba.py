"""The CPU kernels on machines that are not this one: AVX2 without AVX-512 is run, ARM64 is compiled to assembly. Not timed."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from llvmlite import binding as llvm
from numba import njit, types

from sparsebench.engines._select_numba import compact_largest
from sparsebench.kernels import _gather_numba

AVX2 = """
import re
import torch
from sparsebench import engines
from sparsebench.engines import fused_cpu
from sparsebench.kernels import _gather_numba, cpu_numba, masked_dense
from tests.helpers import special_model
from tests.kernel_checks import KERNEL_SHAPES, LIMIT, error, inputs
cpu_numba.prepare(1)
for m, n, rows in KERNEL_SHAPES[:12]:
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias, scale = inputs(m, n, rows, dtype)
        actual = cpu_numba.input_sparse_linear(x, weight, bias, threshold=0.5, scale=scale)
        expected = masked_dense.input_sparse_linear(x.float(), weight.float(), bias.float(), threshold=0.5, scale=scale)
        assert error(actual, expected) < LIMIT[dtype], (m, n, rows, dtype)
ids = torch.arange(24)[None]
for kind in ("rotated", "cats"):
    assert fused_cpu.Decoder(special_model(kind), ids[:, :20], 4).parity(ids[:, 20:21])["logits"] < 1e-5
code = "".join(_gather_numba.linear.inspect_asm(s) for s in _gather_numba.linear.signatures)
print("ymm" if re.search(r"%ymm", code) else "", "zmm" if re.search(r"%zmm", code) else "none wider")
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX2 is of x86-64")
def test_the_kernels_run_on_a_machine_with_avx2_alone(tmp_path):
    """numba is told to build for a Haswell: the same results, and no register of AVX-512 in the code."""
    if "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("needs a processor with AVX2")
    features = "+avx2,+fma,+f16c,+bmi,+bmi2,+popcnt,+sse4.2"
    target = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": features, "SPARSEBENCH_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", AVX2],
        capture_output=True,
        text=True,
        env={**os.environ, **target},
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.split() == ["ymm", "none", "wider"], done.stderr


def arm64(dispatcher, signature) -> str:
    """ARM64 assembly of a compiled function, from the LLVM code that numba makes of it anew (cached code has none)."""
    fresh = njit(nogil=True)(dispatcher.py_func)
    fresh.compile(signature)
    code = fresh.inspect_llvm(fresh.signatures[-1])
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple("aarch64-unknown-linux-gnu").create_target_machine(
        cpu="neoverse-n1", codemodel="small"
    )
    code = re.sub(r'target (triple|datalayout) = ".*"\n', "", code)
    code = re.sub(r'"(target-cpu|target-features|tune-cpu)"="[^"]*"', "", code)
    # numba's counts of references were made into x86's own instructions already: here they are calls
    code = re.sub(r"llvm\.x86\.atomic\.(\w+)\.cc\.i64", r"atomic_\1", code).replace(" immarg", "")
    module = llvm.parse_assembly(code)
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    module.verify()
    return machine.emit_assembly(module)


def arrays(*kinds):
    """Signatures of contiguous arrays: (element, dimensions)."""
    return [types.Array(element, dimensions, "C") for element, dimensions in kinds]


@pytest.mark.slow
@pytest.mark.parametrize("weight", [types.float32, types.uint16], ids=["float32", "bfloat16"])
def test_the_product_compiles_for_arm64(weight):
    """Vectors of the source become ARM's own: fused multiply-adds over four floats, no call into a library for them."""
    y, w, index, values = arrays((types.float32, 2), (weight, 2), (types.int64, 1), (types.float32, 2))
    code = arm64(_gather_numba.gather, (y, w, index, values, types.int64, types.int64, types.int64))
    assert len(re.findall(r"\bfmla\s+v\d+\.4s", code)) >= 8 and "prfm" in code
    assert not re.search(r"\bbl\s+fmaf?\b", code)


@pytest.mark.slow
def test_the_selection_compiles_for_arm64():
    x, index, values = arrays((types.float32, 1), (types.int64, 1), (types.float32, 2))
    assert "ret" in arm64(compact_largest, (x, types.int64, x, index, values))
