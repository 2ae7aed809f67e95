"""Image classifiers: accuracy, zeros of activation maps, products with both operands non-zero, whole forward passes.

A trained network with ReLUs is sparse before any method touches it, so its own map sparsity stands beside the method's
and every change is given in points and relative to it. Expert FFNs of a vision transformer are counted per token and
reported per image (`routed`); everything else `macs.dense` counts all products, `macs.sparse` those with both
operands non-zero; `macs.executed` is what the kernels that ran really did.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from sparsebench import evaluate, macs, measure, pictures, products, shape_bias, sparsity
from sparsebench.kinds import language
from sparsebench.modules.activation_map import MapCounter, maps_of
from sparsebench.modules.input_sparse import replace
from sparsebench.modules.map_sparse import MapSparse, reference, unsupported
from sparsebench.products import Products

KEEPS_DENSE = True
EXPERTS = (
    "share of (token, expert) pairs not run, weighted by parameters of the block maps; a map without experts counts 0"
)
compare = evaluate.compare_classes


def batch_size(evaluation) -> int:
    return evaluation.examples_per_batch


def quality(module: nn.Module, split, evaluation) -> tuple[dict, tuple]:
    """(metrics, (zeros by map, products by layer, weight sparsity, shares of experts by site)): one pass, eval mode."""
    limit, size = evaluation.test_examples, evaluation.examples_per_batch
    with products.counting(module) as found:
        metrics, counters = evaluate.classification_quality(module, split, limit, size)
    maps = {site: counter for site, counter in counters.items() if isinstance(counter, MapCounter)}
    routed = {} if maps else sparsity.summarise(module, counters)
    return metrics, (maps, found, products.weight_sparsity(module), routed)


def more(module: nn.Module, data, evaluation) -> dict:
    """Shape bias, where `eval.cue_conflict` names images for it."""
    if evaluation.cue_conflict is None:
        return {}
    return {"shape_bias": shape_bias.measure(module, data, evaluation.cue_conflict, evaluation.examples_per_batch)}


def protocol(split, method) -> dict:
    return {"split": "test", "size": split.size, "channels": split.channels, "augment": "none"}


def dense_costs(module: nn.Module, data) -> tuple[dict[str, int], dict[str, macs.Cost]]:
    """(bytes of each layer's weights, costs per token of a transformer's block maps). Other products are counted later."""
    sites = macs.dense_sites(module) if hasattr(module, "config") else {}
    return {n: m.weight.numel() * m.weight.element_size() for n, m in module.named_modules() if is_product(m)}, sites


def is_product(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv2d, nn.Linear))


def figures(method, sparse, costs, dense_counts, counts, measurement, skips) -> tuple[dict, dict, dict]:
    (maps, found, weights, routed), (base_maps, base_found, base_weights, _), (costs, sites) = (
        counts,
        dense_counts,
        costs,
    )
    if routed:
        return routed_figures(method, sparse, sites, base_found, routed, measurement, skips)
    section = shares(maps) | {"requested": method.requested, "sparse_token_fraction": 1.0}
    section |= {"weight_sparsity": weights, "baseline": shares(base_maps) | {"weight_sparsity": base_weights}}
    for key in ("model_wide", "layer_mean"):
        section[f"{key}_gain_points"] = 100 * (section[key] - section["baseline"][key])
    section |= {
        "label": "activation maps, zeros pooled", "sites": "maps",
        "more": {"layer_mean": "activation maps, mean over layers", "weight_sparsity": "weights of conv and linear"},
        "definition": "share of exact zeros among all elements of the post-ReLU maps, over all test images; model_wide "
        "pools elements (large early maps weigh more), layer_mean averages the maps' shares",
    }  # fmt: skip
    return section, multiplications(sparse, found, base_found, skips), weight_traffic(costs, sparse)


def routed_figures(method, sparse, sites, base: dict[str, Products], routed: dict, measurement, skips: bool) -> tuple:
    """The three sections of a vision transformer with experts; base: products of the dense model."""
    images = next(iter(base.values())).images
    attention = attention_products(sparse, base)
    tokens = max(p.per_image()["rows"] for p in base.values())
    dense = sum(p.dense for p in base.values()) / images + attention
    section = language.describe_sparsity(method.requested, routed, sites, 0) | {"definition": EXPERTS}
    multiplied = macs.per_sample("image", dense, attention, tokens, sparse, routed, skips)
    return section, multiplied, macs.matrix_bytes(sites, sparse, "routers")


def shares(maps: dict[str, MapCounter]) -> dict:
    """Zeros over elements per map, pooled and averaged over maps."""
    sites = {
        name: {
            "sparsity": c.zeros / c.elements, "weight": c.elements // c.images,
            "role": name.partition(".")[0], "elements": c.elements, "zeros": c.zeros,
        }
        for name, c in maps.items()
    }  # fmt: skip
    total = sum(c.elements for c in maps.values())
    return {
        "model_wide": sum(c.zeros for c in maps.values()) / total if total else 0.0,
        "layer_mean": sum(s["sparsity"] for s in sites.values()) / len(sites) if sites else 0.0,
        "per_site": sites,
    }


def multiplications(sparse: nn.Module, found: dict, base: dict, skips: bool) -> dict:
    """The record's macs section, per image, from the products counted on the test images."""
    images = next(iter(found.values())).images
    total = {k: sum(getattr(p, k) for p in found.values()) / images for k in ("dense", "both", "activation", "weight")}
    natural = products.reduction(base, "both")
    attention = attention_products(sparse, found)
    reductions = {k: products.reduction(found, k) for k in ("both", "activation", "weight")}
    independent = 1 - (1 - reductions["activation"]) * (1 - reductions["weight"])
    skipping = {n for n, m in sparse.named_modules() if getattr(m, "skips", False)} if skips else set()
    executed = sum((p.activation if n in skipping else p.dense) for n, p in found.items()) / images
    return {
        "dense": total["dense"] + attention,
        "sparse": total["both"] + attention,
        "executed": executed + attention,
        "overhead": 0,
        **macs.unit_per("image"),
        "definition": "sparse: both operands non-zero, by mask convolution; padding, biases and norms cost nothing",
        "parts": {"attention": attention},
        "reduction": reductions | {"if_independent": independent, "baseline": natural},
        "reduction_gain_points": 100 * (reductions["both"] - natural),
        "per_site": {name: site_cost(p, base.get(name)) for name, p in found.items()},
    }


