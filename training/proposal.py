"""Proposes a first mapping for a file from its columns, and marks what is doubtful."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from pydantic import ValidationError

from fraud.errors import DataError
from training.csv_files import SUFFIXES, CsvFile, Dialect
from training.files import Files, Given
from training.mapping import Mapping

SAMPLE_ROWS = 20_000
MAX_CATEGORIES = 200
PATTERN_FROM = 5
_ROLES: dict[str, tuple[str, ...]] = {
    "label": (
        *("isfraud", "fraudbool", "fraud", "txfraud", "fraudlabel", "fraudflag", "isfraudulent"),
        *("label", "class", "target"),
    ),
    "event_time": (
        *("eventtime", "unixtime", "timestamp", "datetime", "txdatetime", "transdatetranstime", "transactiontime"),
        *("transactiondate", "transactiondt", "createdat", "appliedat", "when", "date", "time", "step", "month"),
    ),
    "amount": ("amount", "amt", "transactionamt", "transactionamount", "txamount", "amountusd", "value"),
    "customer_id": (
        *("customerid", "customer", "userid", "ccnum", "cardnumber", "cardid", "accountid", "clientid", "nameorig"),
        *("user", "card", "card1", "account"),
    ),
    "merchant_id": ("merchantid", "merchant", "terminalid", "merchantname", "shopid", "shop", "namedest", "sellerid"),
    "transaction_id": ("transactionid", "transid", "transnum", "txid", "trxid", "applicationid", "id"),
    "category": ("category", "mcc", "merchantcategory", "type", "transactiontype", "productcd"),
    "channel": ("channel", "usechip", "entrymode"),
    "currency": ("currency", "currencycode", "ccy", "cur"),
    "device_id": ("deviceid", "device"),
    "label_time": ("labeltime", "chargebackdate", "chargebackat", "chargedbackat"),
    "processing_time": ("processingtime", "arrivaltime"),
    "latitude": ("latitude", "lat"),
    "longitude": ("longitude", "long", "lon", "lng"),
    "merchant_latitude": ("merchantlatitude", "merchlat"),
    "merchant_longitude": ("merchantlongitude", "merchlong", "merchlon"),
}
_HISTORY_NEEDS = ("event_time", "customer_id", "amount")
_TELLS = re.compile(r"fraud|chargeback|dispute|scenario|typology|flagged", re.IGNORECASE)
_ISO = re.compile(r"\d{4}-\d{2}-\d{2}([T ]\d{1,2}:\d{2}.*)?")
_FORMATS = (
    *("%m/%d/%Y %H:%M:%S", "%m/%d/%Y %H:%M", "%d/%m/%Y %H:%M:%S", "%d/%m/%Y %H:%M", "%d.%m.%Y %H:%M:%S"),
    *("%d.%m.%Y %H:%M", "%Y/%m/%d %H:%M:%S", "%Y%m%d%H%M%S", "%Y%m%d", "%m/%d/%Y", "%d/%m/%Y", "%d.%m.%Y"),
)
_SIGNS = "$€£¥"
_FLAGS = {"0", "1", "0.0", "1.0", "true", "false", "t", "f", "yes", "no", "y", "n"}


@dataclass
class Proposal:
    """The lines of a mapping in the making."""

    sample: pd.DataFrame
    """Some first rows, every value as text."""
    lines: list[str] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)

    def add(self, key: str, value: object, doubt: str = "") -> None:
        self.lines.append(f"{key}: {_yaml(value)}" + (f" # {doubt}" if doubt else ""))

    def values(self, column: str) -> pd.Series[str]:
        """The values of a column that are not missing."""
        return self.sample[column].dropna()

    def numbers(self, column: str) -> pd.Series[float] | None:
        """The values as numbers; None unless all are."""
        found = pd.to_numeric(self.values(column), errors="coerce")
        return None if found.isna().any() or found.empty else found


def propose(given: Given) -> str:
    """Return a mapping as YAML, each guess that may be wrong with a comment.

    Parameters
    ----------
    given : path, or several
        What `training.files.Files.find` takes; the first rows of the first file are looked at.

    Raises
    ------
    DataError
        The file cannot be read.
    """
    files = Files.find(given)
    sample, delimiter = _sample(files)
    proposal = Proposal(sample)
    roles = _by_name(list(sample.columns))
    is_history = all(role in roles for role in _HISTORY_NEEDS)
    proposal.lines = [
        f"# From the first {len(sample):,} rows of {files.paths[0].name}. Each comment is a doubt: look at it.",
        f"kind: {'transaction' if is_history else 'features'}",
    ]
    if delimiter not in (None, ","):
        proposal.add("delimiter", delimiter)
    for role in _ROLES:
        if role in roles and (is_history or role in ("label", "event_time", "transaction_id", "label_time")):
            _role(proposal, role, roles[role])
    if "label" in roles and (is_history or "label_time" in roles):
        proposal.add("label_delay", "7d", "after how long is a fraud known?")
    elif "label" not in roles:
        proposal.lines.append("# label: which column says what was fraud?")
    if not is_history:
        missing = [role for role in _HISTORY_NEEDS if role not in roles]
        proposal.lines.append(f"# of ready features, as no column looks like {', '.join(missing)}")
        proposal.lines.append("# stake: which column is the money that a fraud would cost?")
    _further(proposal)
    text = "\n".join(proposal.lines) + "\n"
    try:
        Mapping.model_validate(yaml.safe_load(text))
    except ValidationError as error:
        why = "; ".join(problem["msg"].removeprefix("Value error, ") for problem in error.errors())
        raise DataError(f"{files.paths[0].name}: no mapping can be proposed: {why}") from error
    return text


def _sample(files: Files) -> tuple[pd.DataFrame, str | None]:
    path = files.paths[0]
    if path.name.lower().endswith(SUFFIXES):
        file = CsvFile.open(path, Dialect(), [])
        table, delimiter = file.first_rows(), file.delimiter
    else:
        try:
            table, delimiter = next(pq.ParquetFile(path).iter_batches(SAMPLE_ROWS), None), None
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path.name}: cannot be read as Parquet: {error}") from error
    if table is None or table.num_rows == 0:
        raise DataError(f"{path.name}: the file has no rows")
    return pd.DataFrame({name: _texts(table.column(i)) for i, name in enumerate(table.schema.names)}), delimiter


def _texts(values: pa.Array) -> pd.Series[str]:
    """Return the values as text; values without a text form, such as lists, become missing."""
    try:
        text = pc.cast(values, pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        text = pa.nulls(len(values), pa.string())
    found: pd.Series[str] = text.to_pandas()
    return found


def _by_name(columns: Sequence[str]) -> dict[str, str]:
    """Role → the column whose name is most similar to the role's usual names."""
    plain = {re.sub(r"[^a-z0-9]", "", column.lower()): column for column in reversed(columns)}
    found: dict[str, str] = {}
    for role, names in _ROLES.items():
        for name in names:
            if name in plain and plain[name] not in found.values():
                found[role] = plain[name]
                break
    if {"year", "month", "day"} <= set(plain):
        found["event_time"] = plain["year"]
    for prefix in ("", "merchant_"):
        pair = {f"{prefix}latitude", f"{prefix}longitude"}
        if len(pair & set(found)) == 1:
            found.pop(*(pair & set(found)))
    return found


