"""Kafka in and out: transactions and labels are read, verdicts are written, each transaction decided exactly once.

A batch of records is decided and recorded in the store, then its verdicts, its dead letters and the offsets of what was
read are committed in one Kafka transaction. A record that is delivered again, after a crash say, gets the decision on
record, so who reads committed records sees one verdict for each transaction.
"""
