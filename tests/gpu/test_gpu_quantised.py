"""Products and fused steps with weights in 8 or 4 bits on a GPU, against fp32 masked references on the dequantised weights."""

import pytest
import torch
import transformers

from sparsebench import engines
from sparsebench.engines import fused_cuda
from sparsebench.kernels import masked_dense
from sparsebench.kernels._packed import quantised
from sparsebench.models.quantised import quantise
from sparsebench.modules.input_sparse import replace, sparse_of
from sparsebench.modules.quant_sparse import QuantLinear, TorchQuantLinear, with_torch_products
from sparsebench.sites import find_blocks
from tests.kernel_checks import KERNEL_SHAPES, LIMIT, asymmetric, error

KINDS = [(8, 128, False), (4, 128, False), (4, 32, False), (4, 64, True)]


def llama(dtype, hidden=512, inner=1376, heads=4, groups=2):
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=groups,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.to("cuda", dtype).eval().requires_grad_(False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits, group, zeros", KINDS)
def test_packed_product_on_the_gpu(bits, group, zeros, dtype):
    """Shapes at random, fresh inputs, outputs poisoned, twice in a row; all, some, one and no channels kept."""
    from sparsebench.kernels import cuda_packed

    for i, (m, n, _) in enumerate([*KERNEL_SHAPES[:30], (4096, 4096, 1)]):
        torch.manual_seed(i)
        m = -(-m // 8) * 8  # noqa: PLW2901
        weight, bias = torch.randn(m, n, device="cuda").to(dtype), torch.randn(m, device="cuda").to(dtype)
        x, scale = torch.randn(1, 1, n, device="cuda").to(dtype), torch.rand(n, device="cuda") + 0.5
        packed = asymmetric(weight, group) if zeros else quantised(weight, bits, group)
        exact = packed.dequantised(torch.float32)
        one = float((x.float().abs() * scale).flatten().sort().values[-2]) if n > 1 else -1.0
        for threshold in (-1.0, 0.7, one, 1e9):
            limit = torch.tensor(threshold, device="cuda")
            reference = masked_dense.input_sparse_linear(x.float(), exact, bias.float(), threshold=limit, scale=scale)
            for _ in range(2):
                torch.full((m,), float("nan"), device="cuda", dtype=dtype)
                actual = cuda_packed.quantised_linear(x, packed, bias, threshold=limit, scale=scale)
                assert error(actual, reference) < LIMIT[dtype], (m, n, threshold)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("threshold, keep_all", [(-1.0, False), (0.5, False), (1e9, False), (0.5, True)])
def test_fused_step_with_packed_weights_on_the_gpu(bits, dtype, threshold, keep_all):
    model = llama(dtype)
    quantise(model, f"int{bits}", 128, "input", "cuda_gather")
    dense = model if threshold < 0 else None
    ids = torch.randint(0, 1000, (1, 40), device="cuda")
    reference = engines.Decoder(dense, ids[:, :36], 4, compiled=False) if dense else None
    expected = [reference.step(ids[:, i : i + 1]).float().clone() for i in range(36, 40)] if reference else []
    for block in find_blocks(model):
        for site in block.sites.values():
            replace(model, site.path, sparse_of(model.get_submodule(site.path), site.name, threshold))
    fused = fused_cuda.Decoder(model, ids[:, :36], 4, keep_all)
    assert max(fused.parity(ids[:, 36:37]).values()) < 1e-4
    for i, logits in enumerate(expected):
        actual = fused.step(ids[:, 36 + i : 37 + i])
        assert float((actual - logits).norm() / logits.norm()) < (1e-2 if dtype == torch.float16 else 5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4])
def test_packed_product_compiles_and_captures(bits):
    from torch._dynamo.utils import counters

    linear = torch.nn.Linear(256, 1024, device="cuda", dtype=torch.float16)
    sparse = sparse_of(QuantLinear(quantised(linear.weight, bits), linear.bias), "0.q", 0.7, kernel="cuda_gather")
    x = torch.randn(1, 1, 256, device="cuda").half()
    counters.clear()
    compiled = torch.compile(lambda x: sparse(x) + 1, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(4):
            torch.testing.assert_close(compiled(x).clone(), sparse(x) + 1, rtol=1e-2, atol=1e-2)
    assert not counters["inductor"]["cudagraph_skips"] and sparse.kernel(1) == "cuda_packed"


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4])
def test_the_products_of_torch_are_of_the_same_weights(bits):
    linear = torch.nn.Linear(1024, 512, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    ours = QuantLinear(quantised(linear.weight, bits), linear.bias)
    x = torch.randn(1, 1, 1024, device="cuda").bfloat16()
    reference = x.float() @ ours.packed.dequantised(torch.float32).t() + linear.bias.float()
    assert error(TorchQuantLinear(ours)(x), reference) < 1e-2


@pytest.mark.gpu
def test_a_whole_model_with_the_products_of_torch():
    model = llama(torch.bfloat16, hidden=1024, inner=2048, heads=8, groups=4)
    quantise(model, "int4", 128, "input", "cuda_gather")
    ids = torch.randint(0, 1000, (1, 16), device="cuda")
    expected = model(input_ids=ids).logits
    with_torch_products(model)
    assert error(model(input_ids=ids).logits, expected.float()) < 5e-2
