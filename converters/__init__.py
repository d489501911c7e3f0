"""Any self-supervised checkpoint → the weights artefact → weights and settings of a framework, with a numeric proof.

The path of a file: `open.py` (bytes → values), `detect.py` (which layout of `sources.toml`), `read.py` (file → artefact
by the tables of `tables.py`), `convert.py` (artefact → one of `targets/`), `proof.py`.
"""
