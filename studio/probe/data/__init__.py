"""Data: files of rows or text of every common kind, with chat messages, prompt/completion, alpaca or plain text."""

from studio.probe.data.read import first_row, inspect_data, read_data
from studio.probe.data.reading import Reading
from studio.probe.data.row_keys import RowKeys, TwinKeys, keys_of, row_keys, twin_keys
from studio.probe.data.rows import Conversation, DataSet, Finding, Message, Part, PlainText, Preference, Row, ToolCall
from studio.probe.data.shipped import shipped_data
from studio.probe.data.split import Split, different_answers, few_answers, split

__all__ = [
    "Conversation", "DataSet", "Finding", "Message", "Part", "PlainText", "Preference", "Reading", "Row", "RowKeys",
    "Split", "ToolCall", "TwinKeys",
    "different_answers", "few_answers", "first_row", "inspect_data", "keys_of", "read_data", "row_keys", "shipped_data",
    "split", "twin_keys",
]  # fmt: skip