def _role(proposal: Proposal, role: str, column: str) -> None:
    proposal.taken.add(column)
    if role in ("event_time", "processing_time", "label_time"):
        _time(proposal, role, column)
    elif role == "label":
        words = set(proposal.values(column).str.lower())
        proposal.add(
            "label",
            column,
            "" if words <= _FLAGS else f"which of {', '.join(sorted(words)[:5])} is fraud? see positive",
        )
    elif role == "amount":
        _amount(proposal, column)
    elif role == "customer_id" and column.lower() == "user" and "Card" in proposal.sample:
        proposal.taken.add("Card")
        proposal.add("customer_id", {"columns": [column, "Card"]}, "or the user alone")
    elif role == "transaction_id":
        repeated = proposal.sample[column].duplicated().any()
        if repeated:
            proposal.lines.append(f"# transaction_id: {column} comes more than once")
        else:
            proposal.add(role, column)
    elif role == "customer_id":
        share = proposal.sample[column].nunique() / max(len(proposal.sample), 1)
        proposal.add(
            role, column, "nearly every row has another: is there a column that comes again?" if share > 0.9 else ""
        )
    else:
        proposal.add(role, column)


def _time(proposal: Proposal, role: str, column: str) -> None:
    parts = {re.sub(r"[^a-z]", "", name.lower()): name for name in proposal.sample.columns}
    if role == "event_time" and {"year", "month", "day"} <= set(parts):
        columns = [parts[part] for part in ("year", "month", "day", "time") if part in parts]
        proposal.taken.update(columns)
        pattern = "%Y %m %d" + (" %H:%M" if len(columns) == 4 else "")
        proposal.add(role, {"columns": columns, "format": pattern, "timezone": "UTC"}, "where did the clock stand?")
        return
    numbers, texts = proposal.numbers(column), proposal.values(column)
    if numbers is not None:
        low, high = float(numbers.min()), float(numbers.max())
        for unit, scale in (("s", 1), ("ms", 1_000)):
            if 315_532_800 * scale <= low <= high < 7_258_118_400 * scale:
                proposal.add(role, {"column": column, "unit": unit})
                return
        unit = "month" if column.lower() == "month" else "s" if high > 100_000 else "h"
        guess = {"column": column, "unit": unit, "start": "2024-01-01"}
        proposal.add(role, guess, f"from {low:g} to {high:g}: what does it count, and from when?")
    elif texts.map(lambda text: _ISO.fullmatch(text) is not None).all():
        if texts.str.contains(r":\d{2}.*(?:[zZ]|[+-]\d{2}:?\d{2}|[+-]\d{2})$").all():
            proposal.add(role, column)
        else:
            proposal.add(role, {"column": column, "timezone": "UTC"}, "where did the clock stand?")
    else:
        fits = [form for form in _FORMATS if pd.to_datetime(texts, format=form, errors="coerce").notna().all()]
        if fits:
            doubt = "where did the clock stand?" + (f" or is the format {fits[1]}?" if len(fits) > 1 else "")
            proposal.add(role, {"column": column, "format": fits[0], "timezone": "UTC"}, doubt)
        else:
            proposal.add(role, column, f"{texts.iloc[0] if len(texts) else 'empty'!r} is no time: give its format")


