"""What passes between the stages: typed configs, the weights artefact, the run record.

The ground floor. It imports nothing of ours, and no torch at import (`twist.contracts.networks` and
`twist.contracts.images`, which need torch, are imported by those who use them).
"""
