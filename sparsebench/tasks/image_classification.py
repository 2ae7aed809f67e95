"""Image classifiers: accuracy, zeros of activation maps, products with both operands non-zero, whole forward passes.

A trained network with ReLUs is sparse before any method touches it, so its own map sparsity stands beside the method's
and every change is given in points and relative to it. Expert FFNs of a vision transformer are counted per token and
reported per image (`routed`); everything else `macs.dense` counts all products, `macs.sparse` those with a non-zero
activation (and weight, where the method prunes); `macs.executed` is what the kernels that ran really did.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from sparsebench.engines import check
from sparsebench.measure import clock, effective_macs, latency, macs, memory, quality, shape_bias, sparsity
from sparsebench.measure.effective_macs import Products
from sparsebench.measure.macs import executed_per_sample
from sparsebench.modules.activation_map import ActivationMap, maps_of
from sparsebench.modules.base import MapCounter, sparse_modules
from sparsebench.modules.input_sparse import replace
from sparsebench.modules.map_sparse import MapSparse, reference, unsupported
from sparsebench.sites import find_blocks
from sparsebench.tasks import pictures
from sparsebench.tasks.base import Assessment, Comparison, Task, beside
from sparsebench.tasks.language_modeling import describe_sparsity

EXPERTS = (
    "share of (token, expert) pairs not run, weighted by parameters of the block maps; a map without experts counts 0"
)

BETWEEN_ACTIVATIONS = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)


@dataclass(kw_only=True)
class ImageAssessment(Assessment):
    """Accuracy, zeros of maps and products counted in one pass over the test images, in eval mode."""

    maps: dict[str, MapCounter]  # zeros by map; empty for a transformer with experts
    products: dict[str, Products]  # by layer
    weight_sparsity: float
    attention_macs: float  # scores and weighted values of a vision transformer, per image
    layer_bytes: int  # weights of convolutions and linear maps
    nonzero_bytes: int  # of these, the weights that are not 0
    matrix_bytes: int


class ImageClassification(Task[ImageAssessment]):
    kind = "vision"
    keepable = ("accuracy",)
    keeps_dense = True

    def batch_size(self, evaluation):
        return evaluation.classifier.examples_per_batch

    def assess(self, loaded, module, data, settings):
        classifier = settings.eval.classifier
        limit, size = classifier.test_examples, classifier.examples_per_batch
        with effective_macs.counting(module) as products:
            metrics, counters = quality.classification_quality(module, data.test, limit, size)
        maps = {site: counter for site, counter in counters.items() if isinstance(counter, MapCounter)}
        measured = {} if maps else sparsity.summarise(module, counters)
        further = {}
        if classifier.cue_conflict is not None:
            further["shape_bias"] = shape_bias.measure(module, data, classifier.cue_conflict, size)
        layers = [m.weight for m in module.modules() if is_product(m)]
        return ImageAssessment(
            metrics=metrics,
            measured=measured,
            costs=macs.site_costs(module, measured) if has_blocks(module) else {},
            weight_bytes=memory.weight_bytes(module),
            further=further,
            maps=maps,
            products=products,
            weight_sparsity=effective_macs.weight_sparsity(module),
            attention_macs=attention_products(module, products, data.test),
            layer_bytes=sum(w.numel() * w.element_size() for w in layers),
            nonzero_bytes=sum(int(torch.count_nonzero(w)) * w.element_size() for w in layers),
            matrix_bytes=macs.matrices_of(module),
        )

    def score(self, module, split, limit, settings, metric):
        return quality.classification_quality(module, split, limit, settings.eval.classifier.examples_per_batch)

    def compare(self, dense, sparse, data, settings):
        test, requested = data.test, settings.method.requested
        protocol = {"split": "test", "size": test.size, "channels": test.channels, "augment": "none"}
        if settings.eval.classifier.test_examples:
            protocol["subset"] = "stratified by class, seed 0"
        section, multiplied, traffic = (
            routed_sections(requested, dense, sparse)
            if sparse.measured
            else map_sections(requested, dense, sparse, settings.method.prunes)
        )
        return Comparison(
            quality=quality.compare_classes(dense.metrics, sparse.metrics, protocol),
            sparsity=section,
            macs=multiplied,
            bytes=traffic,
            extra=beside(dense, sparse),
        )

    def time(self, dense, sparse, data, settings, unquantised=None):
        """Whole forward passes at batch 1 and `measure.batch`, and every layer by itself at batch 1.

        Dense kernels gain nothing from zeros, so layers run dense unless the kernel that skips was measured faster on
        the same image; at batch 1 those layers use it, and only then is a speed-up claimed.
        """
        measurement, hardware = settings.measure, settings.hardware
        device = hardware.torch_device
        inputs = {n: next(data.test.batches(n, n, device)).inputs for n in dict.fromkeys((1, measurement.batch))}
        rows = layer_latency(sparse, inputs[1], measurement, hardware)
        faster = [name for name, row in rows.items() if row.get("speedup", 0) > 1]
        fast = copy.deepcopy(sparse) if faster else sparse
        for name in faster:
            replace(fast, name, MapSparse(fast.get_submodule(name), hardware.kernel_name))
        timing = latency.forward_latency(dense, fast, inputs, measurement, hardware)
        timing.latency |= {"layers": rows, "layers_that_skip": faster}
        timing.skipping |= set(faster)
        return timing

    def executed(self, macs, timing):
        """Of a network with activation maps: the layers that ran the kernel skipped their input's zeros, no others."""
        if "tokens" in macs["parts"]:
            return executed_per_sample(macs, timing.skipping)
        layers = [layer for name, layer in macs["per_site"].items() if name in timing.skipping]
        return macs["dense"] - sum(layer["dense_macs"] - layer["activation_only"] for layer in layers)

    def illustrate(self, dense, sparse, data, folder):
        """Confusion matrices, accuracy per class, and pictures in the run's folder."""
        both = {"dense": dense[1].metrics, "sparse": sparse[1].metrics}
        shown = {"classes": data.classes, "per_class": {n: m["per_class"] for n, m in both.items()}}
        few = len(data.classes) <= 100
        if few:
            shown["confusion"] = {n: m["confusion"] for n, m in both.items()}
        batch = next(data.test.batches(3, 3, next(sparse[0].parameters()).device))
        drawn = []
        if any(True for _ in maps_of(sparse[0])):
            drawn.append(pictures.maps(dense[0], sparse[0], batch, folder / "maps.png"))
        if few:
            confusions = (m["confusion"] for m in both.values())
            drawn.append(pictures.confusion(*confusions, data.classes, folder / "confusion.png"))
        return {"classification": shown, "pictures": drawn}


