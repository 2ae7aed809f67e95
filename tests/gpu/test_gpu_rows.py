"""Products of few rows, attention over kept heads, masking and whole decode steps of several texts on a GPU."""

from types import SimpleNamespace

import pytest
import torch

from sparsebench.engines import Decoder
from sparsebench.kernels import cuda_rows, masked_dense
from sparsebench.measure import clock, few_rows, latency, prompt_pass
from sparsebench.modules import masking
from sparsebench.modules.input_sparse import InputSparseLinear
from sparsebench.modules.tokens import rows_apart
from tests.helpers import sparse_copy, tiny_model
from tests.kernel_checks import KERNEL_SHAPES, LIMIT, check_selective_attention, error, inputs


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_few_rows_on_the_gpu(dtype):
    """Shapes at random and Llama's own, 2 to 16 rows, poisoned weights outside the union, twice in a row."""
    shapes = [(-(-m // 8) * 8, n, 2 + i % 15) for i, (m, n, _) in enumerate(KERNEL_SHAPES)] + [(4096, 11008, 8)]
    for i, (m, n, rows) in enumerate(shapes):
        torch.manual_seed(i)
        x, weight, bias, scale = (t.cuda() for t in inputs(m, n, rows, dtype))
        for threshold in (-1.0, 0.7, 1.6, 1e9):
            limit = torch.tensor(threshold, device="cuda")
            union = masked_dense.kept(x.float(), limit, scale).flatten(0, 1).any(0)
            poisoned = weight.t().contiguous().clone()
            poisoned[~union] = float("nan")
            reference = masked_dense.input_sparse_linear(
                x.float(), weight.float(), bias.float(), threshold=limit, scale=scale
            )
            for _ in range(2):
                torch.full((rows * m,), float("nan"), device="cuda", dtype=dtype)
                y = cuda_rows.input_sparse_linear(x, poisoned.t(), bias, threshold=limit, scale=scale)
                assert error(y, reference) < LIMIT[dtype], (m, n, rows, threshold)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_over_kept_heads_on_the_gpu(dtype):
    shapes = ((1, 1, 1, 64, 1), (3, 4, 2, 128, 700), (2, 8, 4, 64, 1030), (5, 2, 8, 128, 37), (2, 32, 1, 128, 9000))
    check_selective_attention(cuda_rows.selective_attention, dtype, shapes, "cuda")


@pytest.mark.gpu
def test_few_rows_compile_and_capture():
    from torch._dynamo.utils import counters

    x, weight, bias, _ = (t.cuda() for t in inputs(1256, 128, 4, torch.float16))
    weight, limit = weight.t().contiguous().t(), torch.tensor(0.7, device="cuda")

    def product(x):
        return cuda_rows.input_sparse_linear(x, weight, bias, threshold=limit) + 1

    counters.clear()
    compiled = torch.compile(product, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(4):
            torch.testing.assert_close(compiled(x).clone(), product(x), rtol=1e-2, atol=1e-2)
    assert not counters["inductor"]["cudagraph_skips"]


@pytest.mark.gpu
@pytest.mark.parametrize("prompt", ["all", "half"])
def test_masking_on_the_gpu_is_masking(prompt):
    torch.manual_seed(0)
    for scale in (None, torch.rand(96)):
        linear = torch.nn.Linear(96, 32, device="cuda", dtype=torch.float16)
        sparse = InputSparseLinear(linear, "0.q", 0.8, scale=None if scale is None else scale.cuda(), prompt=prompt)
        x = torch.randn(3, 10, 96, device="cuda").half()
        kept = masked_dense.kept(x.float(), sparse.threshold, sparse.scale)
        kept[:, :5] |= prompt == "half"
        assert torch.equal(masking.masked(x, sparse), torch.where(kept, x, 0))


def gpu_copy(threshold=0.5):
    return sparse_copy(threshold, "cuda_gather", tiny_model().cuda().half())


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_decode_of_several_texts_on_the_gpu(compiled):
    """Each row is what it is alone, in batches and in a verify step."""
    model = gpu_copy()
    ids = torch.randint(0, 320, (4, 12), generator=torch.Generator().manual_seed(2)).cuda()
    alone = [Decoder(model, row[None, :8], 4, compiled=False) for row in ids]
    expected = torch.stack(
        [torch.cat([d.step(t.view(1, 1))[0] for t in row[8:]]) for d, row in zip(alone, ids, strict=True)]
    )
    together = Decoder(model, ids[:, :8], 4, compiled=compiled)
    steps = torch.stack([together.step(ids[:, i : i + 1])[:, 0].clone() for i in range(8, 12)], 1)
    torch.testing.assert_close(steps, expected, rtol=5e-2, atol=5e-2)
    one = Decoder(model, ids[:1, :8], 4, compiled=compiled)
    with rows_apart():
        torch.testing.assert_close(one.step(ids[:1, 8:])[0], expected[0], rtol=5e-2, atol=5e-2)


@pytest.mark.gpu
def test_batches_and_verify_are_timed_on_the_gpu():
    settings = SimpleNamespace(samples=3, warmup=1, context=6, batches=[1, 4, 32], chunk=4)
    target = SimpleNamespace(
        torch_device=torch.device("cuda"),
        devices=1,
        kernel_name="cuda_gather",
        torch_dtype=torch.float16,
        skips=True,
        engine="auto",
    )
    ids = torch.randint(0, 320, (600,), generator=torch.Generator().manual_seed(3)).cuda()
    decode = {side: {"median_ms": 1.0, "p10_ms": 0.9, "p90_ms": 1.1} for side in ("dense", "sparse")}
    decode |= {"dense_engine": "fused", "sparse_engine": "fused", "speedup": 1.0}
    dense, sparse = tiny_model().cuda().half(), gpu_copy()
    section, _ = few_rows.batches(dense, sparse, ids, decode, settings, target)
    assert [row["simulated"] for row in section] == [False, False, True]
    assert "cuda_rows" in section[1]["kernel"] and "sparse/compiled" in section[1]["engines"], section[1]["refused"]
    verify = few_rows.verify(dense, sparse, ids, decode, settings, target)
    assert not verify["simulated"] and verify["drafts"]["sparse"]["tokens_per_call"] >= 1


@pytest.mark.gpu
def test_a_prompt_is_not_slower_for_its_masks():
    """Compiled, masks are joined to what stands before them; medians of the fastest engines within 15 percent."""
    dense = tiny_model(hidden_size=512, intermediate_size=1024, num_attention_heads=8)
    dense = dense.cuda().half()
    from sparsebench.engines import channel_major
    from sparsebench.modules.storage import sharing_copy

    sparse = sharing_copy(dense)
    channel_major(sparse)
    for each in (m for m in sparse.modules() if isinstance(m, InputSparseLinear)):
        each.threshold.fill_(0.3)
    masking.share_rules(sparse, InputSparseLinear)
    prompt = torch.randint(0, 320, (1, 128)).cuda()
    target = SimpleNamespace(engine="auto", devices=1, torch_device=torch.device("cuda"))
    ran, refused = prompt_pass.prefills({"dense": dense, "sparse": sparse}, prompt, target)
    assert set(ran) == {"dense/eager", "dense/compiled", "sparse/eager", "sparse/compiled"}, refused
    times, _ = latency.interleaved(list(ran.values()), 3, 30, torch.device("cuda"))
    figures = clock.fastest({n: clock.summary(t) for n, t in zip(ran, times, strict=True)})
    assert figures["sparse"]["median_ms"] < 1.15 * figures["dense"]["median_ms"], figures["engines"]


@pytest.mark.gpu
def test_head_sparse_decode_on_the_gpu():
    """Static and trained selections: a decode step, eager and compiled, is the masked model's."""
    from sparsebench.modules import heads
    from sparsebench.sites import find_blocks

    ids = torch.randint(0, 320, (2, 12), generator=torch.Generator().manual_seed(4)).cuda()
    for router in ("static", "trained"):
        model = tiny_model(num_key_value_heads=4).cuda().half()
        rule = {"ranking": torch.rand(4).cuda()}
        if router == "trained":
            rule["route"] = (torch.randn(4, 64).cuda().half(), torch.zeros(4).cuda().half())
        heads.swap(model, find_blocks(model)[1], 4, 4, 2, router=router, kernel="cuda_gather", **rule)
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits[:, -1]
        for compiled in (False, True):
            decoder = Decoder(model, ids[:, :-1], 2, compiled=compiled)
            for _ in range(3):
                decoder.rewind()
                y = decoder.step(ids[:, -1:])[:, 0]
            torch.testing.assert_close(y, expected, rtol=5e-2, atol=5e-2)
