"""What was measured: sums of it, notes for people, and JSON for programs."""

from collections.abc import Sequence

from gemcutter.bench.ops import Row, geometric_mean
from gemcutter.bench.peers import HOW_TO_ADD, PEERS, why_absent
from gemcutter.bench.timing import Ceiling

LARGE = 1024  # rows from which an op is held to its floor


def ceiling_line(ceiling: Ceiling, device: str) -> str:
    return (
        f"{device}: copies move {ceiling.bandwidth / 1e12:.2f} TB/s (read + write), "
        f"an empty kernel in a graph takes {ceiling.empty * 1e6:.2f} µs"
    )


def summary(rows: Sequence[Row]) -> dict:
    timed = [row for row in rows if row.timed]
    ratios = [row.ratio for row in timed if row.ratio is not None]
    return dict(
        timed=len(timed),
        refused=sum(bool(row.refused) for row in rows),
        with_peers=len(ratios),
        geometric_mean=geometric_mean(ratios),
        least_ratio=min(ratios, default=None),
        below_1=sum(ratio < 1 for ratio in ratios),
        least_of_floor=min((row.of_floor for row in timed if row.rows >= LARGE), default=None),
    )


def notes(rows: Sequence[Row]) -> list[str]:
    """The peers by number, what is missing, what failed, and why rows are refused."""
    lines = []
    needed = {}
    for op in dict.fromkeys(row.op for row in rows):
        peers = PEERS.get(op, [])
        needed |= {package: None for peer in peers for package in peer.needs}
        named = "; ".join(f"{number} {peer.says}" for number, peer in enumerate(peers, 1))
        lines.append(f"{op}: {named or 'no peer has it'}")
    for package in needed:
        if reason := why_absent(package):
            lines.append(f"without {package}: {reason}. To add it: {HOW_TO_ADD[package]}")
    failures = {}
    for row in rows:
        for peer in row.peers:
            if peer.failure:
                failures.setdefault(
                    f"{row.op}, peer {peer.number}: {peer.failure}", f"{row.shape}, {row.rows} rows"
                )
    lines += [f"{says} (first at {where})" for says, where in failures.items()]
    for row in rows:
        if not row.timed:
            says = f"REFUSED, {row.refused}" if row.refused else f"skipped, {row.skipped}"
            lines.append(f"{row.op} {row.shape}, {row.rows} rows: {says}")
    return lines


def as_json(rows: Sequence[Row], ceiling: Ceiling, device: str) -> dict:
    """Times in µs, bandwidth in bytes/s."""
    return dict(
        device=device,
        bandwidth=ceiling.bandwidth,
        empty_us=ceiling.empty * 1e6,
        all=summary(rows),
        rows=[_row_json(row) for row in rows],
    )


def _row_json(row: Row) -> dict:
    found = dict(op=row.op, shape=row.shape, rows=row.rows)
    if not row.timed:
        return found | (dict(refused=row.refused) if row.refused else dict(skipped=row.skipped))
    times = {p.says: round(p.seconds * 1e6, 3) for p in row.peers if not p.failure}
    best = row.best and dict(peer=row.best.says, difference=row.best.difference, ratio=round(row.ratio, 4))
    found |= dict(
        us=round(row.seconds * 1e6, 3), floor_us=round(row.floor * 1e6, 3), of_floor=round(row.of_floor, 4)
    )
    return found | dict(peers_us=times, best=best)
