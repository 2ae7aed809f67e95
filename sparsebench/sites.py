"""Where a transformer can be sparse: finds the blocks and which linear map of a block is q, k, v, o, gate, up, down.

Structure decides, not the model's name: the attribute paths of a block's linear maps are matched with the layouts
below, one of attention and one of an FFN or of experts, and their shapes must agree with the roles. Blocks of one model
may differ (a dense layer before layers of experts). An unknown layout is an error that lists what was found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

# What an error names; docs/families.md lists what was tried.
FAMILIES = (
    "Llama, Mistral, Qwen2, Qwen3, Gemma", "Phi-1, Phi-2", "Phi-3, Phi-4", "GLM", "StarCoder2", "Nemotron, Arcee, Apertus",
    "GPT-2", "GPT-Neo", "GPT-J", "CodeGen", "OPT", "GPT-NeoX, Pythia", "Falcon, BLOOM", "Persimmon", "MPT", "Gemma-3n, Gemma-4",
    "Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE", "GPT-OSS", "DeepSeek", "ViT", "BERT, RoBERTa", "DistilBERT",
)  # fmt: skip


def under(prefix: str, **paths: str) -> dict[str, str]:
    """role -> path inside one block, all of them below `prefix`."""
    return {role: f"{prefix}.{path}" for role, path in paths.items()}


# role -> path inside one block. Fused maps have a role of their own: qkv, gate_up. Of two layouts that fit, the larger counts.
ATTENTIONS = (
    under("self_attn", q="q_proj", k="k_proj", v="v_proj", o="o_proj"),
    under("self_attn", q="q_proj", k="k_proj", v="v_proj", o="dense"),
    under("self_attn", q="q_proj", k="k_proj", v="v_proj", o="out_proj"),
    under("self_attn", q="q_proj", k="k_proj", o="o_proj"),  # Gemma-4, values are keys
    under("self_attn", q="q_proj", o="o_proj"),  # Gemma-3n, Gemma-4: keys and values of an earlier layer
    under("self_attn", qkv="qkv_proj", o="o_proj"),
    under("self_attn", qkv="query_key_value", o="dense"),
    under("self_attn", q_a="q_a_proj", kv_a="kv_a_proj_with_mqa", q_b="q_b_proj", kv_b="kv_b_proj", o="o_proj"),
    under("self_attn", q="q_proj", kv_a="kv_a_proj_with_mqa", kv_b="kv_b_proj", o="o_proj"),
    under("self_attention", qkv="query_key_value", o="dense"),
    under("attn", q="q_proj", k="k_proj", v="v_proj", o="out_proj"),
    under("attn", qkv="qkv_proj", o="out_proj"),
    under("attn", qkv="c_attn", o="c_proj"),
    under("attn", qkv="Wqkv", o="out_proj"),
    under("attn.attention", q="q_proj", k="k_proj", v="v_proj", o="out_proj"),
    under("attention", qkv="query_key_value", o="dense"),
    under("attention", q="q_proj", k="k_proj", v="v_proj", o="o_proj"),
    under("attention", q="self.query", k="self.key", v="self.value", o="output.dense"),
    under("attention", q="q_lin", k="k_lin", v="v_lin", o="out_lin"),
    under("multi_head_attention", q="Wq", k="Wk", v="Wv", o="dense"),
)
FFNS = (
    under("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    under("mlp", gate_up="gate_up_proj", down="down_proj"),
    under("mlp", gate="gate", up="up"),  # gate_sparse.py, which holds the weight of down itself
    under("mlp", fc1="fc1", fc2="fc2"),
    under("mlp", fc1="c_fc", fc2="c_proj"),
    under("mlp", fc1="up_proj", fc2="down_proj"),
    under("mlp", fc1="fc_in", fc2="fc_out"),
    under("mlp", fc1="dense_h_to_4h", fc2="dense_4h_to_h"),
    under("ffn", fc1="up_proj", fc2="down_proj"),
    under("ffn", fc1="lin1", fc2="lin2"),
    under("ffn", fc1="0", fc2="2"),
    {"fc1": "fc1", "fc2": "fc2"},
    {"fc1": "intermediate.dense", "fc2": "output.dense"},
)
# Maps that may stand beside these and stay dense, and how often a token passes each.
BESIDE = {
    "altup.correction_coefs": 1, "altup.prediction_coefs": 1, "altup.modality_router": 2, "laurel.linear_left": 1,
    "laurel.linear_right": 1, "per_layer_input_gate": 1, "per_layer_projection": 1,  # Gemma-3n, Gemma-4
    "mlp.shared_expert_gate": 1, "self_attn.gate_proj": 1,  # Qwen2-MoE, AFMoE
}  # fmt: skip
STAYS_DENSE = ("kv_b",)  # it reads the cached latents of every position at every step: no map of one token
SHARED = ("shared_expert", "shared_experts", "shared_mlp")  # an ordinary FFN beside experts, below any module

# Roles that read the same tensor share one group; TEAL's four distributions per block.
GROUP_OF = {
    "q": "attn_in", "k": "attn_in", "v": "attn_in", "qkv": "attn_in", "q_a": "attn_in", "kv_a": "attn_in", "q_b": "q_latent",
    "kv_b": "kv_latent", "o": "attn_out", "gate": "mlp_in", "up": "mlp_in", "gate_up": "mlp_in", "fc1": "mlp_in",
    "down": "mlp_mid", "fc2": "mlp_mid", "shared.gate": "shared_in", "shared.up": "shared_in", "shared.down": "shared_mid",
}  # fmt: skip


class LinearMap:
    """Says that a module stands in the place of a linear map: it has `weight` [m, n] and `bias`."""


class ExpertMaps:
    """Says that a module stands in the place of fused experts: it has `num_experts`, `hidden` D and `inner` I."""

    num_experts: int
    hidden: int
    inner: int


@dataclass(frozen=True)
class Site:
    """One linear map inside a block."""

    layer: int
    role: str
    path: str  # inside the whole model
    calls: int = 1  # how often one token passes it

    @property
    def name(self) -> str:
        """The name used in records, e.g. `3.gate`."""
        return f"{self.layer}.{self.role}"

    @property
    def group(self) -> str:
        """Which of the block's tensors feeds it: attn_in, attn_out, mlp_in, mlp_mid or one of a layout of its own."""
        return GROUP_OF[self.role]


