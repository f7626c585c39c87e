"""The numbers of a report as tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tarflowlm.evaluation.blocks import BoundParts
from tarflowlm.report.blocks import signed, terms
from tarflowlm.report.codes import Codes
from tarflowlm.report.page import Table
from tarflowlm.report.records import RunRecord
from tarflowlm.runs.strict_json import to_dict

MISSING = "–"


def summary_table(records: Sequence[RunRecord]) -> Table:
    """One column a run: what it came to, and on what."""
    rows = [
        ("status", lambda r: r.status),
        ("test, bits per character", _test_bits),
        ("test, nats per token, standard error", _test_nats),
        ("validation, bits per character", _valid_bits),
        ("validation after each stage", _stages),
        ("preset, seed", lambda r: f"{r.run.name}, {r.run.seed}"),
        ("text", lambda r: Path(r.run.data.source).name),
        ("steps", lambda r: f"{r.last_step:,}"),
        ("tokens", lambda r: f"{int(r.train['tokens'].max()):,}"),
        ("training, seconds", lambda r: f"{r.seconds[-1]:,.0f}"),
        ("tokens per second, median of each stage", _speeds),
        ("parameters", lambda r: _count(r, "parameters")),
        ("of them in Transformers", lambda r: _count(r, "trunk_parameters")),
        ("device", lambda r: _plain(r, "device")),
        ("threads", lambda r: _plain(r, "threads")),
        ("machine", lambda r: _plain(r, "machine")),
        ("PyTorch", lambda r: _plain(r, "torch")),
    ]
    return Table(["", *(r.name for r in records)], [(name, *(value(r) for r in records)) for name, value in rows])


def _test_bits(record: RunRecord) -> str:
    if record.summary is None:
        return MISSING
    test = record.summary["test"]
    return f"{record.sign} {test['bpc']:.4f} ({test.get('bound', 'bound unknown')})"


def _test_nats(record: RunRecord) -> str:
    test = {} if record.summary is None else record.summary["test"]
    if not {"nats_per_token", "stderr"} <= test.keys():
        return MISSING
    return f"{record.sign} {test['nats_per_token']:.4f} ± {test['stderr']:.4f}"


def _valid_bits(record: RunRecord) -> str:
    bits = record.valid["bpc"]
    return f"{record.sign} {bits[-1]:.4f} at step {int(record.valid['step'][-1]):,}" if len(bits) else MISSING


def _stages(record: RunRecord) -> str:
    found = [] if record.summary is None else record.summary.get("stage_valid_bpc", [])
    return f"{record.sign} {', '.join(f'{bits:.4f}' for bits in found)}" if found else MISSING


def _speeds(record: RunRecord) -> str:
    return ", ".join(f"{speed:,.0f}" for speed in record.stage_medians("tokens_per_second"))


def _count(record: RunRecord, key: str) -> str:
    value = None if record.summary is None else record.summary.get(key)
    return MISSING if value is None else f"{value:,}"


def _plain(record: RunRecord, key: str) -> str:
    return MISSING if record.summary is None else str(record.summary.get(key, MISSING))


def config_table(records: Sequence[RunRecord]) -> Table:
    """Every field of the configurations by its dotted name; with several runs, those that differ come first."""
    flat = [_flat(to_dict(r.run)) for r in records]
    names = list(dict.fromkeys(name for one in flat for name in one))
    rows = [(name, *(one.get(name, MISSING) for one in flat)) for name in names]
    rows.sort(key=lambda row: len(set(row[1:])) == 1)
    return Table(["", *(r.name for r in records)], rows)


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            found |= _flat(item, f"{prefix}{key}.")
        else:
            found[prefix + key] = ", ".join(map(str, item)) if isinstance(item, list) else str(item)
    return found


def terms_table(parts: BoundParts) -> Table:
    """The terms of the bound, and the bound of the first blocks."""
    rows = [(name, signed(value, 5), signed(parts.bpc(value), 5)) for name, value in terms(parts)]
    rows.append(("KL(q(z|x) ‖ p(z))", f"{parts.kl:.5f}", f"{parts.bpc(parts.kl):.5f}"))
    for blocks, bound in enumerate(parts.bounds):
        last = blocks == len(parts.bounds) - 1
        name = "bound of the model" if last else f"bound of blocks 1 to {blocks}" if blocks else "bound of no block"
        rows.append((name, f"<= {bound:.5f}", f"<= {parts.bpc(bound):.5f}"))
    return Table(["", "nats per token", "bits per character"], rows)


def codes_table(codes: Codes, num_pairs: int = 8) -> Table:
    """Scales and distances, and the closest pairs."""
    distance = np.sort(codes.distance)
    middle = float(np.median(distance))
    rows = [
        (f"distance to the nearest neighbour, {codes.unit}: least, median, largest",
         f"{distance[0]:.2f}, {middle:.2f}, {distance[-1]:.2f}"),
    ]  # fmt: skip
    if codes.std is not None:
        rows.append(
            ("σ: least, median, largest", ", ".join(f"{f(codes.std):.4f}" for f in (np.min, np.median, np.max)))
        )
    closest: dict[frozenset[int], str] = {}
    for i in np.argsort(codes.distance, kind="stable").tolist():
        pair = int(codes.compared[i]), int(codes.nearest[i])
        name = " – ".join(codes.symbols[token] for token in pair)
        closest.setdefault(frozenset(pair), f"{name} {codes.distance[i]:.2f}")
        if len(closest) == num_pairs:
            break
    rows.append(("closest", ",  ".join(closest.values())))
    return Table(["", ""], rows)
