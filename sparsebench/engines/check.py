"""Is the step that will be timed the model? An engine's own logits against the model's, before it is used.

Whether a fused step fits a model is guessed from names and shapes (`llama_type`); what it computes is not guessed. Three
comparisons, over several tokens of decode with a cache: eager decode against whole forward passes without a cache, the
engine against eager decode with nothing dropped, and the same at the model's own thresholds.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sparsebench import engines
from sparsebench.modules.base import measured_modules, sparse_modules
from sparsebench.modules.input_sparse import replace
from sparsebench.sites import find_blocks

log = logging.getLogger(__name__)

KERNEL_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}  # relative, per kernel, same input
# Largest relative error of logits with nothing dropped: what rounding in another order may do.
DENSE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# The same at thresholds: a channel within rounding of its threshold may fall on its other side, which moves a token's
# logits by about the share of that channel; in 16 bits this happens at every token, and some models make it grow from
# layer to layer. So an engine may differ by this, or by FLOOR times what the model itself differs by when its inputs
# are moved by one rounding. A wrong rule is found above both.
SPARSE_TOLERANCE = {torch.float32: 5e-2, torch.float16: 0.2, torch.bfloat16: 0.4}
FLOOR = 2.0


@contextmanager
def all_kept(module: nn.Module) -> Iterator[None]:
    """Every threshold at -1: the sparse kernels run but skip nothing."""
    saved = [(m, m.threshold.clone()) for _, m in measured_modules(module)]
    for sparse, _ in saved:
        sparse.threshold.fill_(-1)
    try:
        yield
    finally:
        for sparse, threshold in saved:
            sparse.threshold.copy_(threshold)


@contextmanager
def masked(module: nn.Module) -> Iterator[None]:
    """Every sparse module served by masked-dense, the meaning of every method."""
    saved = [(m, m.kernel_name) for m in sparse_modules(module)]
    for sparse, _ in saved:
        sparse.kernel_name = "masked_dense"
    try:
        yield
    finally:
        for sparse, name in saved:
            sparse.kernel_name = name


def parity(module: nn.Module, step: Callable[[], object]) -> dict[str, float]:
    """Relative error ||y - y_ref|| / ||y_ref|| of the kernel at every sparse module over one decode step.

    Each module's own input is given to its kernel and to masked-dense, so rounding near a threshold can't grow from
    layer to layer.
    """
    errors: dict[str, float] = {}

    def compare(sparse, args, output):
        chosen, sparse.kernel_name = sparse.kernel_name, "masked_dense"
        reference = type(sparse).forward(sparse, *args).float()
        sparse.kernel_name = chosen
        errors[sparse.site] = relative(output, reference)

    hooks = [m.register_forward_hook(compare) for _, m in measured_modules(module)]
    try:
        step()
    finally:
        for hook in hooks:
            hook.remove()
    return errors


def relative(output: torch.Tensor, reference: torch.Tensor) -> float:
    """||y - y_ref|| / ||y_ref||, of outputs below the dtype's smallest normal number over that number: there the last bit
    is no longer a relative one."""
    least = torch.finfo(output.dtype).smallest_normal * output.numel() ** 0.5
    return float((output.float() - reference).norm()) / max(float(reference.norm()), least)


def check_parity(errors: dict[str, float], dtype: torch.dtype) -> float:
    """The largest error. Raises ArithmeticError above the tolerance of the dtype, naming where (NaN never passes)."""
    if not errors:
        return 0.0
    worst = max(errors, key=lambda name: errors[name] if math.isfinite(errors[name]) else math.inf)
    if not errors[worst] <= KERNEL_TOLERANCE[dtype]:
        raise ArithmeticError(
            f"the sparse kernel differs from masked-dense at {worst}: {errors[worst]:.2e} > {KERNEL_TOLERANCE[dtype]:.0e}"
        )
    return errors[worst]


def distance(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest relative error over tokens of logits [K, V], each token's mean taken off (softmax doesn't see it)."""
    logits, expected = (x.float() - x.float().mean(-1, keepdim=True) for x in (logits, expected))
    if not torch.isfinite(logits).all():
        return math.inf
    expected = expected.to(logits.device)
    return float(((logits - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)).max())


