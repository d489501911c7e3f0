"""A linear head on dense features, for every learning rate and weight decay of a grid in one pass over the features.

After DINOv2's and DINOv3's evaluation (batch norm, 1×1 convolution, AdamW, warm-up then cosine). Heads share what does
not depend on them: reading the features, their batch statistics and one matrix product. `G` heads, `B` images a step,
`K` classes, `D` features, `h` `w` the sides of the map.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twist.contracts.curves import Curves
from twist.contracts.errors import UserError
from twist.contracts.progress import Progress
from twist.measure.dense import DenseFile
from twist.measure.segmentation import VOID, Confusion, predict
from twist.transfer.engines.frozen.recipes import LinearRecipe

Labels = Callable[[int], Tensor]  # number of an image → its label map (H, W) int64


class HeadGrid(nn.Module):
    """`G` linear heads over one batch norm without affine parameters (a linear layer follows, which has them)."""

    def __init__(self, heads: int, dimension: int, classes: int, *, batch_norm: bool, seed: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dimension, affine=False) if batch_norm else nn.Identity()
        # N(0, 0.01) and zero, as MMSegmentation initialises a head's last layer; the same for each rate.
        weight = torch.empty(classes, dimension).normal_(0, 0.01, generator=torch.Generator().manual_seed(seed))
        self.weights = nn.ParameterList(nn.Parameter(weight.clone()) for _ in range(heads))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(classes)) for _ in range(heads))

    def forward(self, rows: Tensor) -> Tensor:
        """(P, D) patches → (P, G, K) scores."""
        weight, bias = torch.cat([*self.weights]), torch.cat([*self.biases])
        return F.linear(self.norm(rows), weight, bias).view(len(rows), len(self.weights), -1)

    def scores(self, rows: Tensor, height: int, width: int) -> Tensor:
        """(P, D) patches of B images → (G, B, K, h, w)."""
        scores = self(rows)
        return scores.view(-1, height, width, *scores.shape[1:]).permute(3, 0, 4, 1, 2)


def grid_of(recipe: LinearRecipe) -> list[tuple[float, float]]:
    return [(rate, decay) for rate in recipe.learning_rates for decay in recipe.weight_decays]


def split_holdout(recipe: LinearRecipe, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the images that are trained on, and of those that are held out to choose on."""
    every = np.arange(images)
    if recipe.chosen_on == "val" or len(grid_of(recipe)) == 1:
        return every, every[:0]
    held = every[recipe.holdout_every - 1 :: recipe.holdout_every]
    if not len(held):
        raise UserError(
            f"{images} training images leave none to choose the rate on: pass a smaller holdout_every, or one rate."
        )
    return np.setdiff1d(every, held), held


def train(
    features: DenseFile, labels: Labels, chosen: np.ndarray, recipe: LinearRecipe, *, classes: int, seed: int,
    device: torch.device, curves: Curves,
) -> HeadGrid:  # fmt: skip
    """The heads of the grid, trained together on the images `chosen`; `labels` are of the recipe's `loss_size`."""
    grid = grid_of(recipe)
    heads = HeadGrid(len(grid), features.dimension, classes, batch_norm=recipe.batch_norm, seed=seed).to(device)
    groups = [
        {"params": [weight, bias], "lr": rate, "weight_decay": decay, "peak": rate}
        for weight, bias, (rate, decay) in zip(heads.weights, heads.biases, grid, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups)
    rows = features.mapped().reshape(features.images, features.patches, features.dimension)
    batches = _batches(chosen, recipe, seed)
    with Progress("linear heads", total=recipe.iterations, unit="step") as progress:
        for step, batch in enumerate(batches):
            factor = _factor(step, recipe)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            inputs = torch.from_numpy(rows[batch]).flatten(0, 1).to(device)
            truth = torch.stack([labels(int(image)) for image in batch]).to(device)
            losses = _backward(heads, inputs, truth, features)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            best = float(np.nanmin(losses)) if np.isfinite(losses).any() else math.nan
            progress.advance(1, loss=best)
            curves.add(step + 1, {"loss": best})
            curves.plot(step + 1, {"loss": best})
    return heads.eval()


def _batches(chosen: np.ndarray, recipe: LinearRecipe, seed: int) -> list[np.ndarray]:
    """Image numbers of every step: shuffled passes, one after the other; a batch may hold the end of one."""
    size = min(recipe.batch_size, len(chosen))
    needed = size * recipe.iterations
    passes = -(-needed // len(chosen))
    orders = [np.random.Generator(np.random.Philox(key=[seed, number])).permutation(chosen) for number in range(passes)]
    return list(np.concatenate(orders)[:needed].reshape(recipe.iterations, size))


def _factor(step: int, recipe: LinearRecipe) -> float:
    """Of the peak rate: linear warm-up, then a cosine to 0."""
    if step < recipe.warmup_iterations:
        return (step + 1) / recipe.warmup_iterations
    done = (step - recipe.warmup_iterations) / max(recipe.iterations - recipe.warmup_iterations, 1)
    return 0.5 * (1 + math.cos(math.pi * done))


def _backward(heads: HeadGrid, inputs: Tensor, truth: Tensor, features: DenseFile) -> np.ndarray:
    """Gradients of every head's own loss, and the losses (G,); enlarged scores of one head at a time are in memory."""
    scores = heads.scores(inputs, features.height, features.width)  # (G, B, K, h, w)
    leaf = scores.detach().requires_grad_()
    losses = []
    for one in leaf:
        enlarged = one
        if one.shape[2:] != truth.shape[1:]:
            enlarged = F.interpolate(one, size=tuple(truth.shape[1:]), mode="bilinear", align_corners=False)
        loss = F.cross_entropy(enlarged, truth, ignore_index=VOID)
        loss.backward()
        losses.append(loss.detach())
    scores.backward(leaf.grad)
    return torch.stack(losses).cpu().numpy()


@torch.no_grad()
def evaluate(
    heads: HeadGrid, features: DenseFile, labels: Labels, images: np.ndarray, *, classes: int, device: torch.device,
    only: int | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """mIoU, mAcc and aAcc of each head (or of one) on `images`, at the resolution of `labels`."""
    chosen = range(len(heads.weights)) if only is None else [only]
    counted = [Confusion(classes) for _ in chosen]
    with Progress("evaluate", total=len(images), unit="image") as progress:
        for image in images:
            scores = heads.scores(features.rows_of(int(image)).to(device), features.height, features.width)[:, 0]
            truth = labels(int(image)).to(device)
            for confusion, head in zip(counted, chosen, strict=True):
                confusion.add(truth, predict(scores[head], tuple(truth.shape)))  # type: ignore[arg-type]
            progress.advance()
    return [confusion.metrics() for confusion in counted]
