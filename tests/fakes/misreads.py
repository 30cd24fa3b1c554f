"""Rows that say more than their texts: each would be trained otherwise than it says, so each is refused by name."""

from typing import Any

ASKED = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}
PAIR = {"prompt": "Why?", "completion": "Because."}
_CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
_TEXT = {"type": "text", "text": "Because."}
_PICTURE = {"type": "image_url", "image_url": {"url": "data:,"}}


def _chat(*messages: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": list(messages), **columns}


def _answer(**fields: Any) -> dict[str, Any]:
    return _chat(ASKED, ANSWER | fields)


# name: (row, kind of the finding, its field)
MISREADS: dict[str, tuple[dict[str, Any], str, str]] = {
    "weight 0": (_answer(weight=0), "untrained_message", "messages[1].weight"),
    "weight a half": (_answer(weight=0.5), "untrained_message", "messages[1].weight"),
    "train false": (_answer(train=False), "untrained_message", "messages[1].train"),
    "train 0": (_answer(train=0), "untrained_message", "messages[1].train"),
    "loss false": (_answer(loss=False), "untrained_message", "messages[1].loss"),
    "a share of the answer": (
        _answer(train_detail=[{"begin_offset": 0, "end_offset": 2, "train": False}]),
        "untrained_message",
        "messages[1].train_detail",
    ),
    "weight in ShareGPT": (
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because.", "weight": 0}]},
        "untrained_message",
        "conversations[1].weight",
    ),
    "reasoning_content": (_answer(reasoning_content="Hm."), "reasoning", "messages[1].reasoning_content"),
    "reasoning": (_answer(reasoning="Hm."), "reasoning", "messages[1].reasoning"),
    "thinking": (_answer(thinking="Hm."), "reasoning", "messages[1].thinking"),
    "a part of thinking": (
        _answer(content=[{"type": "thinking", "thinking": "Hm.", "text": ""}, _TEXT]),
        "reasoning",
        "messages[1].content[0]",
    ),
    "undesired": (PAIR | {"label": False}, "desirable_label", "label"),
    "desired": (PAIR | {"label": True}, "desirable_label", "label"),
    "undesired in words": ({"question": "Why?", "answer": "Because.", "label": "False"}, "desirable_label", "label"),
    "undesired chat": (_chat(ASKED, ANSWER, label=False), "desirable_label", "label"),
    "undesired alpaca": (
        {"instruction": "Why?", "output": "Because.", "kto_tag": False},
        "desirable_label",
        "kto_tag",
    ),
    "preferences on a history": (
        _chat(ASKED, ANSWER, ASKED, chosen=ANSWER, rejected=ANSWER),
        "preference_pair",
        "chosen, rejected",
    ),
    "preferences": ({"prompt": "Why?", "chosen": "Because.", "rejected": "No."}, "preference_pair", "chosen, rejected"),
    "preferences without a prompt": (
        {"chosen": [ASKED, ANSWER], "rejected": [ASKED, ANSWER]},
        "preference_pair",
        "chosen, rejected",
    ),
    "tool_calls alone": (_answer(content=None, tool_calls=[_CALL]), "tool_calls", "messages[1].tool_calls"),
    "tool_calls beside text": (_answer(tool_calls=[_CALL]), "tool_calls", "messages[1].tool_calls"),
    "tool_calls beside parts": (_answer(content=[_TEXT], tool_calls=[_CALL]), "tool_calls", "messages[1].tool_calls"),
    "function_call beside text": (
        _answer(function_call={"name": "look", "arguments": "{}"}),
        "tool_calls",
        "messages[1].function_call",
    ),
    "a call as a part": (
        _answer(content=[_TEXT, {"type": "tool_use", "name": "look", "input": {}}]),
        "tool_calls",
        "messages[1].content[1]",
    ),
    "a call as a turn": (
        {
            "conversations": [
                {"from": "human", "value": "Why?"},
                {"from": "function_call", "value": "{}"},
                {"from": "observation", "value": "so"},
                {"from": "gpt", "value": "Because."},
            ]
        },
        "tool_calls",
        "conversations[1].from",
    ),
    "a column of pictures": (
        _chat(ASKED | {"content": "<image>Why?"}, ANSWER, images=["a.png"]),
        "media",
        "images",
    ),
    "LLaVA's picture": (
        {
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>\nWhy?"}, {"from": "gpt", "value": "Because."}],
        },
        "media",
        "image",
    ),
    "a column of films": (PAIR | {"videos": [{"path": "a.mp4"}]}, "media", "videos"),
    "a column of sounds": ({"text": "Because.", "audios": ["a.wav"]}, "media", "audios"),
    "an empty picture part": (
        _chat(ASKED | {"content": [{"type": "image", "text": ""}, {"type": "text", "text": "Why?"}]}, ANSWER),
        "media",
        "messages[0].content[0]",
    ),
    "a part with a picture": (
        _chat(ASKED | {"content": [_PICTURE, {"type": "text", "text": "Why?"}]}, ANSWER),
        "media",
        "messages[0].content[0]",
    ),
    "a part of sound": (
        _chat(ASKED | {"content": [{"type": "input_audio", "input_audio": {"data": ""}}]}, ANSWER),
        "media",
        "messages[0].content[0]",
    ),
    "pictures with texts of no known form": (
        {"images": [{"bytes": "x"}], "texts": [{"user": "Why?", "assistant": "Because."}]},
        "media",
        "images",
    ),
    "a picture to describe": ({"image": "a.png", "caption": "A cat."}, "media", "image"),
    "the address of a picture": (PAIR | {"image_url": "https://a.test/a.png"}, "media", "image_url"),
    "a film as a part": (
        _chat(ASKED | {"content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "Why?"}]}, ANSWER),
        "media",
        "messages[0].content[0]",
    ),
    "pictures of a message": (_chat(ASKED | {"images": ["a.png"]}, ANSWER), "media", "messages[0].images"),
}
