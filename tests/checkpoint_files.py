"""Checkpoint files built to every layout of `twist.converters.sources`, for the tests of the converters.

The tensors are views of one number each, so a file of a ResNet-50 has the real names and shapes in a few hundred
kilobytes; names of heads and other branches come from the layout's own patterns.
"""

import collections
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from twist.contracts import rename
from twist.contracts.networks import network_of
from twist.contracts.shapes import shapes_of
from twist.contracts.weights import Backbone, Vit, write_backbone
from twist.converters.convert import Conversion
from twist.converters.sources import Branch, Layout, matches
from twist.converters.tables import CAFFE2, HAIKU


def flat_tensors(architecture: str = "resnet18", *, seed: int = 1, **geometry: Any) -> dict[str, Tensor]:
    """An artefact with every shape in place and one distinct number a tensor."""
    return numbered(meta_tensors(architecture, **geometry), seed)


def meta_tensors(architecture: str, **geometry: Any) -> dict[str, Tensor]:
    """The names, shapes and types of an architecture, without values."""
    shapes = shapes_of(architecture, **geometry).items()
    return {name: torch.empty(a.shape, dtype=getattr(torch, a.dtype.name), device="meta") for name, a in shapes}


def numbered(state: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """A state dict (of the meta device, say) with one distinct number a tensor."""
    return {
        name: torch.tensor(seed * 1000 + index, dtype=empty.dtype).reshape((1,) * empty.ndim).expand(empty.shape)
        for index, (name, empty) in enumerate(state.items())
    }


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def same(a: Tensor, b: Tensor) -> bool:
    """Equality of tensors that hold one number each: shape, and the number in the first and in the last place."""
    return a.shape == b.shape and all(bool(a[place] == b[place]) for place in ((0,) * a.ndim, (-1,) * a.ndim))


TINY: dict[str, Any] = {"embed_dim": 192, "depth": 2, "heads": 3, "mlp_features": 192}


def tiny_vit(patch: int = 16, side: int = 4, **vit: Any) -> Backbone:
    """The header of a ViT of two blocks of 192 features; nothing that is tested depends on the size."""
    size: dict[str, Any] = {
        "architecture": f"vit_tiny_patch{patch}",
        "stem": f"patch{patch}",
        "image_size": patch * side,
    }
    return Backbone(**size, method="any", vit=Vit(**{**TINY, **vit}))


def drawn(backbone: Backbone) -> dict[str, Tensor]:
    """Weights of which none is zero or the same as its neighbour."""
    if not backbone.is_vit:
        return random_tensors(backbone.architecture, width=backbone.width)
    torch.manual_seed(3)
    state = network_of(backbone).state_dict()
    return {name: tensor + 0.2 * torch.randn_like(tensor) for name, tensor in state.items()}


def write_drawn(folder: Path, backbone: Backbone) -> Path:
    return write_backbone(folder / "backbone.safetensors", drawn(backbone), backbone)


def random_tensors(architecture: str = "resnet18", *, seed: int = 0, **geometry: Any) -> dict[str, Tensor]:
    """An artefact with random weights and positive variances, as a network could have them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, empty in meta_tensors(architecture, **geometry).items():
        shape = empty.shape
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.tensor(7)
        elif len(shape) == 4:
            tensors[name] = torch.randn(shape, generator=generator) * (2 / shape[1:].numel()) ** 0.5
        elif name.endswith(("running_var", "weight")):
            tensors[name] = torch.rand(shape, generator=generator) + 0.5
        else:
            tensors[name] = torch.randn(shape, generator=generator) * 0.1
    return tensors


def write_stored_source(path: Path) -> Path:
    """The ResNet-18 of tests/stored/conversion: integers over powers of two, the same bytes on any machine."""
    tensors = {}
    for name, empty in meta_tensors("resnet18").items():
        pattern = torch.arange(empty.numel()) * 7919 % 101  # 0 … 100
        positive = name.endswith(("running_var", "weight")) and empty.ndim == 1
        values = (pattern + 64) / 128 if positive else (pattern - 50) / 4096
        tensors[name] = values.reshape(empty.shape).to(empty.dtype).contiguous()
    save_file(tensors, path)
    return path


def printed_network(done: Conversion) -> Any:
    """The network that the printed lines of a conversion load, or that the config which they leave behind builds."""
    text, names = done.target.usage(done.output, done.backbone), {}
    if "your_config.py" in text:
        import mmseg

        yours = Path(mmseg.__file__).parent / ".mim/configs/fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py"
        text = text.replace("your_config.py", str(yours))
    exec(compile(text, "<printed>", "exec"), names)
    if "cfg" in names:
        from detectron2.checkpoint import DetectionCheckpointer
        from detectron2.modeling import build_model

        names["cfg"].MODEL.DEVICE = "cpu"
        model = build_model(names["cfg"])
        DetectionCheckpointer(model).load(names["cfg"].MODEL.WEIGHTS)
        return model.backbone.bottom_up
    if "config" in names:
        from mmengine.registry import DefaultScope
        from mmseg.registry import MODELS

        with DefaultScope.overwrite_default_scope("mmseg"):
            network = MODELS.build(names["config"].model.backbone)
            network.init_weights()
        return network
    return names.get("backbone") or names["network"]


def renamed_back(table: rename.Table, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` (artefact names) as a file of the table's layout holds them: the inverse of `rename.apply`."""
    changes = {
        "same": lambda value: value,
        "hwio": lambda value: value.permute(2, 3, 1, 0),
        "flat": lambda value: value.reshape(1, 1, 1, -1),
    }
    steps = rename.outwards(table, tensors)
    return {step.name: changes[step.change](tensors[name]) for name, step in steps.items()}


def source_names(layout: Layout, branch: Branch, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` under the names of the layout's first table, with the branch's prefix."""
    table = layout.tables[0]
    lacking = table.absent if absent(layout) else ()
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(lacking)}
    return {branch.prefix + name: tensor for name, tensor in renamed_back(table, kept).items()}


def absent(layout: Layout) -> bool:
    """Whether files of this layout never hold what its table lists as absent."""
    return layout.tables[0] in (HAIKU, CAFFE2)


def concrete(pattern: str, number: int = 0) -> str:
    """A name that a glob matches."""
    return pattern.split("|")[0].replace("*", "x").replace("?", "q").replace("xx", "x") + (
        f"_{number}" if number else ""
    )


def checkpoint_value(layout: Layout, branch: Branch, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The nested value of a training file of this layout, `tensors` in `branch` and decoys everywhere else."""
    decoy = torch.tensor(-1.0).expand(3, 3)
    wrap = "" if absent(layout) else "module."
    value: dict[str, Any] = {entry: {} for entry in layout.top if "/" not in entry}
    used: set[str] = set()
    for other in [branch, *layout.branches]:
        if other.name in used or (other is not branch and (other.entry, other.prefix) == (branch.entry, branch.prefix)):
            continue
        if other is not branch and other.prefix == "" and other.entry == branch.entry:
            continue
        used.add(other.name)
        mine = tensors if other is branch else flat_tensors(seed=9)
        place = _place(value, other.entry)
        place.update({wrap + name: tensor for name, tensor in source_names(layout, other, mine).items()})
        for pattern in layout.heads[:1]:
            place[wrap + other.prefix + concrete(pattern)] = decoy
    place = _place(value, branch.entry)
    for pattern in (*layout.evidence, *layout.drop):
        name = concrete(pattern)
        provided = pattern in layout.evidence and any(matches(key.removeprefix("module."), (pattern,)) for key in place)
        if not provided and wrap + name not in place:
            place[wrap + name] = decoy
    for module in layout.linear:
        place |= {f"{wrap}{module}.weight": decoy, f"{wrap}{module}.bias": decoy[0]}
    for *outer, name in (entry.split("/") for entry in layout.top if "/" in entry):
        inner = _place(value, tuple(outer))
        inner.pop(wrap + name, None)
        inner[name] = decoy[0, 0]
    if branch.entry:
        value.update({"epoch": 100, "optimizer": {"state": {0: {"exp_avg": decoy}}, "param_groups": []}})
    for entry in layout.top:
        if value.get(entry) == {}:
            value[entry] = "x" if entry in ("arch", "__author__", "meta") else {"state": {"weight": decoy}}
    return value


def write_checkpoint(path: Path, layout: Layout, branch: Branch, tensors: dict[str, Tensor]) -> Path:
    """`checkpoint_value` as the file its authors would write."""
    if layout.tables[0] is HAIKU:
        write_haiku(path, tensors, flat_tensors(seed=9), online=branch.name == "online")
        forget_byol()  # reading cannot use the made-up modules
    elif layout.tables[0] is CAFFE2:
        path.write_bytes(pickle.dumps(_arrays(checkpoint_value(layout, branch, tensors)), protocol=2))
    else:
        torch.save(checkpoint_value(layout, branch, tensors), path)
    return path


def _arrays(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _arrays(item) for name, item in value.items()}
    return value.contiguous().numpy() if isinstance(value, Tensor) else value


def write_haiku(path: Path, mine: dict[str, Tensor], other: dict[str, Tensor], *, online: bool) -> None:
    """DeepMind's BYOL pickle: a named tuple and haiku mappings, by reference to modules that no reader has."""
    state_class, mapping_class = _byol_classes()
    networks = []
    for tensors in (mine, other) if online else (other, mine):
        kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
        renamed = renamed_back(HAIKU, kept)
        parameters: dict[str, Any] = {"classifier": {"b": torch.zeros(3).numpy()}, "projector/linear": {}}
        statistics: dict[str, Any] = {}
        for name, tensor in renamed.items():
            module, leaf = name.rsplit("/", 1)
            *scopes, last = module.split("/")
            scope = "/~/".join(["res_net50", *scopes, last])
            array = tensor.contiguous().numpy()
            if leaf == "average":
                statistics[scope] = {"average": array, "hidden": array, "counter": torch.zeros(()).numpy()}
            else:
                parameters.setdefault(scope, {})[leaf] = array
        networks.append((mapping_class(parameters), mapping_class(statistics)))
    (online_params, online_state), (target_params, target_state) = networks
    state = state_class(online_params, target_params, online_state, target_state, [])
    with path.open("wb") as file:
        pickle.dump({"experiment_state": state, "step": 300_000, "rng": torch.zeros(2).numpy()}, file, protocol=3)


def _byol_classes() -> tuple[Any, Any]:
    """Classes that pickle under the real files' module names; `forget_byol` takes the modules away again."""
    fields = "online_params target_params online_state target_state opt_state"
    state_class = collections.namedtuple("_ByolExperimentState", fields, module="byol.byol_experiment")

    class FlatMapping(dict):  # type: ignore[type-arg]
        def __reduce__(self) -> Any:
            return FlatMapping, (dict(self),)

    FlatMapping.__module__, FlatMapping.__qualname__ = "haiku._src.data_structures", "FlatMapping"
    for item in (state_class, FlatMapping):
        parts = item.__module__.split(".")
        for name in (".".join(parts[:depth]) for depth in range(1, len(parts) + 1)):
            sys.modules.setdefault(name, types.ModuleType(name))
        setattr(sys.modules[item.__module__], item.__name__, item)
    return state_class, FlatMapping


def forget_byol() -> None:
    """Take the made-up modules away again, so that reading cannot use them."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("byol", "haiku")]:
        del sys.modules[name]


def _place(value: dict[str, Any], entry: tuple[str, ...]) -> dict[str, Any]:
    for key in entry:
        if not isinstance(value.get(key), dict):
            value[key] = {}
        value = value[key]
    return value
