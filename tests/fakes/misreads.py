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
    "weight a half": (_answer(weight=0.5), "fractional_weight", "messages[1].weight"),
    "weight in ShareGPT": (
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because.", "weight": 0.3}]},
        "fractional_weight",
        "conversations[1].weight",
    ),
    "a range beyond the answer": (
        _answer(train_detail=[{"begin_offset": 0, "end_offset": 8, "train": False}]),
        "bad_span",
        "messages[1].train_detail[0]",
    ),
    "encrypted thinking": (
        _answer(content=[{"type": "redacted_thinking", "data": "x"}, _TEXT]),
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
        _chat(ASKED, ANSWER, ASKED, chosen=ANSWER, rejected=ANSWER | {"content": "No."}),
        "preference_pair",
        "chosen, rejected",
    ),
    "preferences": ({"prompt": "Why?", "chosen": "Because.", "rejected": "No."}, "preference_pair", "chosen, rejected"),
    "preferences without a prompt": (
        {"chosen": [ASKED, ANSWER], "rejected": [ASKED, ANSWER | {"content": "No."}]},
        "preference_pair",
        "chosen, rejected",
    ),
    "a call without a name": (
        _answer(content=None, tool_calls=[_CALL | {"function": {"arguments": "{}"}}]),
        "bad_call",
        "messages[1].tool_calls[0].function.name",
    ),
    "a call that is no JSON": (
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "function_call", "value": "look()"}]},
        "bad_call",
        "conversations[1].value",
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
