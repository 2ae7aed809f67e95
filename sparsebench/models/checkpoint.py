"""Load a checkpoint of transformers whole, or refuse it by the name of the tensor that is missing, extra or misshapen."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from sparsebench.sites import find_blocks

# Tensors of older checkpoints that are computed, not learned: rotary frequencies, position numbers, causal masks.
COMPUTED = re.compile(r"(rotary_emb\.inv_freq|position_ids|masked_bias|attn\.bias)$")


def load_whole(auto: Any, location: str, num_layers: int | None = None, **options) -> nn.Module:
    """`auto.from_pretrained(location, **options)` with every weight of the model from the checkpoint.

    auto: one of transformers' AutoModel classes. num_layers: the depth a model was cut to, which explains weights of
    later blocks. Raises ValueError naming a weight that is missing (tied ones are not), not expected or of another shape.
    """
    # without ignore_mismatched_sizes transformers raises an error of many lines of its own
    module, loading = auto.from_pretrained(location, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    wrong = [
        f"{name} has shape {list(there)} in the checkpoint, the model {list(here)}"
        for name, there, here in sorted(loading["mismatched_keys"])
    ]
    wrong += [f"{name} is missing" for name in sorted(loading["missing_keys"])]
    extra = [n for n in sorted(loading["unexpected_keys"]) if not explained(n, module, num_layers)]
    wrong += [f"{name} is in the checkpoint but not in the model" for name in extra]
    wrong += [str(line).splitlines()[0] for line in loading.get("error_msgs") or []]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"model.path={location} is not a whole {type(module).__name__}: {wrong[0]}{more}")
    return module


def explained(name: str, module: nn.Module, num_layers: int | None) -> bool:
    """Whether a tensor that the model has no place for does no harm: computed, or of a block that was cut off."""
    if COMPUTED.search(name) or name in dict(module.named_buffers()):
        return True
    if num_layers is None:
        return False
    stack = find_blocks(module)[0].path.rsplit(".", 2)[-2]
    block = re.search(rf"(?:^|\.){re.escape(stack)}\.(\d+)\.", name)
    return block is not None and int(block.group(1)) >= num_layers
