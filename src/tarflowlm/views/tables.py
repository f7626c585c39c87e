"""Tables about runs, one column for each: their results, and their configurations."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from tarflowlm.schema import flatten
from tarflowlm.views.page import table_html
from tarflowlm.views.records import RunRecord

PLAIN = {
    "parameters": "parameters",
    "of them in Transformers": "trunk_parameters",
    "device": "device",
    "threads": "threads",
    "machine": "machine",
    "PyTorch": "torch",
}
"""Rows of the summary that show a value of summary.json as it is."""


def runs_table(records: Sequence[RunRecord], columns: Sequence[Mapping[str, str]]) -> str:
    """One column for each run, one row for each key, in the order of first appearance.

    A dash stands where a run has no value; rows without any value are left out.
    """
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, *(column.get(name) or "–" for column in columns)) for name in names]
    head = ["", *(record.name for record in records)]
    return table_html(head, [row for row in rows if set(row[1:]) != {"–"}])


def summary_of(record: RunRecord) -> dict[str, str]:
    """Results, text, size and machine of a run: a column of `runs_table`; empty where unknown."""
    done = record.summary or {}
    test = done.get("test", {})
    sign = record.sign
    bits = nats = valid = stages = ""
    if test:
        bits = f"{sign} {test['bpc']:.4f} ({test.get('bound', 'bound unknown')})"
    if {"nats_per_token", "stderr"} <= test.keys():
        # the standard error of a single window is not a number
        error = f" ± {test['stderr']:.4f}" if math.isfinite(test["stderr"]) else ""
        nats = f"{sign} {test['nats_per_token']:.4f}{error}"
    if len(bpc := record.valid["bpc"]):
        valid = f"{sign} {bpc[-1]:.4f} at step {int(record.valid['step'][-1]):,}"
    if found := done.get("stage_valid_bpc"):
        stages = f"{sign} {', '.join(f'{bpc:.4f}' for bpc in found)}"
    column = {
        "status": record.status,
        "test, bits per character": bits,
        "test, nats per token, standard error": nats,
        "validation, bits per character": valid,
        "validation after each stage": stages,
        "preset, seed": f"{record.run.name}, {record.run.seed}",
        "text": Path(record.run.data.source).name,
    }
    if record.has_log:
        speeds = record.stage_medians("tokens_per_second")
        column |= {
            "steps": f"{record.last_step:,}",
            "tokens": f"{record.last_token:,}",
            "training, seconds": f"{record.train['seconds'][-1]:,.0f}",
            "tokens per second, median of each stage": ", ".join(f"{x:,.0f}" for x in speeds),
        }
    for label, key in PLAIN.items():
        value = done.get(key, "")
        column[label] = f"{value:,}" if isinstance(value, int) else str(value)
    return column


def config_table(records: Sequence[RunRecord]) -> str:
    """Every field of the configurations by its dotted name, those that differ first."""
    flat = [flatten(record.run) for record in records]
    names = list(dict.fromkeys(name for one in flat for name in one))
    names.sort(key=lambda name: all(name in one and one[name] == flat[0].get(name) for one in flat))
    columns = []
    for one in flat:
        shown = {}
        for name in names:
            if name in one:
                value = one[name]
                shown[name] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        columns.append(shown)
    return runs_table(records, columns)
