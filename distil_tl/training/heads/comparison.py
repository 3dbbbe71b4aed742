"""Heads that are no linear layer: cosine classifier, nearest neighbours and a small network."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from distil_tl.data.sampler import epoch_order
from distil_tl.distributed.collectives import max_over_ranks
from distil_tl.models.fitted_heads import HIDDEN
from distil_tl.models.head import seeded
from distil_tl.training.heads.fitted import GAP, SCALES, Fitted, Settings, below_others
from distil_tl.training.heads.problem import Problem
from distil_tl.training.heads.rows import TOO_LITTLE_MEMORY, Part, Standard
from distil_tl.training.losses import Loss
from distil_tl.training.memory import is_out_of_memory
from distil_tl.training.optim import lr_factor
from distil_tl.utils.errors import UserError

# The published evaluation of DINO (Caron et al., 2021): this temperature, and k of 10 to 200.
NEIGHBOURS, TEMPERATURE = (200, 100, 50, 20, 10, 5, 1), 0.07
UNIFORM = 0.01  # share of equal votes for all classes, so that no probability is 0
MOST = 1 << 24  # similarities, and votes, at once
EPOCHS, BATCH, LR, DECAY, WARMUP = 12, 64, 1e-3, 0.1, 0.1


def fit_cosine(problem: Problem) -> Fitted:
    """The cosine of the angle to the mean of the normalised features of each class."""
    rows, classes = problem.rows, problem.classes

    def of(part: Tensor) -> Tensor:
        return F.normalize(part.double(), dim=1)

    shape = (classes, problem.width)
    sums = rows.total(
        shape, lambda part: (part.one_hot(classes) * part.weights[:, None]).T @ of(part.features)
    )  # fmt: skip
    directions, lower = below_others(F.normalize(sums, dim=1), problem.moments.class_weight, GAP)
    directions = directions.float().T.contiguous()
    settings: list[Settings] = [{}]

    def built(_: int, scale: float, standard: Standard) -> dict[str, Tensor]:
        return {"weight": scale * directions.T.double(), "mean": standard.mean, "deviation": standard.deviation}

    return Fitted(
        settings,
        SCALES,
        lambda features: (F.normalize(features, dim=1) @ directions + lower.float())[:, None],
        built=built,
    )


def fit_knn(problem: Problem, neighbours: tuple[int, ...] = NEIGHBOURS) -> Fitted:
    """Votes of the nearest training images by cosine, for several numbers of them."""
    rows, classes = problem.everything, problem.classes
    if not bool((rows.weights > 0).all()):  # images without a vote
        rows = Part(*(column[rows.weights > 0] for column in rows))
    fitting = [k for k in neighbours if k <= len(rows.targets)] or [len(rows.targets)]
    lengths = torch.linalg.vector_norm(rows.features, dim=1).clamp(min=1e-12)

    def votes(features: Tensor) -> Tensor:
        nearest = (F.normalize(features, dim=1) @ rows.features.T / lengths).topk(max(fitting), dim=1)
        weight = ((nearest.values - nearest.values[:, :1]) / TEMPERATURE).double().exp() * rows.weights[nearest.indices]
        of_class = F.one_hot(rows.targets[nearest.indices], classes) * weight[..., None]
        found = torch.stack([of_class[:, :k].sum(dim=1) for k in fitting], dim=1)
        shares = found / found.sum(dim=2, keepdim=True)
        return torch.log((1 - UNIFORM) * shares + UNIFORM / classes).float()

    at_once = max(1, min(MOST // len(rows.targets), MOST // (max(fitting) * classes)))

    def logits(features: Tensor) -> Tensor:
        return torch.cat([votes(part) for part in torch.split(features, at_once)])

    return Fitted([{"k": float(k)} for k in fitting], (1.0,), logits)


def fit_mlp(problem: Problem, decay: float = DECAY) -> Fitted:
    """A network with one hidden layer, trained by AdamW on rank 0. The others wait for it.

    Raises:
        UserError: the memory does not suffice. On all ranks alike.
        AllRanksStopError: on all ranks alike.
    """
    info, rows = problem.group.info, problem.everything_on_main()
    network = _network(problem)
    steps = EPOCHS * max(1, -(-problem.count // BATCH))
    failed, training = False, _Training(problem, network, rows, decay, steps) if info.is_main else None
    for step in range(steps):
        problem.group.agreement.raise_if_stopping()
        try:
            if training is not None:
                training.step(step)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failed, training = True, None
    if max_over_ranks(info, float(failed)):
        raise UserError(f"{TOO_LITTLE_MEMORY} to train a small network: use another head")
    for parameter in network.parameters() if info.store is not None else ():
        dist.broadcast(parameter.detach(), src=0)

    @torch.no_grad()
    def logits(features: Tensor) -> Tensor:
        return network(features)[:, None]  # type: ignore[no-any-return]

    def built(_: int, scale: float, standard: Standard) -> dict[str, Tensor]:
        found = {name: tensor.double() for name, tensor in network.state_dict().items()}
        first = standard.folded_into(found["0.weight"], found["0.bias"])
        last = {"weight": scale * found["2.weight"], "bias": scale * found["2.bias"]}
        layers = {"hidden": first, "output": last}
        return {f"{layer}.{name}": tensor for layer, pair in layers.items() for name, tensor in pair.items()}

    return Fitted([{"weight_decay": decay}], (1.0,), logits, built=built)


def _network(problem: Problem) -> nn.Sequential:
    with seeded(problem.seed, "mlp"):
        layers = nn.Sequential(nn.Linear(problem.width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, problem.classes))
    return layers.to(problem.counts.device)


class _Training:
    """The training of a small network on all rows."""

    def __init__(self, problem: Problem, network: nn.Sequential, rows: Part, decay: float, steps: int) -> None:
        self.rows, self.network, self.steps, self.seed = rows, network, steps, problem.seed
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=decay, fused=True)
        offsets = None if problem.offsets is None else problem.offsets.float()
        self.loss = Loss(problem.smoothing, offsets=offsets)
        self.weights = self.rows.weights.float()

    @torch.enable_grad()
    def step(self, step: int) -> None:
        count = len(self.rows.targets)
        each = self.steps // EPOCHS
        if step % each == 0:
            order = epoch_order(count, self.seed, "mlp", step // each)
            self.order = torch.from_numpy(order).to(self.weights.device)
        for group in self.optimizer.param_groups:
            group["lr"] = LR * lr_factor(step, self.steps, WARMUP, "cosine")
        chosen = self.order[step % each * BATCH :][:BATCH]
        losses = self.loss(self.network(self.rows.features[chosen]), self.rows.targets[chosen])
        self.optimizer.zero_grad(set_to_none=True)
        (losses * self.weights[chosen]).mean().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
