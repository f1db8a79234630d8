"""What the tests share: nodes, pairs of them, faults, waiting."""

from support.nodes import Node, Pair, World
from support.proxy import Proxy
from support.waiting import wait_until

__all__ = ["Node", "Pair", "Proxy", "World", "wait_until"]
