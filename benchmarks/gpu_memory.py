"""Memory of a training step by its batch: bytes an image, and the largest batch that a card really runs.

A part of `benchmarks/gpu.py`. Peak memory at two batch sizes gives bytes an image and what is fixed; from those follows
a largest batch on paper, and steps a little below it show what fits.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import step
from twist.pretrain.config import PretrainConfig

# Of the card's memory, what allocations may come to: the rest is the driver's, and lost between blocks.
USABLE = 0.95
# Shares of the batch on paper that are tried, one after the other until one runs.
TRIED = (0.9, 0.8, 0.7, 0.6)
MULTIPLE = 8  # images; tensor cores want it


def measure(device: torch.device, tiny: bool) -> dict[str, Any]:
    """The multi-crop step, plain and with activation checkpointing. On a CPU the steps run and nothing is measured."""
    small, large = (4, 8) if tiny else (32, 64)
    on_gpu = device.type == "cuda"
    found: dict[str, Any] = {"measured": on_gpu, "cudnn_benchmark": torch.backends.cudnn.benchmark}
    for checkpointing in (False, True):

        def peak(batch: int, checkpointing: bool = checkpointing) -> int:
            config = step.case("multi-crop", batch=batch, tiny=tiny, model__activation_checkpointing=checkpointing)
            return peak_bytes(config, device)

        name = "activation_checkpointing" if checkpointing else "plain"
        if on_gpu:
            card = torch.cuda.get_device_properties(device).total_memory
            found[name] = {"card_bytes": card, **largest_batch(peak, small=small, large=large, card_bytes=card)}
        else:
            peak(small)
    return found


def largest_batch(peak: Callable[[int], int], *, small: int, large: int, card_bytes: int) -> dict[str, Any]:
    """From `peak`, which gives the bytes of a step by its batch and raises where memory runs out.

    Returns:
        `bytes_an_image` and `fixed_bytes`, from batches `small` and `large`; `largest_batch_on_paper`; `tried`, by
        batch the peak in bytes or None where memory ran out; `largest_batch_run`, None when no try ran.
    """
    peaks = {batch: peak(batch) for batch in (small, large)}
    an_image = (peaks[large] - peaks[small]) / (large - small)
    fixed = peaks[small] - small * an_image
    on_paper = int((USABLE * card_bytes - fixed) / an_image)
    tried: dict[str, int | None] = {}
    for share in TRIED:
        batch = int(share * on_paper) // MULTIPLE * MULTIPLE
        try:
            tried[str(batch)] = peak(batch)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            tried[str(batch)] = None
            continue
        break
    return {
        "bytes_an_image": an_image,
        "fixed_bytes": fixed,
        "largest_batch_on_paper": on_paper,
        "tried": tried,
        "largest_batch_run": next((int(batch) for batch, bytes_ in tried.items() if bytes_ is not None), None),
    }


def peak_bytes(config: PretrainConfig, device: torch.device) -> int:
    """Most bytes that tensors hold during a step of `config`, once algorithms are chosen and buffers made."""
    _clear(device)
    run_step = step.our_step(config, step.random_views(config, device), device)
    for _ in range(2):
        run_step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    run_step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    bytes_ = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    del run_step
    _clear(device)
    return bytes_


def _out_of_memory(error: RuntimeError) -> bool:
    # cuBLAS and cuDNN, which take memory of their own, have another word for it.
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)


def _clear(device: torch.device) -> None:
    gc.collect()  # checkpointed blocks refer to themselves: without it their weights stay until some later collection
    if device.type == "cuda":
        torch.cuda.empty_cache()
