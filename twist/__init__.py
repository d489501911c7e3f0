"""One import name for every room: `twist.pretrain`, `twist.converters`, ….

In a clone the rooms are folders beside this one; the wheel has them inside it.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

# A second work tree that borrows the environment of the first then runs its own rooms, not those that are installed.
_CLONE = Path(__file__).resolve().parent.parent
if (_CLONE / "contracts").is_dir() and (_CLONE / "pyproject.toml").is_file():
    __path__.append(str(_CLONE))

# What a program calls, and where it lives. They are looked up when they are used, so that `import twist` stays without
# torch.
if TYPE_CHECKING:
    from twist.compare.comparison import compare_records as compare_records
    from twist.converters.convert import convert as convert
    from twist.converters.inspect import inspect as inspect
    from twist.converters.read import load_artefact as load_artefact
    from twist.converters.read import load_backbone as load_backbone
    from twist.transfer.features import features as features
    from twist.transfer.predict import predict as predict
    from twist.transfer.run import transfer

    run_transfer = transfer
_PUBLIC = {
    "convert": "converters.convert:convert",
    "inspect": "converters.inspect:inspect",
    "load_artefact": "converters.read:load_artefact",
    "load_backbone": "converters.read:load_backbone",
    "features": "transfer.features:features",
    "predict": "transfer.predict:predict",
    "run_transfer": "transfer.run:transfer",
    "compare_records": "compare.comparison:compare_records",
}


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'twist' has no attribute {name!r}")
    module, _, function = _PUBLIC[name].partition(":")
    return getattr(import_module(f"twist.{module}"), function)
