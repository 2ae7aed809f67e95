"""A norm that hands the following maps its output in another orthonormal basis: x = norm(h) Q, with W' = W diag(g) Q.

Rotating here, behind the norm, and not the residual stream itself gives every map the same input as a stream kept in
the basis Q with adapters between the bases (WINA, Algorithm 1; LaRoSA), at the same two D x D products per block, and
leaves embedding, head and the maps that write to the stream alone. [choice]
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sparsebench.modules.base import Cost, SparseModule
from sparsebench.modules.input_sparse import replace
from sparsebench.sites import Block, weight_of

DEGENERATE = 1e-10  # of the largest eigenvalue: what lies closer is one eigenspace (float64 resolves about 1e-16)
IN_FRONT = ("input_layernorm", "pre_feedforward_layernorm")  # of a block with norms behind attention and FFN as well
GROUPS = ("attn_in", "mlp_in")  # the tensors that a norm feeds, in the order of a block's norms


class RotatedNorm(SparseModule):
    """RMSNorm without its weight (folded into the next maps), then a product with Q [D, D].

    It has the fields of an RMSNorm whose weight is 1, for kernels that norm before they rotate.
    """

    counts = False

    def __init__(self, norm: nn.Module, rotation: torch.Tensor, site: str):
        super().__init__()
        self.variance_epsilon, self.site = epsilon(norm), site
        weight = norm.weight
        self.register_buffer("weight", torch.ones_like(weight), persistent=False)
        self.rotation = nn.Parameter(rotation.to(weight.device, weight.dtype).contiguous(), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        h = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return h.to(hidden.dtype) @ self.rotation

    def costs(self, measured: dict) -> dict[str, Cost]:
        """D x D products and weights on top of the dense model's."""
        count = self.rotation.numel()
        return {self.site: Cost(0, 0, count, 0, count * self.rotation.element_size())}


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module has the fields of an RMSNorm, whatever transformers calls them (`check_fed` proves what it does)."""
    if isinstance(module, RotatedNorm):
        return False
    if hasattr(module, "variance_epsilon"):
        return True
    return (
        hasattr(module, "eps") and getattr(module, "weight", None) is not None and not isinstance(module, nn.LayerNorm)
    )


def epsilon(norm: nn.Module) -> float:
    """What an RMSNorm adds to the mean square."""
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def gain(norm: nn.Module) -> torch.Tensor:
    """The factor g of an RMSNorm, float64 [n]: its weight, or 1 + weight where that is what it scales by (Gemma)."""
    weight = norm.weight.detach().double()
    with torch.no_grad():
        scaled = norm(torch.ones_like(norm.weight)).double()
    return min((weight, 1 + weight), key=lambda g: float((scaled - g).norm()))


def norms(model: nn.Module, block: Block) -> dict[str, str]:
    """Paths of the RMSNorms of a block by the group they feed: of two in their order, of four (Gemma 2 and 3, which norm
    what attention and FFN return, too) those in front. Raises ValueError where there are others.
    """
    names = [n for n, m in model.get_submodule(block.path).named_children() if is_rms_norm(m)]
    if len(names) == 4 and set(IN_FRONT) < set(names):
        names = list(IN_FRONT)
    if len(names) != 2:
        raise ValueError(f"method: a rotation needs blocks with two RMSNorms, got {len(names)} in {block.path}")
    return {group: f"{block.path}.{name}" for group, name in zip(GROUPS, names, strict=True)}


def check_fed(model: nn.Module, blocks: list[Block]) -> None:
    """Prove on a few tokens that each norm is an RMSNorm and that its output is what the maps of its group read.

    Raises ValueError naming the block where it is not so: norms behind attention and FFN, or one that scales otherwise.
    """
    outputs: dict[str, torch.Tensor] = {}
    wrong: list[str] = []

    def keep(path):
        factor = gain(model.get_submodule(path))

        def see(norm, args, output):
            h = args[0].double()
            expected = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + epsilon(norm)) * factor
            if float((output - expected).norm()) > 0.02 * float(expected.norm()):
                wrong.append(f"{path} is no RMSNorm")
            outputs[path] = output

        return see

    def compare(norm, site):
        def see(_, args):
            if norm not in outputs or not torch.equal(args[0], outputs[norm]):
                wrong.append(f"{site.path} does not read {norm}")

        return see

    hooks = []
    for block in blocks:
        paths = norms(model, block)
        hooks += [model.get_submodule(p).register_forward_hook(keep(p)) for p in paths.values()]
        hooks += [
            model.get_submodule(s.path).register_forward_pre_hook(compare(paths[s.group], s))
            for s in block.sites.values()
            if s.group in GROUPS
        ]
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            model.base_model(input_ids=torch.arange(8, device=device)[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if wrong:
        raise ValueError(f"method: a rotation needs norms in front of the maps they feed, and {wrong[0]}")


def folded(model: nn.Module, block: Block, role: str) -> torch.Tensor:
    """W diag(g), float64 [m, n]: a map with the weight g of the norm before it (no mean is subtracted: RMSNorm has none)."""
    site = block.sites[role]
    norm = model.get_submodule(norms(model, block)[site.group])
    return weight_of(model.get_submodule(site.path)).double() * gain(norm)


def eigen(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(eigenvalues [n], eigenvectors [n, n] as columns) of a symmetric matrix, float64, largest first."""
    values, vectors = torch.linalg.eigh(matrix.double())
    return values.flip(-1), vectors.flip(-1)


