"""The process of a `ChildPeer`: `python -m benchmarks.ops.peers.child NAME`, requests on stdin, answers on stdout."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from benchmarks.ops.peers import Here, every_peer
from benchmarks.shapes import Linear


def served(name: str) -> Here:
    """The layer of peer `name` in this process, wherever the peer itself runs it."""
    peer: Any = every_peer()[name]()
    return Here(peer.layer)


def main() -> None:
    """Answer requests until stdin ends."""
    peer = served(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        if "prepare" in request:
            torch.set_num_threads(request["threads"])
            peer.prepare(Linear(*request["prepare"]), request["threads"])
            answer = {"weight_bytes": peer.weight_bytes}
        elif "feed" in request:
            answer = {"wrong": peer.check(request["feed"])}
        else:
            sample = peer.sample(request["calls"], request["cold"])
            answer = {"cpu_ms": sample.cpu_ms, "wall_ms": sample.wall_ms}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
