"""Data files: JSON Lines, JSON and Parquet with chat messages, prompt/completion, alpaca or plain text."""

from studio.probe.data.read import inspect_data, read_data
from studio.probe.data.rows import Conversation, DataSet, Finding, Message, PlainText, Row
from studio.probe.data.shipped import shipped_data
from studio.probe.data.split import Split, known_rows, split

__all__ = [
    "Conversation", "DataSet", "Finding", "Message", "PlainText", "Row", "Split",
    "inspect_data", "known_rows", "read_data", "shipped_data", "split",
]  # fmt: skip
