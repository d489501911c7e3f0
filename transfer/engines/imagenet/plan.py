"""The plan of a run in a few lines, before anything runs: on what, how many images, and the numbers that decide."""

from __future__ import annotations

from twist.catalog.class_folders import LabelledImages
from twist.transfer.engines.imagenet.recipes import AnyRecipe, ClassifierRecipe, FinetuneRecipe, NeighboursRecipe


def render_plan(
    recipe: AnyRecipe,
    *,
    train: LabelledImages,
    labelled: LabelledImages,
    val: LabelledImages,
    gpus: int,
    eval_only: bool,
) -> str:
    """`labelled` are those of the `train` images whose labels the recipe may use."""
    processes = max(gpus, 1) if isinstance(recipe, ClassifierRecipe) else 1
    where = f"{processes} GPU{'s' * (processes > 1)}" if gpus else "1 process on the CPU"
    images = f"{len(val)} validation images of {len(val.classes)} classes at {recipe.size} pixels"
    if eval_only and isinstance(recipe, ClassifierRecipe):
        return f"plan: {where} → the stored weights are evaluated, nothing is trained\n  {images}"
    if isinstance(recipe, ClassifierRecipe):
        rates = f"lr_classifier {recipe.lr_classifier:g}"
        if isinstance(recipe, FinetuneRecipe):
            rates += f", lr_backbone {recipe.lr_backbone:g}"
        steps = -(-len(labelled) // recipe.batch_size)
        batch = min(recipe.batch_size, len(labelled))
        return "\n".join(
            [
                f"plan: {where}{' share the batch' if processes > 1 else ''}",
                f"  images a step {batch} ({batch / processes:g} a process), {rates}, "
                f"{recipe.epochs} epochs of {steps} step{'s' * (steps > 1)}",
                f"  {len(labelled)} labelled images of {len(train)}; {images}",
            ]
        )
    if isinstance(recipe, NeighboursRecipe):
        how = f"the {min(recipe.neighbours, len(train))} nearest of {len(train)} training images vote"
    elif recipe.by == "head":
        how = f"TWIST's own head of {recipe.head}"
    else:
        found_on = f"{len(train)} training" if recipe.fit_on == "train" else f"{len(val)} validation"
        how = f"k-means ({recipe.algorithm}), {recipe.clusters or len(val.classes)} clusters on {found_on} images"
    return f"plan: {where} → {how}\n  {images}"


def batch_too_large(recipe: AnyRecipe, labelled: LabelledImages, *, processes: int) -> list[str]:
    """Where a step would see fewer images than its rates are meant for, a sentence with overrides that fit."""
    images = len(labelled)
    if not isinstance(recipe, ClassifierRecipe) or recipe.batch_size <= images:
        return []
    fitting = max(images - images % processes, processes)
    rates = {"lr_classifier": recipe.lr_classifier}
    if isinstance(recipe, FinetuneRecipe):
        rates["lr_backbone"] = recipe.lr_backbone
    # In proportion to the batch: Goyal et al. 2017, arXiv 1706.02677.
    fit = " ".join(f"{name}={rate * fitting / recipe.batch_size:.3g}" for name, rate in rates.items())
    return [
        f"warning: batch_size {recipe.batch_size} is more than the {images} labelled images, so a step sees {images} "
        f"at rates that are meant for {recipe.batch_size}; batch_size={fitting} {fit} would fit them"
    ]
