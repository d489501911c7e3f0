"""Any self-supervised checkpoint → the weights artefact → weights and settings of a framework, with a numeric proof.

The path of a file: `open.py` (bytes → arrays), `find.py` (where the backbone lies, by `sources.toml` or by search),
`architecture.py` (which network it is, by `tables.py`), `evidence.py` (what else the file says), `read.py` (the
artefact), `convert.py` (one of `targets/`) and `proof.py`.
"""