@dataclass(frozen=True)
class Experts:
    """The experts of one block, all in one module: E gated FFNs of D inputs and I neurons, of which a token runs k."""

    layer: int
    path: str  # of the module that holds the fused tensors
    router: str | None  # path of the module that scores experts
    num_experts: int
    per_token: int
    hidden: int
    inner: int
    element_size: int

    @property
    def sites(self) -> dict[str, str]:
        """Record names of the three maps: fused or not in memory, they are counted apart."""
        return {role: f"{self.layer}.experts.{role}" for role in ("gate", "up", "down")}

    @property
    def active(self) -> int:
        """Parameters of one of the three maps that a token passes: k D I."""
        return self.per_token * self.hidden * self.inner

    @property
    def stored(self) -> int:
        """Parameters of one of the three maps: E D I."""
        return self.num_experts * self.hidden * self.inner


@dataclass(frozen=True)
class Block:
    """One decoder or encoder layer: its sites, its experts where it has some, and the maps that no method touches."""

    index: int
    path: str
    sites: dict[str, Site]  # by role
    others: dict[str, Site] = field(default_factory=dict)  # routers and the like, by role
    experts: Experts | None = None


def is_linear(module: nn.Module) -> bool:
    """A linear map, or a sparse module that stands in the place of one."""
    return isinstance(module, (nn.Linear, Conv1D, LinearMap))


def shape(module: nn.Module) -> tuple[int, int]:
    """(out features m, in features n) of a linear map, whichever way round its weight is stored."""
    rows, columns = stored_shape(module)
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def stored_shape(module: nn.Module) -> tuple[int, int]:
    """The shape of a map's weight as its module has it; a map that says it need not be unpacked for that."""
    return getattr(module, "shape", None) or tuple(module.weight.shape)


def stored_bytes(module: nn.Module) -> int:
    """Bytes of a map's weight: of a quantised one what is stored, scales and zero points included."""
    packed = getattr(module, "packed", None)
    return module.weight.numel() * module.weight.element_size() if packed is None else packed.bytes


