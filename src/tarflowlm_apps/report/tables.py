"""Tables about runs: their results, their configurations, and the terms of a bound."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tarflowlm.evaluation.blocks import StateReport
from tarflowlm.evaluation.likelihood import sign_of
from tarflowlm.runs.records import RunRecord
from tarflowlm.schema import flatten
from tarflowlm_apps.report.page import table_html

MACHINE = ("parameters", "trunk_parameters", "device", "threads", "machine", "torch")
"""Values of summary.json that are shown unchanged."""


def summary_table(records: Sequence[RunRecord]) -> str:
    """Results, text, size and machine of every run."""
    return _table(records, _rows([_summary_of(record) for record in records]))


def config_table(records: Sequence[RunRecord]) -> str:
    """Every field of the configurations by its dotted name, those that differ first."""
    columns = []
    for record in records:
        fields = flatten(record.run)
        columns.append({name: str(value).strip("[]") for name, value in fields.items()})
    return _table(records, sorted(_rows(columns), key=lambda row: len(set(row[1:])) == 1))


def _rows(columns: Sequence[dict[str, str]]) -> list[list[str]]:
    """One row for each key, in the order of first appearance; a dash for a missing value."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [[name, *(column.get(name) or "–" for column in columns)] for name in names]


def _table(records: Sequence[RunRecord], rows: Sequence[Sequence[str]]) -> str:
    return table_html(["", *(record.name for record in records)], rows)


def _summary_of(record: RunRecord) -> dict[str, str]:
    """The column of a run, with its known values alone."""
    sign = sign_of(record.run.model.bound)
    column = {"status": record.status}
    done = record.summary
    if done is not None:
        test = done["test"]
        column["test, bits per character"] = f"{sign} {test['bpc']:.4f} ({test['bound']})"
        nats = f"{sign} {test['nats_per_token']:.4f}"
        if test["windows"] > 1:
            nats += f" ± {test['stderr']:.4f}"
        column["test, nats per token, standard error"] = nats
    if record.valid_bpc is not None:
        column["validation, bits per character"] = f"{sign} {record.valid_bpc:.4f}"
    if done is not None:
        idle = untrained(record)
        stages = [
            "not trained (no time)" if block in idle else f"{bpc:.4f}"
            for block, bpc in enumerate(done["stage_valid_bpc"], 1)
        ]
        column["validation after each stage"] = f"{sign} {', '.join(stages)}"
    column["preset, seed"] = f"{record.run.name}, {record.run.seed}"
    column["text"] = Path(record.run.data.source).name
    if record.has_log:
        train = record.train
        column["steps"] = f"{train['step'][-1]:,.0f}"
        column["tokens"] = f"{train['tokens'][-1]:,.0f}"
        column["training, seconds"] = f"{train['seconds'][-1]:,.0f}"
        column["tokens per second, median"] = f"{np.median(train['tokens_per_second']):,.0f}"
    if done is not None:
        for key in filter(done.__contains__, MACHINE):
            value = done[key]
            column[key.replace("_", " ")] = f"{value:,}" if isinstance(value, int) else str(value)
    return column


def untrained(record: RunRecord) -> list[int]:
    """The blocks, from 1 on, for which a finished run had no time: they are as they started."""
    train = record.run.train
    if record.summary is None or train.mode != "progressive":
        return []
    return [block for block, steps in enumerate(train.stage_steps, 1) if steps == 0]


def terms_table(states: Sequence[StateReport], to_bpc: float) -> str:
    """The terms of the bound, and the bound after each block.

    A nat per token is `to_bpc` bits per character.
    """
    first = states[0]
    last = states[-1]
    kl = last.kl.mean
    terms = {
        "log q(z|x)": first.kl.mean + first.base.mean,
        "−log N(u; 0, I)": -last.base.mean,
    }
    for state in states:
        if state.log_det is not None:
            terms[f"−log|det J|, block {state.block}"] = -state.log_det.mean
    terms["−log p(x|z)"] = last.nelbo.mean - kl
    rows = [(name, signed(value, 5), signed(to_bpc * value, 5)) for name, value in terms.items()]
    rows.append(("KL(q(z|x) ‖ p(z))", f"{kl:.5f}", f"{to_bpc * kl:.5f}"))
    for state in states:
        name = f"bound with {state.block} of {last.block} blocks"
        bound = state.nelbo.mean
        rows.append((name, f"<= {bound:.5f}", f"<= {to_bpc * bound:.5f}"))
    return table_html(["", "nats per token", "bits per character"], rows)


def signed(value: float, digits: int = 4) -> str:
    """A number with its sign."""
    rounded = round(value, digits) + 0.0  # -0.0 becomes 0.0
    return f"{rounded:+.{digits}f}".replace("-", "−")