def is_product(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv2d, nn.Linear))


def map_sections(
    requested: float | None, dense: ImageAssessment, sparse: ImageAssessment, prunes: bool
) -> tuple[dict, dict, dict]:
    """Sections sparsity, macs and bytes of a network with activation maps."""
    section = shares(sparse.maps) | {"requested": requested, "sparse_token_fraction": 1.0}
    section |= {
        "weight_sparsity": sparse.weight_sparsity,
        "baseline": shares(dense.maps) | {"weight_sparsity": dense.weight_sparsity},
    }
    for key in ("model_wide", "layer_mean"):
        section[f"{key}_gain_points"] = 100 * (section[key] - section["baseline"][key])
    section |= {
        "label": "activation maps, zeros pooled", "sites": "maps",
        "more": {"layer_mean": "activation maps, mean over layers", "weight_sparsity": "weights of conv and linear"},
        "definition": "share of exact zeros among all elements of the post-ReLU maps, over all test images; model_wide "
        "pools elements (large early maps weigh more), layer_mean averages the maps' shares",
    }  # fmt: skip
    traffic = {  # pruned weights are stored dense: nothing is saved until a format packs them
        "dense": dense.layer_bytes,
        "sparse": sparse.layer_bytes,
        "nonzero_weights": sparse.nonzero_bytes,
        "unit": "bytes of conv and linear weights read per forward pass; pruned weights are stored as zeros",
    }
    return section, multiplications(dense, sparse, prunes), traffic


def routed_sections(
    requested: float | None, dense: ImageAssessment, sparse: ImageAssessment
) -> tuple[dict, dict, dict]:
    """The same of a vision transformer with experts."""
    base = dense.products
    images, tokens = next(iter(base.values())).images, max(p.per_image()["rows"] for p in base.values())
    whole = sum(p.dense for p in base.values()) / images + dense.attention_macs
    section = describe_sparsity(requested, sparse.measured, dense.costs, 0) | {"definition": EXPERTS}
    multiplied = macs.per_sample("image", whole, dense.attention_macs, tokens, sparse.costs)
    return section, multiplied, macs.matrix_bytes(dense.matrix_bytes, sparse.matrix_bytes)


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


def multiplications(dense: ImageAssessment, sparse: ImageAssessment, prunes: bool) -> dict:
    """The record's macs section, per image, from the products counted on the test images.

    prunes: whether the method set weights to 0; zeros that a network happens to have are not credited to it.
    """
    counted = "both" if prunes else "activation"
    products, base, attention = sparse.products, dense.products, sparse.attention_macs
    images = next(iter(products.values())).images
    total = {
        k: sum(getattr(p, k) for p in products.values()) / images for k in ("dense", "both", "activation", "weight")
    }
    natural = effective_macs.reduction(base, "both")
    reductions = {k: effective_macs.reduction(products, k) for k in ("both", "activation", "weight")}
    independent = 1 - (1 - reductions["activation"]) * (1 - reductions["weight"])
    return {
        "dense": total["dense"] + attention,
        "sparse": total[counted] + attention,
        "executed": None,  # until layers were timed
        "overhead": 0,
        **macs.unit_per("image"),
        "definition": f"sparse: {'both operands' if prunes else 'activation'} non-zero, by mask convolution; padding, "
        "biases and norms cost nothing",
        "parts": {"attention": attention},
        "reduction": reductions | {"if_independent": independent, "baseline": natural},
        "reduction_gain_points": 100 * (reductions["both"] - natural),
        "per_site": {name: site_cost(p, base.get(name), counted) for name, p in products.items()},
    }


