"""How long an all-reduce or an all-gather takes, by the estimate from which NCCL itself chooses how to do it.

Of b bytes that each of W ranks on N nodes puts in, an estimate is latency + bytes / bandwidth:

    all-reduce  ring  base + 2(W − 1) hops, 2N of them between nodes    +  2 (W − 1)/W · b / bandwidth
    all-reduce  tree  base + 2(W/N − 1) hops inside a node (a chain) and 2·log2(N) between  +  2 · b / bandwidth
    all-gather  ring  base + W − 1 hops, N − 1 of them between nodes    +  (W − 1) · b / bandwidth

Each in two protocols: LL sends a flag with every word, which makes hops short and leaves a quarter of the bandwidth;
Simple has all of it, and long hops. The least estimate is the time.

Source of formula and constants: `ncclTopoTuneModel` in src/graph/tuning.cc of NVIDIA/nccl at commit b6475625, H100 and
Intel processors. Left out: LL128, which lies between the two; corrections for middle sizes; reductions in the switches
(NVLS, SHARP), which would make large all-reduces faster.
"""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Cluster:
    """Nodes of `gpus_a_node` GPUs; bandwidths in bytes/s and one direction, latency in s."""

    gpus_a_node: int = 8
    # Of a GPU: the 18 links of an H100, each with what NCCL counts on (SM90_NVLINK_BW in its src/graph/topo.h).
    nvlink_bytes_s: float = 18 * 20.6e9
    # ASSUMPTION: a network card of 400 Gb/s for each GPU, at its nominal speed. Rings and trees use all of a node's.
    card_bytes_s: float = 50e9
    # ASSUMPTION: handing over to NCCL's stream and back, by two events. NCCL's estimate does not know of it.
    switch_s: float = 10e-6

    def bandwidth(self, nodes: int) -> float:
        return self.nvlink_bytes_s if nodes == 1 else min(self.nvlink_bytes_s, self.gpus_a_node * self.card_bytes_s)


class Way(NamedTuple):
    """Microseconds before the first hop, of a hop inside a node and of one between nodes; share of the bandwidth."""

    base: float
    inside: float
    between: float
    share: float


RING = {"LL": Way(6.6, 0.6, 2.7, 1 / 4), "Simple": Way(8.4, 3.4, 14.0, 1.0)}
TREE = {"LL": Way(6.8, 0.6, 5.0, 0.92 / 3.8), "Simple": Way(0.0, 28.0, 28.0, 0.92)}
# In a ring over several nodes a hop inside a node takes no less than this: sends to the network have to be posted.
POSTING = {"LL": 1.0, "Simple": 3.0}
# bytes/s that LL does not exceed, on one node and on several.
LL_MOST = (87.7e9, 20.4e9)


def all_reduce_s(bytes_: int, *, ranks: int, cluster: Cluster) -> float:
    """Seconds in which every rank gets the sum of the `bytes_` that each puts in."""
    if ranks == 1:
        return 0.0
    nodes = nodes_of(ranks, cluster)
    rings = ring_s(
        2 * (ranks - 1) / ranks * bytes_,
        hops=2 * (ranks - 1),
        between=2 * nodes if nodes > 1 else 0,
        nodes=nodes,
        cluster=cluster,
    )
    trees = [
        (way.base + 2 * ((ranks / nodes - 1) * way.inside + (nodes.bit_length() - 1) * way.between)) * 1e-6
        + 2 * bytes_ / _bandwidth(protocol, way, nodes, cluster)
        for protocol, way in TREE.items()
    ]
    return cluster.switch_s + min(rings, *trees)


def all_gather_s(bytes_: int, *, ranks: int, cluster: Cluster) -> float:
    """Seconds in which every rank gets the `bytes_` of each. NCCL has rings alone for it, but for one GPU a node."""
    if ranks == 1:
        return 0.0
    nodes = nodes_of(ranks, cluster)
    received = (ranks - 1) * bytes_
    return cluster.switch_s + ring_s(received, hops=ranks - 1, between=nodes - 1, nodes=nodes, cluster=cluster)


def ring_s(passed: float, *, hops: int, between: int, nodes: int, cluster: Cluster) -> float:
    """Seconds of a ring that passes so many bytes through every link, in so many hops, `between` of them over the
    network."""
    return min(
        (
            way.base
            + (hops - between) * (max(way.inside, POSTING[protocol]) if nodes > 1 else way.inside)
            + between * way.between
        )
        * 1e-6
        + passed / _bandwidth(protocol, way, nodes, cluster)
        for protocol, way in RING.items()
    )


def nodes_of(ranks: int, cluster: Cluster) -> int:
    return -(-ranks // cluster.gpus_a_node)


def _bandwidth(protocol: str, way: Way, nodes: int, cluster: Cluster) -> float:
    most = way.share * cluster.bandwidth(nodes)
    return min(most, LL_MOST[nodes > 1]) if protocol == "LL" else most
