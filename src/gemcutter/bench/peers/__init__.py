"""Other engines' kernels that do an op's job: for each op, whole sequences of launches with the same results.

Only calls stand here. A peer is looked for when it is wanted, and is left out where it is not installed.
"""

from gemcutter.bench.peers.activations import ACTIVATIONS
from gemcutter.bench.peers.attention import ATTENTION
from gemcutter.bench.peers.experts import EXPERTS
from gemcutter.bench.peers.glm import GLM
from gemcutter.bench.peers.norms import NORMS
from gemcutter.bench.peers.packages import HOW_TO_ADD, why_absent
from gemcutter.bench.peers.peer import Peer

PEERS: dict[str, list[Peer]] = {**NORMS, **ATTENTION, **EXPERTS, **ACTIVATIONS, **GLM}

__all__ = ["HOW_TO_ADD", "PEERS", "Peer", "why_absent"]