def stepped(decoder: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [K, V] after each of `tokens` [K] in turn; the decoder is left at the end of its prompt."""
    decoder.rewind()
    rows = torch.stack([decoder.step(token.view(1, 1)).flatten().clone() for token in tokens])
    decoder.rewind()
    return rows


def cache_error(module: nn.Module, prompt: torch.Tensor, tokens: torch.Tensor) -> float:
    """Relative error of eager decode with a cache against whole forward passes, with nothing dropped."""
    with torch.no_grad(), masked(module), all_kept(module):
        expected = module(input_ids=torch.cat([prompt, tokens[None]], 1), use_cache=False).logits[0, -len(tokens) :]
        logits = stepped(engines.Decoder(module, prompt, len(tokens), compiled=False), tokens)
    return distance(logits, expected)


def verified(
    module: nn.Module,
    prompt: torch.Tensor,
    room: int,
    hardware: Any,
    engine: str,
    tokens: torch.Tensor,
    keep_all: bool = False,
) -> tuple[Any, dict[str, float], str | None]:
    """(decoder, relative errors against the model, why another engine than `engine` runs or None).

    Args:
        module: a causal LM, dense or with sparse modules. For a fused step its block maps are stored channel-major, in
            place; where that step is refused they are put back as they were.
        prompt: int64 [1, C] for the cache; room: tokens that may follow.
        engine: fused, compiled or eager; where it is refused, the next of these.
        tokens: int64 [K], some tokens that follow the prompt, for the comparison.
        keep_all: a decoder that skips nothing, whatever the thresholds say.

    errors: `cache` (see `cache_error`), `dense` (nothing dropped), `sparse` (at the thresholds; absent with keep_all or
    where nothing is sparse), `sparse_by_rounding` (what the model itself moves by under one rounding), `kernels` (the
    worst kernel or step against masked-dense on the same inputs).
    Raises ValueError where hardware.engine=fused is asked for and refused, ArithmeticError where eager decode itself is
    not the model or a kernel is not masked-dense.
    """
    dtype, reasons = next(module.parameters()).dtype, []
    errors = {"cache": cache_error(module, prompt, tokens)}
    if not errors["cache"] <= DENSE_TOLERANCE[dtype]:
        raise ArithmeticError(
            f"model: decode with a cache differs from the whole forward pass of {type(module).__name__} by "
            f"{errors['cache']:.2e} (relative, at most {DENSE_TOLERANCE[dtype]:.0e}), so no decode step can be timed"
        )
    expected = references(module, prompt, tokens, keep_all)
    on_gpu = hardware.torch_device.type == "cuda"
    order = [
        "fused",
        *(["compiled"] if on_gpu and (engine == "compiled" or engines.compiles(hardware)) else []),
        "eager",
    ]
    for name in order[order.index(engine) if engine in order else -1 :]:
        before = {s.path: module.get_submodule(s.path) for b in blocks_or_none(module) for s in b.sites.values()}
        try:
            if name == "fused" and (problem := engines.fused(hardware).unsupported(module)):
                raise ValueError(problem)
            decoder = engines.decoder(module, prompt, max(room, len(tokens)), hardware, name, keep_all)
            kernels = check_parity(kernel_errors(module, decoder, prompt, tokens), dtype)
            measured = compared(module, decoder, tokens, expected) | {"kernels": kernels}
            problem = over_tolerance(measured, dtype)
        except ValueError as error:  # a fused step that says it can't run this model
            problem = str(error)
        if problem is None:
            return decoder, errors | measured, "; ".join(reasons) or None
        reasons.append(f"{name}: {problem}")
        for path, linear in before.items():
            replace(module, path, linear)
        if hardware.engine == name and name == "fused":
            raise ValueError(f"hardware.engine=fused: {problem}")
        log.warning("decode: %s is not used (%s)", name, problem)
    raise ArithmeticError(f"model: no decode engine computes {type(module).__name__}: {'; '.join(reasons)}")


def blocks_or_none(module: nn.Module) -> list:
    try:
        return find_blocks(module)
    except ValueError:
        return []


def references(
    module: nn.Module, prompt: torch.Tensor, tokens: torch.Tensor, keep_all: bool
) -> dict[str, torch.Tensor]:
    """The model's logits [K, V] in eager decode with masked-dense: `dense` with nothing dropped, `sparse` as it is.

    Both follow a prompt that is as sparse as the prompt policy has it, which is what every decoder holds.
    """
    with masked(module):
        decoder = engines.Decoder(module, prompt, len(tokens), compiled=False)
        with all_kept(module):
            logits = {"dense": stepped(decoder, tokens)}
        if not keep_all and any(True for _ in measured_modules(module)):
            logits["sparse"] = stepped(decoder, tokens)
            with rounded_otherwise(module):
                logits["moved"] = stepped(decoder, tokens)
    return logits


@contextmanager
def rounded_otherwise(module: nn.Module) -> Iterator[None]:
    """The input of every sparse module off by one rounding of its dtype, up or down by chance."""
    generator = torch.Generator().manual_seed(0)

    def move(_, args):
        x = args[0]
        signs = torch.randint(0, 2, x.shape, generator=generator).to(x.device, x.dtype) * 2 - 1
        return (x * (1 + signs * torch.finfo(x.dtype).eps), *args[1:])

    hooks = [m.register_forward_pre_hook(move) for _, m in measured_modules(module)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def compared(module: nn.Module, decoder: Any, tokens: torch.Tensor, expected: dict) -> dict[str, float]:
    """The errors of one decoder, by name."""
    with all_kept(module):
        errors = {"dense": distance(stepped(decoder, tokens), expected["dense"])}
    if "sparse" in expected:
        errors["sparse"] = distance(stepped(decoder, tokens), expected["sparse"])
        errors["sparse_by_rounding"] = distance(expected["moved"], expected["sparse"])  # of the model itself
    return errors


def kernel_errors(module: nn.Module, decoder: Any, prompt: torch.Tensor, tokens: torch.Tensor) -> dict[str, float]:
    """The errors of each kernel of a step against masked-dense on the same inputs, by where it stands."""
    token = tokens[:1].view(1, 1)
    if hasattr(decoder, "parity"):
        return decoder.parity(token)
    eager = decoder if decoder.engine == "eager" else engines.Decoder(module, prompt, 1, compiled=False)
    eager.rewind()
    errors = parity(module, lambda: eager.step(token))
    eager.rewind()
    return errors


def over_tolerance(errors: dict[str, float], dtype: torch.dtype) -> str | None:
    """What is wrong with an engine's errors, in words (NaN never passes)."""
    limits = {"dense": (DENSE_TOLERANCE, "with nothing dropped"), "sparse": (SPARSE_TOLERANCE, "at its thresholds")}
    for name, (tolerance, where) in limits.items():
        most = max(tolerance[dtype], FLOOR * errors.get("sparse_by_rounding", 0.0) if name == "sparse" else 0.0)
        if name in errors and not errors[name] <= most:
            return f"its logits differ from the model's {where} by {errors[name]:.2e} (at most {most:.0e})"
    return None