def _amount(proposal: Proposal, column: str) -> None:
    proposal.add("amount", column)
    texts = proposal.values(column)
    numbers = proposal.numbers(column)
    if numbers is None:
        sign = next((sign for sign in _SIGNS if texts.str.contains(sign, regex=False).any()), None)
        comma = texts.str.contains(r",\d{1,2}\D*$").any()
        groups = texts.str.contains(r"\d\.\d{3}" if comma else r"\d,\d{3}").any()
        form = {
            "decimal": "," if comma else None,
            "thousands": ("." if comma else ",") if groups else None,
            "sign": sign,
        }
        proposal.add("numbers", {key: value for key, value in form.items() if value}, "of every column of numbers")
        plain = texts.str.replace(sign or "", "", regex=False)
        if groups:
            plain = plain.str.replace("." if comma else ",", "", regex=False)
        numbers = pd.to_numeric(plain.str.replace(",", ".", regex=False), errors="coerce")
    if (numbers == 0).any():
        proposal.add("on_zero_amount", "drop", f"{(numbers == 0).mean():.2%} of the rows")
    if (numbers < 0).any():
        proposal.add(
            "on_negative_amount", "drop", f"refunds, {(numbers < 0).mean():.2%} of the rows? absolute keeps them"
        )


def _further(proposal: Proposal) -> None:
    """Add the other columns by their content; columns that would leak the label are left out."""
    groups: dict[str, list[str]] = {"numeric": [], "boolean": [], "categorical": []}
    left_out = []
    columns = [column for column in proposal.sample.columns if column not in proposal.taken]
    series = {
        prefix: members
        for prefix, members in _series(columns).items()
        if len({_kind(proposal, column) for column in members} - {"boolean"}) < 2
    }
    of_series = {column: prefix for prefix, members in series.items() for column in members}
    entries = dict.fromkeys(f"{of_series[column]}*" if column in of_series else column for column in columns)
    for name in entries:
        members = series.get(name.removesuffix("*"), [name])
        if not name.strip():
            left_out.append("# a column without a name")
            continue
        if _counts_rows(proposal, name):
            left_out.append(f"# {name}: does it count the rows?")
            continue
        if _TELLS.search(name):
            left_out.append(f"# {name}: does it leak the label?")
            continue
        kinds = {_kind(proposal, column) for column in members}
        if None in kinds:
            left_out.append(f"# {name}: {proposal.sample[members[0]].nunique():,} texts, too many for categories?")
            continue
        group = next(kind for kind in ("categorical", "numeric", "boolean") if kind in kinds)
        options: dict[str, str] = {}
        if not _is_free(name):
            options["column"] = name
            name = f"my_{name}"
        if proposal.sample[members].isna().any(axis=None):
            options["missing"] = "allowed"
        if group == "categorical":
            options["unknown"] = "missing"
        doubt = "is -1 a missing value? then missing_values: [-1], missing: allowed"
        marked = group == "numeric" and any(_uses_minus_one(proposal, column) for column in members)
        groups[group].append(_yaml({name: options})[1:-1] + (f" # {doubt}" if marked else ""))
    for heading, lines in groups.items():
        if lines:
            proposal.lines += [f"{heading}:", *(f"  {line}" for line in lines)]
    proposal.lines += left_out


