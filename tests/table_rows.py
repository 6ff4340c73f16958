"""Rows of a table as a caller sends them one by one, compared with what training's reader makes of the file."""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from fraud.features.featurizer import Featurizer, Histories, Matrix
from fraud.schema import FeatureSpec, Row, RowDecoder
from training.replay import replay, requested_columns

RowOfTable = dict[str, Any]


def rows_of_file(path: str | Path) -> list[RowOfTable]:
    """The rows of a file as JSON objects: of CSV texts, of Parquet its values."""
    rows: list[RowOfTable] = []
    for one in sorted(glob.glob(str(path))):
        if one.endswith(".parquet"):
            rows += json.loads(json.dumps(pq.read_table(one).to_pylist(), default=str))
        else:
            with Path(one).open(newline="", encoding="utf-8") as file:
                header = file.readline()
                file.seek(0)
                rows += csv.DictReader(file, delimiter=max(",;|\t", key=header.count))
    return rows


def expect_the_same_rows(
    table: pd.DataFrame,
    spec: FeatureSpec,
    sent: Sequence[RowOfTable],
    amount_quantiles: Sequence[float],
    *,
    may_be_own: bool = False,
) -> tuple[Matrix, list[Row]]:
    """Send rows in the order of a canonical table; each must be read as the table has it, with the same features.

    Where the table has the product's own names, a row `may_be_own`: one whose values are so too.

    Returns the features and the rows as read.
    """
    decoder = RowDecoder(spec)
    rows = [decoder.decode(json.dumps(row).encode(), "$") for row in sent]
    assert len(rows) == len(table)
    assert may_be_own or all(row.reading == "table" for row in rows)
    assert [row.transaction_id for row in rows] == table["transaction_id"].tolist()
    featurizer = Featurizer(spec, list(amount_quantiles))
    X = np.empty((len(table), len(spec.features)))
    if spec.kind == "features":
        requested_columns(table, spec, X)
        online = featurizer.ready(rows)
    else:
        assert [row.event_time_ms for row in rows] == table["event_time_ms"].tolist()
        assert [row.customer_id for row in rows] == table["customer_id"].astype(str).tolist()
        assert [row.amount for row in rows] == table["amount"].tolist()
        assert spec.table is not msgspec.UNSET
        carried = {column.field for column in spec.table.columns}
        for role in [role for role in spec.roles if role.name in carried]:
            values = table[role.name].astype(object)
            assert [row.roles[role.name] for row in rows] == values.where(values.notna(), None).tolist(), role
        unlabelled = table.assign(label=np.int8(-1)).drop(columns="every_label", errors="ignore")
        X = replay(unlabelled, featurizer, slice(0, len(table)))
        histories = Histories.new(rows)
        online = featurizer.advance(rows, histories)
    np.testing.assert_array_equal(online, X)
    return online, rows