def site_cost(found: Products, base: Products | None) -> dict:
    each = found.per_image()
    return {
        "dense_macs": each["dense"], "sparse_macs": each["both"], "activation_only": each["activation"],
        "weight_only": each["weight"], "baseline_macs": base.per_image()["both"] if base else None,
    }  # fmt: skip


def attention_products(module: nn.Module, found: dict[str, Products]) -> float:
    """Scores and weighted values of a vision transformer, per image; 0 for others."""
    settings = getattr(module, "config", None)
    if settings is None or not hasattr(settings, "num_attention_heads"):
        return 0
    tokens = max(p.per_image()["rows"] for p in found.values())
    return 2 * settings.num_hidden_layers * settings.hidden_size * tokens**2


def weight_traffic(costs: dict[str, int], sparse: nn.Module) -> dict:
    """The record's bytes section. Pruned weights are stored dense: nothing is saved until a format packs them."""
    layers = [m.weight for m in sparse.modules() if is_product(m)]
    nonzero = sum(int(torch.count_nonzero(w)) * w.element_size() for w in layers)
    return {
        "dense": sum(costs.values()),
        "sparse": sum(w.numel() * w.element_size() for w in layers),
        "nonzero_weights": nonzero,
        "unit": "bytes of conv and linear weights read per forward pass; pruned weights are stored as zeros",
    }


