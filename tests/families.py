"""Tiny random causal LMs of many families of transformers, and which of them have blocks that a method can sparsify."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
import transformers

from sparsebench.engines import check
from sparsebench.measure import neutral
from sparsebench.models import Loaded
from sparsebench.modules import rotated_norm
from sparsebench.modules.base import SparseModule
from sparsebench.modules.gate_sparse import GateSparseFFN
from sparsebench.sites import find_blocks, weight_of
from tests.helpers import Rows, built, logits, work

# Each field is set where a family's configuration has it.
SMALL = {
    "vocab_size": 320, "hidden_size": 64, "n_embd": 64, "d_model": 64, "word_embed_proj_dim": 64, "intermediate_size": 160,
    "ffn_dim": 160, "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "num_attention_heads": 4, "n_head": 4,
    "attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    "max_position_embeddings": 128, "n_positions": 128, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "moe_intermediate_size": 32, "num_experts_per_tok": 2,
}  # fmt: skip
DENSE = (
    "apertus", "arcee", "biogpt", "bitnet", "bloom", "codegen", "cohere", "cohere2", "ctrl", "cwm", "diffllama", "ernie4_5",
    "exaone", "exaone4", "falcon", "flint", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "glm", "glm4",
    "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_neox_japanese", "gptj", "granite", "granite_swa", "helium",
    "hunyuan_v1_dense", "hyperclovax", "internlm3", "iquestcoder", "jais2", "llama", "ministral", "ministral3", "mistral", "mpt",
    "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "openai-gpt", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen3",
    "seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma", "xglm",
)  # fmt: skip
MIXTURES = ("afmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
KNOWN = (*DENSE, *MIXTURES)
UNKNOWN = ("doge", "lfm2")
PLAIN = {k: SMALL[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "bos_token_id",
                               "eos_token_id", "pad_token_id", "max_position_embeddings")}  # fmt: skip
GEMMA = {**PLAIN, "intermediate_size": 160, "num_key_value_heads": 2, "num_hidden_layers": 4, "sliding_window": 8,
         "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2, "head_dim": 16,
         "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 320}  # fmt: skip
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12,
          "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4, "head_dim": 8}  # fmt: skip
# What a family's configuration needs beside or instead of SMALL; `only` leaves SMALL out.
SPECIAL = {
    "falcon": {"only": True, **PLAIN, "ffn_hidden_size": 160},
    "gpt_neo": {"only": True, **PLAIN, "attention_types": [[["global", "local"], 1]], "intermediate_size": 160},
    "gemma3n_text": {"only": True, **GEMMA, "laurel_rank": 4, "altup_num_inputs": 2,
                     "activation_sparsity_pattern": [0.9, 0.0, 0.9, 0.0]},
    "gemma4_text": {"only": True, **GEMMA, "global_head_dim": 32, "use_double_wide_mlp": True},
    "codegen": {"rotary_dim": 8}, "gptj": {"rotary_dim": 8}, "ctrl": {"dff": 160}, "deepseek_v2": LATENT, "deepseek_v3": LATENT,
    "qwen2_moe": {"shared_expert_intermediate_size": 48}, "afmoe": {"num_dense_layers": 1},
}  # fmt: skip


def family(kind: str, scale: float = 3.0, seed: int = 0, **changes):
    """A small random model of a family, float32, eval mode, frozen.

    scale: of the weights against the default initialisation, so that channels differ; norms get weights of 0.5 to 1.5,
    so that folding them or leaving them out matters.
    """
    cls = type(transformers.AutoConfig.for_model(kind))
    special = dict(SPECIAL.get(kind, {}))
    fields = {} if special.pop("only", False) else {k: v for k, v in SMALL.items() if hasattr(cls(), k)}
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(cls(**{**fields, **special, **changes}), dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# What a method must do with a family: its model or a refusal in one line

METHODS = {  # the training-free methods and the probes; sparsity of inputs or neurons
    "teal": (), "teal_rotated": (), "wina": (), "wina_plain": (), "larosa": (), "rsparse": (), "cats": (), "duogpt": (),
    "topk": ("method.train=null", "method.activation=null", "method.keep=0.5", "method.probe_sequences=4"),
    "topp": ("method.p=0.8",),
    "wisparse": ("method.allocation=uniform", "method.alpha=[0.5]", "method.ladder=false"),
    "qsparse": ("method.train=null", "method.activation=null", "method.probe_sequences=4"),
}  # fmt: skip
CALIBRATED = ("topp", "wisparse", "teal", "teal_rotated", "wina", "wina_plain", "larosa", "rsparse", "cats", "duogpt")
ROWS = torch.randint(1, 320, (12, 16), generator=torch.Generator().manual_seed(11))


class Windows:
    """Random windows as fit, dev and test."""

    kind = "language"
    fit = dev = test = Rows(ROWS)


@functools.cache
def method_of(name: str):
    given = [*METHODS[name], *(["method.calibration_tokens=64", "method.prompt=all"] if name in CALIBRATED else [])]
    return built("method", f"method={name}", *given)


def outcome(kind: str, name: str, folder) -> str:
    """`equal` where the method fits the family, else its refusal in one line.

    Equal means: with nothing dropped the model's logits are the dense ones, and at its operating point they are those
    of `reference`. Raises AssertionError where either is not so.
    """
    method = method_of(name)
    model = family(kind)
    inputs, expected = neutral.probe(model, Windows)
    try:
        method.check_model(model)
        state = method.fit(Loaded(model, None, {}), Windows, work(folder))
        sparse = method.apply(family(kind), state, work(folder))
        neutral.check(method, sparse, inputs, expected)
    except ValueError as error:
        assert "\n" not in str(error), f"{kind}, {name}: more than one line: {error}"
        return str(error)
    actual, wanted = logits(sparse, ROWS[:4]), reference(family(kind), sparse, state, ROWS[:4])
    assert check.distance(*(x.flatten(0, 1) for x in (actual, logits(family(kind), ROWS[:4])))) > 1e-3, (
        "nothing was dropped"
    )
    # most tokens: one channel whose rank is decided by rounding moves its token's logits and those of later tokens
    error = float(((actual - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median())
    assert error < 1e-4, f"{kind}, {name}: logits differ from masked inputs of the dense model by {error:.2g}"
    return "equal"


def reference(dense, sparse, state, rows) -> torch.Tensor:
    """Logits of the dense model whose maps' inputs lose what the sparse model's rules say, by hooks alone."""
    modules = {m.site: m for m in sparse.modules() if isinstance(m, SparseModule)}
    hooks = []
    for block in find_blocks(dense):
        for site in block.sites.values():
            linear = dense.get_submodule(site.path)
            if f"weight.{site.name}" in state.tensors:
                weight_of(linear).copy_(state.tensors[f"weight.{site.name}"])
            if site.name in modules:
                hooks += hooked_map(linear, modules[site.name], *basis_of(dense, block, site, state))
        for prefix in ("", "shared."):
            if f"{block.index}.{prefix}ffn" in modules:
                hooks += hooked_ffn(dense, block, modules[f"{block.index}.{prefix}ffn"], prefix)
        if block.experts:
            own = dense.get_submodule(block.experts.path)
            own.forward = functools.partial(by_pair, own, modules, block.index)
    try:
        return logits(dense, rows)
    finally:
        for hook in hooks:
            hook.remove()


def by_pair(own, modules, layer, hidden, index, weights):
    """Experts of transformers token by token and expert by expert, with what the rules drop set to 0."""
    into, mid, gate = (modules.get(f"{layer}.experts{part}") for part in (".gate", ".down", ""))

    def of(rule, e):  # what kept_entries reads, of one expert
        scale = None if rule.scale is None else rule.scale[e]
        limit = rule.threshold[e] if rule.threshold.dim() else rule.threshold
        return SimpleNamespace(scale=scale, threshold=limit, top_k=rule.top_k if limit >= 0 else None)

    out = torch.zeros_like(hidden)
    for t, row in enumerate(hidden):
        for e, weight in zip(index[t].tolist(), weights[t], strict=True):
            first, last = own.gate_up_proj[e], own.down_proj[e]
            first, last = (first.T, last.T) if own.is_transposed else (first, last)
            x = row if into is None else torch.where(kept_entries(row, of(into, e)), row, 0)
            z = first @ x + (own.gate_up_proj_bias[e] if own.has_bias else 0)
            g, u = (z[: len(z) // 2], z[len(z) // 2 :]) if own.is_concatenated else (z[::2], z[1::2])
            if hasattr(own, "alpha"):
                g = g.clamp(max=own.limit)
                g, u = g * torch.sigmoid(own.alpha * g), u.clamp(-own.limit, own.limit) + 1
            else:
                g = own.act_fn(g)
            if gate is not None:
                limit = gate.threshold[e] if gate.threshold.dim() else gate.threshold
                g = torch.where(g.abs() >= limit, g, 0)
            m = g * u
            m = m if mid is None else torch.where(kept_entries(m, of(mid, e)), m, 0)
            out[t] += weight * (last @ m + (own.down_proj_bias[e] if own.has_bias else 0))
    return out


def basis_of(dense, block, site, state):
    """(Q, norm weight) of a rotated input, or (None, None)."""
    name = f"basis.{block.index}.{site.group}"
    if name not in state.tensors:
        return None, None
    norm = dense.get_submodule(rotated_norm.norms(dense, block)[site.group])
    one = 1 if "Gemma" in type(norm).__name__ else 0  # Gemma's norms scale by 1 + weight
    return state.tensors[name].double(), norm.weight.double() + one


def kept_entries(x, rule):
    """bool, the shape of x [..., n]: the top k, or what is above the threshold."""
    score = x.abs() if getattr(rule, "scale", None) is None else x.abs() * rule.scale
    if hasattr(rule, "count"):  # the lowest index wins a tie, and with one value head heads tie at a text's first token
        order = score.argsort(dim=-1, descending=True, stable=True)[..., : rule.count]
        return torch.zeros_like(score).scatter(-1, order, 1).bool()
    if hasattr(rule, "selection"):  # entry by entry, the largest first, until they hold the share
        ordered, order = score.double().sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        return torch.zeros_like(score).scatter(-1, order, (before < 0.8 * ordered.sum(-1, keepdim=True)).float()).bool()
    count = rule.top_k
    if count is None:
        return score > rule.threshold
    return torch.zeros_like(score).scatter(-1, score.topk(count, -1).indices, 1).bool()


def hooked_map(linear, rule, basis, gain):
    """Zero the dropped inputs of one map, in the basis where they were chosen; what a low rank puts back is added."""
    dropped = []

    def mask(_, args):
        x = args[0].double()
        z = x if basis is None else (x / gain) @ basis
        kept = torch.where(kept_entries(z.float(), rule), z, 0)
        y = kept if basis is None else kept @ basis.T * gain
        dropped[:] = [(x - y).float()]
        return (y.float(),)

    def remainder(_, args, output):
        a, b = rule.low_rank
        return output + dropped[0] @ a @ b

    hooks = [linear.register_forward_pre_hook(mask)]
    return hooks + ([linear.register_forward_hook(remainder)] if getattr(rule, "low_rank", None) is not None else [])


def hooked_ffn(dense, block, rule, prefix=""):
    """Zero the neurons whose activation is dropped: small gates (CATS), all but the k largest (top-k)."""
    gated = f"{prefix}gate" in block.sites
    first = dense.get_submodule(block.sites[f"{prefix}gate" if gated else "fc1"].path)
    last_path = block.sites[f"{prefix}down" if gated else "fc2"].path
    last, own = dense.get_submodule(last_path), dense.get_submodule(last_path.rpartition(".")[0])
    act = next(m for n, m in own.named_children() if n in ("act", "act_fn", "activation_fn"))
    seen = []

    def mask(_, args):
        a = act(own._gaussian_topk(seen[0]) if getattr(own, "activation_sparsity", 0) else seen[0])
        if isinstance(rule, GateSparseFFN):
            keep = a.abs() >= rule.threshold
        else:
            keep = torch.zeros_like(a).scatter(-1, a.topk(rule.activation.count, -1).indices, 1).bool()
        return (torch.where(keep, args[0], 0),)

    return [first.register_forward_hook(lambda _, args, z: seen.__setitem__(slice(None), [z])),
            last.register_forward_pre_hook(mask)]  # fmt: skip