def exact_weight(module: nn.Module) -> torch.Tensor:
    """The weight [m, n] of a map in float32, of a quantised one before it is rounded to the activations' dtype."""
    packed = getattr(module, "packed", None)
    return weight_of(module).float() if packed is None else packed.dequantised(torch.float32)


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight of a linear map as [m, n], a view whichever way round it is stored.

    A frozen one is the parameter itself, which stays right where its content is turned (modules/storage.py).
    """
    if isinstance(module, Conv1D):
        return module.weight.data.t()
    return module.weight.data if module.weight.requires_grad else module.weight


def find_blocks(model: nn.Module) -> list[Block]:
    """The model's blocks in order. Raises ValueError where no list of blocks with known layouts is found."""
    nearest: tuple[int, str, nn.Module] | None = None  # blocks that fit, the first that does not
    config = getattr(model, "config", None)
    for name, stack in model.named_modules():
        if not isinstance(stack, nn.ModuleList) or not len(stack):
            continue
        blocks = [block_of(module, i, f"{name}.{i}", config) for i, module in enumerate(stack)]
        known = [b for b in blocks if b is not None]
        if len(known) == len(blocks):
            return known
        first = blocks.index(None)
        linears = any(is_linear(m) for m in stack[first].modules())
        if linears and (nearest is None or len(known) > nearest[0]):
            nearest = (len(known), f"{name}.{first}", stack[first])
    raise ValueError(unknown(nearest))


def unknown(nearest: tuple[int, str, nn.Module] | None) -> str:
    """What a model without known blocks is told: the block that does not fit, its linear maps, the families known."""
    known = f"known families: {'; '.join(FAMILIES)}, and what has their structure"
    if nearest is None:
        return f"model: blocks of an unknown structure, no list of blocks with linear maps was found; {known}"
    count, path, block = nearest
    linears = ", ".join(sorted(n for n, m in block.named_modules() if is_linear(m)))
    beside = f" ({count} other blocks are of a known one)" if count else ""
    return f"model: {path} is a block of an unknown structure{beside}; its linear maps: {linears}; {known}"


def block_of(module: nn.Module, index: int, path: str, config: Any) -> Block | None:
    """One block by its structure, or None: every linear map of it must have a role, and its shape must agree with it."""
    linears = {n: m for n, m in module.named_modules() if is_linear(m)}
    attention, ffn = largest(ATTENTIONS, linears), largest(FFNS, linears)
    experts, router = experts_of(module, index, path, config)
    layout = attention | ffn | (shared_layout(linears) if experts else {})
    rest = set(linears) - set(layout.values()) - {router}
    if not attention or not (ffn or experts) or rest - set(BESIDE):
        return None
    if not agree({role: shape(linears[p]) for role, p in layout.items()}):
        return None
    others = {p.rpartition(".")[2]: Site(index, p.rpartition(".")[2], f"{path}.{p}", BESIDE[p]) for p in sorted(rest)}
    if router is not None:
        others["router"] = Site(index, "router", f"{path}.{router}")
    sites = {role: Site(index, role, f"{path}.{p}") for role, p in layout.items()}
    others |= {role: sites.pop(role) for role in STAYS_DENSE if role in sites}
    return Block(index, path, sites, others, experts)


def largest(layouts: tuple[dict[str, str], ...], linears: dict[str, nn.Module]) -> dict[str, str]:
    """The layout with most maps of which all are there; {} where none is."""
    return max((x for x in layouts if set(x.values()) <= set(linears)), key=len, default={})


def shared_layout(linears: dict[str, nn.Module]) -> dict[str, str]:
    """The FFN that every token passes beside its experts, by role; {} where there is none."""
    for path in linears:
        parent, _, name = path.rpartition(".")
        if name == "gate_proj" and parent.rpartition(".")[2] in SHARED:
            return {f"shared.{role}": f"{parent}.{role}_proj" for role in ("gate", "up", "down")}
    return {}