def degenerate(values: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Runs [start, stop) of more than one eigenvalue that no library tells apart: gaps below DEGENERATE of the largest."""
    starts = [
        0,
        *(torch.nonzero(values[:-1] - values[1:] > DEGENERATE * values[0]).flatten() + 1).tolist(),
        len(values),
    ]
    return ((a, b) for a, b in itertools.pairwise(starts) if b - a > 1)


def principal_basis(gram: torch.Tensor, within: torch.Tensor | None = None) -> torch.Tensor:
    """Q [n, n], float64: orthonormal eigenvectors of a symmetric matrix as columns, largest eigenvalue first.

    For gram = W^T W these are the right singular vectors of W, and (W Q)^T (W Q) is diagonal. Eigenvectors of equal
    eigenvalues, e.g. of the null space of a W with fewer rows than columns, are any basis of a subspace: they are chosen
    as the principal axes of the symmetric matrix `within` [n, n] inside it, so that the result does not depend on the
    linear algebra library; without `within` the library chooses. The largest entry of a column is positive.
    """
    values, vectors = eigen(gram)
    if within is not None:
        for start, stop in degenerate(values):
            part = vectors[:, start:stop]
            vectors[:, start:stop] = part @ eigen(part.T @ within.to(part) @ part)[1]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def rotate(model: nn.Module, blocks: list[Block], bases: dict[tuple[int, str], torch.Tensor]) -> None:
    """Fold the norms of `blocks` and rotate what they hand on, in place; bases: Q by (layer, group). fp64, cast at the end."""
    for block in blocks:
        for group in norms(model, block):
            basis = bases[block.index, group].double()
            for role, site in block.sites.items():
                if site.group == group:
                    weight = weight_of(model.get_submodule(site.path))
                    weight.copy_(folded(model, block, role) @ basis.to(weight.device))
        for group, path in norms(model, block).items():
            norm = RotatedNorm(model.get_submodule(path), bases[block.index, group], f"{block.index}.{group}.rotation")
            replace(model, path, norm)


@contextmanager
def rotated(model: nn.Module, blocks: list[Block], bases: dict[tuple[int, str], torch.Tensor]) -> Iterator[None]:
    """`rotate` while the context lasts; the original weights wait in host memory."""
    kept = {
        site.path: model.get_submodule(site.path).weight.data.cpu().clone()
        for block in blocks
        for site in block.sites.values()
        if site.group in GROUPS
    }
    old = {path: model.get_submodule(path) for block in blocks for path in norms(model, block).values()}
    try:
        rotate(model, blocks, bases)
        yield
    finally:
        for path, weight in kept.items():
            model.get_submodule(path).weight.data.copy_(weight)
        for path, norm in old.items():
            replace(model, path, norm)
