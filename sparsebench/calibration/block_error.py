"""One block of a transformer run on its own: the inputs it gets, its output under changed maps, the distance from dense."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from sparsebench.data.text import batches
from sparsebench.kernels.masked_dense import kept
from sparsebench.records.progress import shown
from sparsebench.sites import Block

# Roles whose output for a token touches the block's output for that token alone. (Keys and values reach later tokens.)
TOKENWISE = ("q", "o", "gate", "up", "gate_up", "down", "fc1", "fc2")


@contextmanager
def changed(model: nn.Module, block: Block, rules: dict[str, Callable[[torch.Tensor], torch.Tensor]]) -> Iterator[None]:
    """Replace the input x of a block's maps by rule(x), by role, while the context lasts."""
    with ExitStack() as hooks:  # a hook's handle is a context that removes it
        for role, rule in rules.items():
            hooks.enter_context(
                model.get_submodule(block.sites[role].path).register_forward_pre_hook(
                    lambda _, args, rule=rule: (rule(args[0]), *args[1:])
                )
            )
        yield


def block_inputs(model: nn.Module, blocks: list[Block], sequences: torch.Tensor, batch_size: int):
    """Hidden states entering the first block, a list of [B, T, D], and for each block the other arguments it is called with.

    All sequences have one length and no padding, so positions and masks are the same for every batch of one size;
    rows that don't fill a last batch are left out.
    """
    batch_size = min(batch_size, len(sequences))
    sequences = sequences[: len(sequences) // batch_size * batch_size]
    hidden, arguments = [], {}

    def first(_, args, kwargs):
        hidden.append(args[0] if args else kwargs["hidden_states"])

    def keep(index):
        def hook(_, args, kwargs):
            arguments[index] = (args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"})

        return hook

    hooked = [(blocks[0], first), *((block, keep(block.index)) for block in blocks)]
    with ExitStack() as hooks:
        for block, hook in hooked:
            hooks.enter_context(model.get_submodule(block.path).register_forward_pre_hook(hook, with_kwargs=True))
        for batch in shown(batches(sequences, batch_size, model), -(-len(sequences) // batch_size), "a pass over text"):
            model.base_model(input_ids=batch, use_cache=False)
    return hidden, arguments


def run_block(module: nn.Module, hidden: torch.Tensor, arguments: tuple) -> torch.Tensor:
    """A block's output hidden states (blocks of some versions return a tuple, those of OpenAI-GPT a list)."""
    positional, named = arguments
    out = module(hidden, *positional, **named)
    return out[0] if isinstance(out, (tuple, list)) else out


def common_parent(model: nn.Module, block: Block, groups: tuple[str, ...]) -> nn.Module | None:
    """The module inside a block that holds all maps of these groups, e.g. `self_attn`; None where only the block does."""
    paths = [site.path.split(".")[:-1] for site in block.sites.values() if site.group in groups]
    levels = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    parent = ".".join(names[0] for names in levels)
    return model.get_submodule(parent) if parent.startswith(f"{block.path}.") else None


def per_token(argument: object, hidden: torch.Tensor) -> bool:
    """Whether an argument of a block has a row for every token of hidden [B, T, D], so that it would have to be cut with it."""
    return (
        isinstance(argument, torch.Tensor)
        and argument.dim() >= 3
        and argument.shape[-2] == hidden.shape[1]
        and argument.shape[-1] != hidden.shape[1]
    )


class BlockError:
    """l2 distance of a block's output, with thresholds on its maps' inputs, from its dense `outputs`.

    hidden, outputs: a list of [B, T, D] per batch; only the last `tokens` of each sequence are compared.
    threshold(role, p) gives t, `scales` c by role. To call it costs less than the block: what works token by token (maps,
    the FFN, norms behind attention) is computed for the compared tokens alone (the others are 0), and what a trial leaves
    as it is on the path it starts from is kept: outputs of maps, what attention hands to its last map, the first norm's
    output. Where attention is kept the block sees no other tokens at all. Memory: those outputs (keys and values for all
    tokens) and two hidden states.
    """

    def __init__(self, model: nn.Module, block: Block, arguments, hidden, outputs, threshold, scales, tokens: int):
        self.module, self.arguments = model.get_submodule(block.path), arguments
        self.hidden, self.outputs = hidden, outputs
        self.sites, self.maps = block.sites, {r: model.get_submodule(s.path) for r, s in block.sites.items()}
        self.threshold, self.scales, self.tokens = functools.cache(threshold), scales, tokens
        self.kept: dict[tuple[int, str], tuple[tuple, torch.Tensor]] = {}
        self.runs = 0  # how often it was called: the cost of a search
        self.attention = common_parent(model, block, ("attn_in", "attn_out")) if "o" in block.sites else None
        self.ffn = common_parent(model, block, ("mlp_in", "mlp_mid"))
        self.attended: dict[int, tuple[tuple, torch.Tensor, tuple | None]] = {}  # by batch: key, input of o, the rest
        self.last_o: tuple[torch.Tensor, torch.Tensor] | None = None  # input and output of the latest call of o
        inside = set(self.maps.values())
        self.norms = [m for m in self.module.children() if not inside.intersection(m.modules())]
        self.first: dict[tuple[int, int], torch.Tensor] = {}  # by batch and norm: its output for the block's own input
        self.behind = False  # whether attention has run in the present call
        self.by_token = hidden[0].dim() == 3 and not any(
            per_token(each, hidden[0]) for each in (*arguments[0], *arguments[1].values())
        )

    def decided_by(self, role: str, sparsity: dict[str, float]) -> tuple:
        """The sparsities that a map's output depends on: its own and those of maps that read earlier tensors."""
        groups = list(dict.fromkeys(site.group for site in self.sites.values()))  # in the order of computation
        before = groups[: groups.index(self.sites[role].group)]
        return tuple(p for r, p in sparsity.items() if r == role or self.sites[r].group in before)

    def __call__(self, sparsity: dict[str, float], path: dict[str, float]) -> float:
        """The distance at a sparsity by role; `path`: those that the next calls start from."""
        self.runs += 1
        keys = {r: self.decided_by(r, sparsity) for r in self.sites}
        fixed = {r for r in self.sites if keys[r] == self.decided_by(r, path)}
        readers = [r for r, site in self.sites.items() if site.group == "attn_in"]
        attended = tuple(sparsity[r] for r in readers) if fixed.issuperset(readers) else None
        total = torch.zeros((), dtype=torch.float64, device=self.outputs[0].device)
        changed = [m for m in (*self.maps.values(), self.attention, self.ffn, *self.norms) if m is not None]
        own = {m: vars(m).get("forward") for m in changed}  # set by libraries that wrap modules
        forwards = {m: m.forward for m in changed}
        try:
            for batch, (hidden, output) in enumerate(zip(self.hidden, self.outputs, strict=True)):
                for role, module in self.maps.items():
                    place = (batch, role, keys[role] if role in fixed else None)
                    limit = self.threshold(role, sparsity[role])
                    module.forward = functools.partial(self.product, forwards[module], limit, *place)
                if self.attention is not None:
                    self.attention.forward = functools.partial(self.attend, forwards[self.attention], batch, attended)
                if self.ffn is not None:
                    self.ffn.forward = functools.partial(self.feed, forwards[self.ffn])
                for i, norm in enumerate(self.norms):
                    norm.forward = functools.partial(self.normed, forwards[norm], (batch, i), hidden)
                self.behind = False
                kept_attention = attended is not None and self.attended.get(batch, (None,))[0] == attended
                given = hidden[:, -self.tokens :] if kept_attention and self.by_token else hidden
                produced = run_block(self.module, given, self.arguments)
                difference = produced[:, -self.tokens :] - output[:, -self.tokens :]
                total += difference.float().square().sum()
        finally:
            self.last_o = None
            for module in changed:
                del module.forward
                if own[module] is not None:
                    module.forward = own[module]
        return float(total) ** 0.5

    def attend(self, forward, batch: int, key: tuple | None, *args, **named):
        """Attention's output. Where q, k and v are those kept under `key`, only its last map is computed."""
        known, x, rest = self.attended.get(batch, (None, None, None))
        if key is not None and key == known:
            y = self.maps["o"](x[:, -self.tokens :].contiguous() if self.by_token else x)
            self.behind = True
            return y if rest is None else (y, *rest)
        out = forward(*args, **named)
        self.behind = True
        first, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
        if key is not None and self.last_o is not None and first is self.last_o[1]:  # nothing comes after its last map
            self.attended[batch] = (key, self.last_o[0], rest)
        return out

    def normed(self, forward, place: tuple[int, int], hidden: torch.Tensor, x: torch.Tensor, *args, **named):
        """A norm's output: of the block's own input it is computed once, behind attention for the compared tokens."""
        if args or named:
            return forward(x, *args, **named)
        if x is hidden:
            if place not in self.first:
                self.first[place] = forward(x)
            return self.first[place]
        if self.behind and x.dim() == 3 and self.tokens < x.shape[1]:
            return self.padded(forward(x[:, -self.tokens :].contiguous()), x)
        return forward(x)

    def feed(self, forward, x: torch.Tensor, *args, **named):
        """The FFN's output, computed for the compared tokens."""
        if args or named or x.dim() != 3 or self.tokens >= x.shape[1]:
            return forward(x, *args, **named)
        part = forward(x[:, -self.tokens :].contiguous())
        return self.padded(part, x)

    def padded(self, part: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """An output [B, tokens, m] as one for all tokens of x, 0 before the compared ones."""
        whole = part.new_zeros(*x.shape[:-1], part.shape[-1])
        whole[:, -self.tokens :] = part
        return whole

    def product(self, forward, limit: float, batch: int, role: str, key: tuple | None, x: torch.Tensor) -> torch.Tensor:
        """A map's output for x [B, T, n] (any other shape is computed whole), kept under `key` unless that is None."""
        cut = x.dim() == 3 and role in TOKENWISE and self.tokens < x.shape[1]
        known, part = self.kept.get((batch, role), (None, None))
        if key is None or key != known:
            read = x[:, -self.tokens :].contiguous() if cut else x
            part = forward(torch.where(kept(read, limit, self.scales.get(role)), read, 0) if limit > 0 else read)
            if key is not None:
                self.kept[batch, role] = (key, part)
        y = self.padded(part, x) if cut else part
        if role == "o":
            self.last_o = (x, y)
        return y