def site_cost(products: Products, base: Products | None, counted: str) -> dict:
    each = products.per_image()
    return {
        "dense_macs": each["dense"], "sparse_macs": each[counted], "activation_only": each["activation"],
        "weight_only": each["weight"], "baseline_macs": base.per_image()[counted] if base else None,
    }  # fmt: skip


def has_blocks(module: nn.Module) -> bool:
    """Whether it is a transformer of transformers whose blocks are known, or were until a method put experts there."""
    if not isinstance(module, PreTrainedModel):
        return False
    if any(not isinstance(m, ActivationMap) for m in sparse_modules(module)):
        return True
    try:
        return bool(find_blocks(module))
    except ValueError:
        return False


def attention_products(module: nn.Module, counted: dict[str, Products], split) -> float:
    """Products of two activations, per image: attention's scores and weighted values; 0 where there is no attention.

    Of known blocks by their shapes, of any other network as torch counts its matrix products (one image of `split`).
    """
    if has_blocks(module):
        tokens = max(p.per_image()["rows"] for p in counted.values())
        return 2 * module.config.num_hidden_layers * module.config.hidden_size * tokens**2
    image = next(split.batches(1, 1, next(module.parameters()).device)).inputs
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        quality.logits(module, image)
    flops = counter.get_flop_counts()["Global"]
    return sum(count for operator, count in flops.items() if operator in BETWEEN_ACTIVATIONS) / 2


def layer_latency(sparse: nn.Module, image: torch.Tensor, measurement, hardware) -> dict[str, dict]:
    """Per layer on its own input: median ms of the dense product and of the kernel, its input's zeros, and the break-even.

    Raises ArithmeticError where the kernel differs from the dense product.
    """
    seen, dtype = {}, next(sparse.parameters()).dtype
    layers = {n: m for n, m in sparse.named_modules() if is_product(m)}
    hooks = [m.register_forward_hook(lambda _, a, y, n=n: seen.__setitem__(n, a[0])) for n, m in layers.items()]
    with torch.no_grad():
        quality.logits(sparse, image)
    for hook in hooks:
        hook.remove()
    rows = {}
    for name, layer in layers.items():
        x = seen[name].detach()
        rows[name] = {"input_zeros": zeros_of(x)}
        problem = unsupported(layer, hardware)
        if problem or (x.dim() == 3 and isinstance(layer, nn.Linear)):
            rows[name]["unsupported"] = problem or "it takes one row per image"
            continue
        fast = MapSparse(layer, hardware.kernel_name)
        with torch.no_grad():
            wanted = reference(layer, x)
            error = float((fast(x) - wanted).norm() / (wanted.norm() + 1e-30))
        check.check_parity({name: error}, dtype)
        rows[name] |= layer_times(layer, fast, x, measurement, hardware) | {"parity_relative_error": error}
    return rows


def layer_times(layer: nn.Module, fast: MapSparse, x: torch.Tensor, measurement, hardware) -> dict:
    """Times of one layer on its input x, and of the kernel on inputs with fewer zeros for the break-even."""

    def call(module, value):
        def run(_):
            with torch.no_grad():
                module(value)

        return clock.Contender(run)

    inputs = [x, *(thinned(x, share) for share in latency.SHARES)]
    contenders = [call(layer, x), *(call(fast, value) for value in inputs)]
    (dense, *times), _ = clock.interleaved(contenders, measurement.warmup, measurement.samples, hardware.torch_device)
    curve = {zeros_of(value): samples for value, samples in zip(inputs, times, strict=True)}
    return {
        "dense_ms": clock.summary(dense)["median_ms"],
        "sparse_ms": clock.summary(times[0])["median_ms"],
        **clock.speedup(dense, times[0]),
        "break_even": clock.break_even(dense, curve),
    }


def zeros_of(x: torch.Tensor) -> float:
    return float((x == 0).float().mean())


def thinned(x: torch.Tensor, share: float) -> torch.Tensor:
    """x of which only this share of the zeros are left; the others are 0.1."""
    generator = torch.Generator(x.device).manual_seed(0)
    stay = torch.rand(x.shape, generator=generator, device=x.device) < share
    return torch.where((x == 0) & ~stay, 0.1, x)