def latency(dense, sparse, data, measurement, hardware, found: dict) -> dict:
    """Whole forward passes at batch 1 and `measure.batch`, and every layer by itself at batch 1.

    Dense kernels gain nothing from zeros, so layers run dense unless the kernel that skips was measured faster on the
    same image; at batch 1 those layers use it, and only then is a speed-up claimed.
    """
    device = hardware.torch_device
    inputs = {n: next(data.test.batches(n, n, device)).inputs for n in dict.fromkeys((1, measurement.batch))}
    rows = layer_latency(sparse, inputs[1], measurement, hardware)
    faster = [name for name, row in rows.items() if row.get("speedup", 0) > 1]
    fast = copy.deepcopy(sparse) if faster else sparse
    for name in faster:
        replace(fast, name, MapSparse(fast.get_submodule(name), hardware.kernel_name))
    section = measure.forward_latency(dense, fast, inputs, measurement, hardware)
    return section | {"layers": rows, "layers_that_skip": faster}


def layer_latency(sparse: nn.Module, image: torch.Tensor, measurement, hardware) -> dict[str, dict]:
    """Per layer on its own input: median ms of the dense product, of the kernel, and of the kernel with nothing to skip;
    its input's zeros, and the sparsity at which kernel and dense take equally long (None: never below 100 %).

    Raises ArithmeticError where the kernel differs from the dense product.
    """
    seen, dtype = {}, next(sparse.parameters()).dtype
    layers = {n: m for n, m in sparse.named_modules() if is_product(m)}
    hooks = [m.register_forward_hook(lambda _, a, y, n=n: seen.__setitem__(n, a[0])) for n, m in layers.items()]
    with torch.no_grad():
        evaluate.logits(sparse, image)
    for hook in hooks:
        hook.remove()
    found = {}
    for name, layer in layers.items():
        x = seen[name].detach()
        row = {"input_zeros": float((x == 0).float().mean())}
        problem = unsupported(layer, hardware)
        if problem or (x.dim() == 3 and isinstance(layer, nn.Linear)):
            found[name] = row | {"unsupported": problem or "it takes one row per image"}
            continue
        fast, full = MapSparse(layer, hardware.kernel_name), torch.rand_like(x) + 0.1

        def call(module, value):
            def run(_):
                with torch.no_grad():
                    return module(value)

            return measure.Contender(run)

        with torch.no_grad():
            wanted = reference(layer, x)
            error = float((fast(x) - wanted).norm() / (wanted.norm() + 1e-30))
        measure.check_parity({name: error}, dtype)
        contenders = [call(layer, x), call(fast, x), call(fast, full)]
        times, _ = measure.interleaved(contenders, measurement.warmup, measurement.samples, hardware.torch_device)
        dense_ms, sparse_ms, full_ms = (measure.summary(t)["median_ms"] for t in times)
        row |= {"dense_ms": dense_ms, "sparse_ms": sparse_ms, "nothing_skipped_ms": full_ms}
        row |= {"speedup": dense_ms / sparse_ms, "parity_relative_error": error}
        row["break_even_sparsity"] = measure.break_even(dense_ms, full_ms, sparse_ms, row["input_zeros"])
        found[name] = row
    return found


def extra(dense: nn.Module, sparse: nn.Module, qualities: tuple[dict, dict], data, folder: Path) -> dict:
    """Confusion matrices, accuracy per class, and pictures in the run's folder."""
    names = ("dense", "sparse")
    found = {"classes": data.classes, "per_class": {n: q["per_class"] for n, q in zip(names, qualities, strict=True)}}
    if len(data.classes) <= 100:
        found["confusion"] = {n: q["confusion"] for n, q in zip(names, qualities, strict=True)}
    batch = next(data.test.batches(3, 3, next(sparse.parameters()).device))
    drawn = []
    if any(True for _ in maps_of(sparse)):
        drawn.append(pictures.maps(dense, sparse, batch, folder / "maps.png"))
    if len(data.classes) <= 100:
        drawn.append(pictures.confusion(*(q["confusion"] for q in qualities), data.classes, folder / "confusion.png"))
    return {"classification": found, "pictures": drawn}