def agree(size: dict[str, tuple[int, int]]) -> bool:
    """Whether the shapes (m, n) of a block's maps agree with their roles."""
    for prefix in ("", "shared."):
        up = next((size[prefix + r] for r in ("up", "fc1") if prefix + r in size), None)
        down = next((size[prefix + r] for r in ("down", "fc2") if prefix + r in size), None)
        if f"{prefix}gate" in size and size[f"{prefix}gate"] != up:
            return False
        if f"{prefix}gate_up" in size:
            up = (size["gate_up"][0] // 2, size["gate_up"][1])
        if down is not None and up != down[::-1]:
            return False
    readers = [size[r][1] for r in size if GROUP_OF[r] in ("attn_in", "mlp_in", "shared_in")]
    writers = [size[r][0] for r in size if GROUP_OF[r] in ("attn_out", "mlp_mid", "shared_mid")]
    return len({*readers, *writers}) == 1  # all read from and write to the residual stream


# ---------------------------------------------------------------------------------------------------------------------
# Experts, which transformers keep in tensors of three dimensions

SAYS = ("is_transposed", "is_concatenated", "has_bias", "has_gate")  # how a module says that its tensors lie


def experts_of(module: nn.Module, index: int, path: str, config: Any) -> tuple[Experts | None, str | None]:
    """(the experts of a block, the path of their router inside it), or (None, None) where it has none.

    Raises ValueError where tensors of experts are there but can't be read.
    """
    for name, part in module.named_modules():
        if not holds_experts(part):
            continue
        count, hidden, inner = expert_sizes(part, f"{path}.{name}")
        router = router_of(module, count, hidden)
        holders = [module.get_submodule(p) for p in (router, name.rpartition(".")[0], name) if p is not None]
        given = [getattr(m, "top_k", None) for m in holders]
        given += [getattr(config, key, None) for key in ("num_experts_per_tok", "top_k_experts", "moe_topk")]
        per_token = next((k for k in given if isinstance(k, int) and k > 0), None)
        if per_token is None:
            raise ValueError(f"model: {path}.{name} holds experts, and nothing says how many of them a token runs")
        element = next(part.parameters()).element_size()
        router_path = None if router is None else f"{path}.{router}"
        experts = Experts(index, f"{path}.{name}", router_path, count, per_token, hidden, inner, element)
        return experts, router
    return None, None


def holds_experts(part: nn.Module) -> bool:
    """Whether a module itself holds tensors of experts; a `weight` of three dimensions is a convolution's."""
    fused = any(p.dim() == 3 and n != "weight" for n, p in part.named_parameters(recurse=False))
    return isinstance(part, ExpertMaps) or (fused and hasattr(part, "down_proj"))


def expert_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that hold a model's experts, with their paths, in order; those inside another are left out."""
    return [(n, m) for n, m in model.named_modules() if holds_experts(m)]


def expert_sizes(part: nn.Module, path: str) -> tuple[int, int, int]:
    """(E, D, I) of fused experts. Raises ValueError, with what was found, where they are of another form."""
    if isinstance(part, ExpertMaps):
        return part.num_experts, part.hidden, part.inner
    tensors = {n: tuple(p.shape) for n, p in part.named_parameters(recurse=False)}
    listed = ", ".join(f"{n} {list(s)}" for n, s in tensors.items())
    says = {n: getattr(part, n, None) for n in SAYS}
    wanted = (
        f"model: {path} must hold gated experts as gate_up_proj and down_proj of one size, and say by {', '.join(SAYS)}"
    )
    gate_up, down = tensors.get("gate_up_proj", ()), tensors.get("down_proj", ())
    if None in says.values() or not says["has_gate"] or getattr(part, "has_post_expert_norm", False):
        raise ValueError(f"{wanted} how they lie, got {listed} and {says}")
    count, hidden, inner = (*gate_up[:1], *(down[:0:-1] if says["is_transposed"] else down[1:]))
    wide = (hidden, 2 * inner) if says["is_transposed"] else (2 * inner, hidden)
    if gate_up[1:] != wide or down[0] != count or says["has_bias"] != ("down_proj_bias" in tensors):
        raise ValueError(f"{wanted} how they lie, got {listed} and {says}")
    return count, hidden, inner


def router_of(block: nn.Module, count: int, hidden: int) -> str | None:
    """The path of the module with a weight [E, D] that scores experts; None where nothing is scored (hashing)."""
    for name, part in block.named_modules():
        weight = getattr(part, "weight", None)
        scores = isinstance(weight, torch.Tensor) and tuple(weight.shape) == (count, hidden)
        if scores and {"gate", "router"} & set(name.split(".")):
            return name
    return None


def attention_layout(module: nn.Module) -> dict[str, nn.Module]:
    """The attention maps of a block by role, whatever a method made of its FFN; {} where they are not known."""
    linears = {n: m for n, m in module.named_modules() if is_linear(m)}
    return {role: linears[path] for role, path in largest(ATTENTIONS, linears).items()}


def sites(model: nn.Module) -> Iterator[Site]:
    for block in find_blocks(model):
        yield from block.sites.values()
