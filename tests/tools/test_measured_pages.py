"""The tables made of measured rows."""

from __future__ import annotations

from pathlib import Path

from benchmarks.ops import run as run_ops
from tools.pages import measured

ROOT = Path(__file__).parents[2]


def test_every_op_has_its_table() -> None:
    """Seen: rows of w4a16_linear that no page showed."""
    assert set(measured.blocks(ROOT / measured.RESULTS)[measured.PAGE]) == {*run_ops.OPS, "model"}


def test_a_loss_is_said_in_words() -> None:
    assert measured._ratio([0.5, 0.4, 0.6]) == "0.50 **loss**"
    assert measured._ratio([1.5, 1.4, 1.6]) == "1.50"


def row(threads: int, wall_ms: float, **other: object) -> dict[str, object]:
    same = {
        "op": "w4a4_linear",
        "shape": "a.down",
        "size": {"m": 1},
        "weights": "resident",
        "implementation": "quota",
        "features": ["avx2"],
        "load": 0.1,
        "commit": "c",
        "dirty": False,
        "versions": {},
        "ours": True,
        "ratios": {},
        "gops": 1.0,
        "cpu": "one",
        "isa": "avx2",
    }
    return {
        **same,
        "threads": threads,
        "wall_ms": [wall_ms, wall_ms, wall_ms],
        "cpu_ms": [wall_ms, wall_ms, wall_ms],
        **other,
    }


def test_more_threads_are_compared_with_one() -> None:
    text = measured.op_block([row(1, 6.0), row(2, 3.0), row(2, 3.0, shape="b.down")])
    single, double = text.split("2 threads")
    assert "× one thread" in double and "2.00" in double and "× one thread" not in single


def test_every_machine_shows_its_best_instruction_set() -> None:
    rows = [
        row(1, 6.0, shape="llava-1.5-7b.down"),
        row(1, 6.0, shape="llava-1.5-7b.down", cpu="two", isa="amx", gops=9.0),
    ]
    assert "avx2 |" in measured.digest_block(rows, []) and "amx" in measured.digest_block(rows, [])


def test_throughput_is_compared_with_one_client() -> None:
    rows = [
        row(
            2,
            0.0,
            op="serve",
            shape="embedded",
            implementation=name,
            ours=name == "quota serve",
            size={"clients": clients, "new": 32},
            tokens_per_s=speed,
            cpu_ms_per_token=2.0,
            ttft_ms=[10.0, 20.0],
            inter_token_ms=[1.0, None],
            **({"note": "on two legs"} if name == "a peer" else {}),
        )
        for name, clients, speed in (("a peer", 1, 50.0), ("quota serve", 16, 300.0), ("quota serve", 1, 100.0))
    ]
    lines = measured.throughput_block(rows).splitlines()
    cells = [
        [cell.strip() for cell in line.split("|")[1:6]]
        for line in lines
        if line.startswith("| quota") or line.startswith("| a peer")
    ]
    assert cells == [
        ["quota serve", "32", "1", "100", "1.00"],
        ["quota serve", "32", "16", "300", "3.00"],
        ["a peer", "32", "1", "50", "1.00"],
    ]
    assert "*a peer*: on two legs." in lines
