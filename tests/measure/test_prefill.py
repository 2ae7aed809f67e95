"""Products and bytes of a whole prompt, against a loop over its tokens by hand."""

import pytest

from sparsebench.measure import macs, prefill, quality, sparsity
from sparsebench.models import Loaded
from sparsebench.modules.base import Cost, PromptCost
from tests.helpers import built, tiny_model, work


def measured(rule, data, folder):
    dense = macs.dense_sites(tiny_model())
    state = rule.fit(Loaded(tiny_model(), None, {}), data, work(folder))
    model = rule.apply(tiny_model(), state, work(folder))
    _, counters = quality.language_quality(model, data.test, 4, 4)
    seen = sparsity.summarise(model, counters)
    return dense, dense | macs.site_costs(model, seen), seen, model


@pytest.mark.parametrize("phase", ["prefill", "all"])
def test_a_prompt_of_nm_by_hand(phase, data, tmp_path):
    rule = built("method", "method=nm", calibration_tokens=256, phase=phase, skip=["o"], score="colnorm")
    dense, sparse, seen, model = measured(rule, data, tmp_path)
    outside = macs.outside_blocks(model, 16)
    counted, traffic = prefill.account(dense, sparse, seen, outside, 10, "all", timed=True)
    by_hand = overhead = 0
    size = {name: cost.dense_macs for name, cost in dense.items()}
    attention = sum(2 * 2 * 4 * 16 * place for place in range(1, 11))  # layers, heads, head size
    for name, whole in size.items():
        by_hand += 10 * (whole if name.endswith(".o") else whole / 2)
        overhead += (
            0 if name.endswith(".o") else 10 * 2 * (160 if name.endswith(".down") else 64)
        )  # score and selection
    assert counted["sparse"] == pytest.approx(by_hand + overhead + attention + 320 * 64)
    assert counted["dense"] == 10 * sum(size.values()) + attention + 320 * 64
    assert counted["overhead"] == overhead and counted["executed"] == counted["dense"] + overhead
    covered = sum(whole for name, whole in size.items() if not name.endswith(".o")) / sum(size.values())
    assert counted["coverage"] == pytest.approx(covered) and counted["simulated"]
    assert counted["hypothetical"]["speedup_of_linear_maps"] == pytest.approx(1 / (1 - covered / 2))
    assert traffic["dense"] == traffic["sparse"] == 4 * (sum(size.values()) + 320 * 64)

    decode, read = macs.account(dense, sparse, outside, 16)
    if phase == "prefill":  # a decoded token is the dense model's
        assert decode["sparse"] == decode["dense"] and read["sparse"] == read["dense"] and decode["overhead"] == 0
    else:
        assert decode["sparse"] < 0.7 * decode["dense"] and read["sparse"] < 0.7 * read["dense"]
    scored, _ = macs.over_scored_tokens(dense, sparse, seen, outside, 16)  # scored in windows, so as in a prompt
    assert scored["sparse"] - outside.macs == pytest.approx((by_hand + overhead) / 10)


def test_tokens_left_dense_and_a_kernel_that_skips():
    dense = {"0.q": Cost(100, 100, 0, 400, 400)}
    sparse = {"0.q": Cost(100, 100, 0, 400, 400, prompt=PromptCost(50, 4, 50))}
    outside = macs.Outside(7, 0, 28, 0, pair_macs=2 * 64)
    rest = 7 + sum(2 * 64 * place for place in range(1, 9))
    seen = {"0.q": sparsity.SiteSparsity(0.5, 0.5, 100, 8, 0)}
    counted, _ = prefill.account(dense, sparse, seen, outside, 8, "half", timed=True)
    assert counted["sparse"] == 4 * 54 + 4 * 100 + rest == counted["executed"] and not counted["simulated"]
    assert prefill.account(dense, sparse, seen, outside, 8, "half", timed=False)[0]["executed"] is None
    plain = {"0.q": Cost(100, 30, 2, 400, 120)}  # a method without a word on prompts: masks
    counted, _ = prefill.account(dense, plain, seen, outside, 8, "all", timed=True)
    assert counted["sparse"] == 8 * 32 + rest and counted["executed"] == 8 * 102 + rest and counted["simulated"]


def test_every_method_says_what_its_prompt_costs(data, tmp_path):
    rule = built("method", "method=teal", calibration_tokens=256, prompt="half")
    dense, sparse, seen, model = measured(rule, data, tmp_path)
    counted, _ = prefill.account(dense, sparse, seen, macs.outside_blocks(model, 16), 20, "half", timed=True)
    assert counted["sparse"] < counted["dense"] == counted["executed"] - counted["overhead"] and counted["simulated"]