def _counts_rows(proposal: Proposal, name: str) -> bool:
    numbers = proposal.numbers(name) if name in proposal.sample else None
    return numbers is not None and len(numbers) > 2 and bool((numbers.diff().iloc[1:] == 1).all())


def _uses_minus_one(proposal: Proposal, column: str) -> bool:
    numbers = proposal.numbers(column)
    return numbers is not None and bool((numbers == -1).any()) and bool((numbers >= -1).all())


def _yaml(value: object) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _series(columns: Sequence[str]) -> dict[str, list[str]]:
    """Prefix → its columns, if several are the prefix and a number, and no other column has the prefix."""
    found: dict[str, list[str]] = {}
    for column in columns:
        match = re.fullmatch(r"(\D*[A-Za-z_])\d+", column)
        if match:
            found.setdefault(match[1], []).append(column)
    return {
        prefix: members
        for prefix, members in found.items()
        if len(members) >= PATTERN_FROM and sum(column.startswith(prefix) for column in columns) == len(members)
    }


def _kind(proposal: Proposal, column: str) -> str | None:
    """Return the group of a column; None for a text with too many values."""
    values = proposal.values(column)
    if values.nunique() == 2 and set(values.str.lower()) <= _FLAGS:
        return "boolean"
    if len(values) == 0 or proposal.numbers(column) is not None:
        return "numeric"
    return "categorical" if values.nunique() <= MAX_CATEGORIES else None


def _is_free(name: str) -> bool:
    try:
        Mapping.model_validate({"kind": "features", "numeric": [name]})
        Mapping.model_validate({"event_time": "t ", "customer_id": "c ", "amount": "a ", "numeric": [name]})
    except ValueError:
        return False
    return True
