"""The process behind a `ChildPeer`: `python -m quota.bench.peers.child NAME`, requests on stdin, answers on stdout."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from quota.bench.peers import Peer, activations, every_peer, gate
from quota.bench.peers.worker import ChildPeer
from quota.bench.shapes import Linear
from quota.bench.timing import time_calls


def served(name: str) -> Peer:
    """The peer that runs here: never one that would start a child of its own."""
    peer = every_peer()[name]()
    return peer.inner if isinstance(peer, ChildPeer) else peer


def main() -> None:
    """Answer requests until stdin ends."""
    peer, shape = served(sys.argv[1]), Linear("", 0, 0)
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        if "prepare" in request:
            torch.set_num_threads(request["threads"])
            shape = Linear(*request["prepare"])
            peer.prepare(shape, request["threads"])
            answer = {"weight_bytes": peer.weight_bytes}
        elif "feed" in request:
            peer.feed(activations(shape, request["feed"]))
            answer = {"wrong": gate(peer, shape, request["feed"])}
        else:
            sample = time_calls(peer.run, request["calls"], cold=request["cold"])
            answer = {"cpu_ms": sample.cpu_ms, "wall_ms": sample.wall_ms}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
