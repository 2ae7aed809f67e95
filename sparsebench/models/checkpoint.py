"""Load a checkpoint of transformers whole, or refuse it by the name of the tensor that is missing, extra or misshapen."""

from __future__ import annotations

import re
from typing import Any

import transformers
from torch import nn

from sparsebench.sites import find_blocks

# Tensors of older checkpoints that are computed, not learned: rotary frequencies, position numbers, causal masks.
COMPUTED = re.compile(r"(rotary_emb\.inv_freq|position_ids|masked_bias|attn\.bias)$")


def load_whole(auto: Any, location: str, num_layers: int | None = None, new_head: bool = False, **options) -> nn.Module:
    """`auto.from_pretrained(location, **options)` with every weight of the model from the checkpoint.

    auto: one of transformers' AutoModel classes. num_layers: the depth a model was cut to, which explains weights of
    later blocks. new_head: what lies outside the body (`base_model`) is new, a head of the checkpoint is left out.

    Raises ValueError naming a weight that is missing (tied ones are not), not expected or of another shape.
    """
    # without ignore_mismatched_sizes transformers raises an error of many lines of its own; its report says less than we do
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        module, loading = auto.from_pretrained(
            location, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    finally:
        transformers.logging.set_verbosity(verbosity)
    wrong = [
        f"{name} has shape {list(there)} in the checkpoint, the model {list(here)}"
        for name, there, here in sorted(loading["mismatched_keys"])
    ]
    wrong += [f"{n} is missing" for n in sorted(loading["missing_keys"]) if not (new_head and outside(n, module))]
    extra = [n for n in sorted(loading["unexpected_keys"]) if not explained(n, module, num_layers)]
    extra = [n for n in extra if not (new_head and outside(n, module))]
    wrong += [f"{name} is in the checkpoint but not in the model" for name in extra]
    wrong += [str(line).splitlines()[0] for line in loading.get("error_msgs") or []]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"model.path={location} is not a whole {type(module).__name__}: {wrong[0]}{more}")
    return module


def outside(name: str, module: nn.Module) -> bool:
    """Whether a tensor lies outside a model's body, whose names may or may not begin with the body's own. A pooler is part
    of the head: it is trained with it."""
    first = name.removeprefix(f"{module.base_model_prefix}.").partition(".")[0]
    return first == "pooler" or first not in dict(module.base_model.named_children())


def explained(name: str, module: nn.Module, num_layers: int | None) -> bool:
    """Whether a tensor that the model has no place for does no harm: computed, or of a block that was cut off."""
    if COMPUTED.search(name) or name in dict(module.named_buffers()):
        return True
    if num_layers is None:
        return False
    stack = find_blocks(module)[0].path.rsplit(".", 2)[-2]
    block = re.search(rf"(?:^|\.){re.escape(stack)}\.(\d+)\.", name)
    return block is not None and int(block.group(1)) >= num_layers
