"""Any self-supervised checkpoint → the weights artefact → weights and settings of a framework, with a numeric proof.

Read in this order: `sources.py` (which layouts there are), `tables.py` (their names), `rename.py` (the engine),
`read.py` (file → artefact), `convert.py` (artefact → target, proven).
"""
