"""Rows as published data sets and the guides of other trainers write them, and rows with the mistakes that people make.

`GOOD` has what each must become; `BAD` what must be said of it.
"""

import json
from typing import Any, NamedTuple

from studio.probe.data import Conversation, Message, PlainText, Preference, Row, ToolCall

U, A = Message("user", "Why?"), Message("assistant", "Because.")
BYE, SO = Message("user", "And then?"), Message("assistant", "So.")
NO = Message("assistant", "No idea.")
S = Message("system", "Be brief.")
ASKED, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
NEXT, THEN = {"role": "user", "content": "And then?"}, {"role": "assistant", "content": "So."}
OTHER = {"role": "assistant", "content": "No idea."}
SYSTEM = {"role": "system", "content": "Be brief."}
HUMAN, GPT = {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}
TALK = (U, A)

LOOK = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}}
TOOLS = json.dumps([LOOK])
CALL = ToolCall("look", '{"at": "sky"}', "c1")
BARE = ToolCall("look", '{"at": "sky"}')
CALLS = [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}]
HERMES = (
    "You are a function calling AI model. You are provided with function signatures within <tools></tools> XML tags.\n"
    f"<tools>\n{TOOLS}\n</tools>\nFor each function call return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags as follows:\n<tool_call>\n{'arguments': <args>, 'name': <name>}\n</tool_call>"
)


class Good(NamedTuple):
    """A row, what it becomes, as which format, and what the rows of its file must be."""

    row: dict[str, Any]
    becomes: Row
    format: str = "chat"
    wants: str = "answers"


class Bad(NamedTuple):
    """A row, and the kind of its finding, its field, and words of what was found and wanted."""

    row: dict[str, Any]
    kind: str
    field: str
    found: str
    wanted: str
    how: dict[str, Any] = {}  # noqa: RUF012  never changed


def talk(*turns: Message, **others: Any) -> Conversation:
    """Return the conversation that the only line of a file becomes."""
    return Conversation(turns, 1, **others)


def chat(*messages: dict[str, Any], **columns: Any) -> dict[str, Any]:
    """Return a row of messages."""
    return {"messages": list(messages), **columns}


def answered(**fields: Any) -> dict[str, Any]:
    """Return a row whose answer has other fields."""
    return chat(ASKED, ANSWER | fields)


def preference(*asked: Message, chosen: tuple[Message, ...] = (A,), **others: Any) -> Preference:
    """Return the preference that the only line of a file becomes."""
    return Preference(asked, chosen, (NO,), 1, **others)


_RESULT = Message("tool", "blue", call_id="c1")
_CALLING = Message("assistant", "", calls=(CALL,))
_BARE_CALLING = Message("assistant", "", calls=(BARE,))
_THOUGHT = Message("assistant", "Because.", reasoning="Hm.")
_DETAIL = [{"begin_offset": 0, "end_offset": 3, "train": False}, {"begin_offset": 4, "end_offset": 7, "train": True}]
_WHOLE = {"begin_offset": 0, "end_offset": 2, "train": True}
_PAIR = {"prompt": "Why?", "completion": "Because."}
_TWO = {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."}
_XLAM_TOOLS = [
    {
        "name": "look",
        "description": "Looks.",
        "parameters": {
            "at": {"type": "str", "description": "Where."},
            "times": {"type": "int, optional", "description": "How often."},
            "far": {"type": "bool", "description": "How far.", "default": False},
        },
    }
]
_XLAM_BECOMES = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Looks.",
            "parameters": {
                "type": "object",
                "properties": {
                    "at": {"type": "string", "description": "Where."},
                    "times": {"type": "integer", "description": "How often."},
                    "far": {"type": "boolean", "description": "How far.", "default": False},
                },
                "required": ["at"],
            },
        },
    }
]
_HH = "\n\nHuman: Why?\n\nAssistant: {}"

GOOD: dict[str, Good] = {
    # whole conversations
    "OpenAI": Good(chat(SYSTEM, ASKED, ANSWER), talk(S, U, A)),
    "OpenAI, text parts": Good(chat(ASKED | {"content": [{"type": "text", "text": "Why?"}]}, ANSWER), talk(U, A)),
    "OpenAI, a refusal": Good(
        chat(ASKED, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No idea."}]}), talk(U, NO)
    ),
    "OpenAI, developer": Good(chat({"role": "developer", "content": "Be brief."}, ASKED, ANSWER), talk(S, U, A)),
    "ShareGPT": Good({"conversations": [HUMAN, GPT]}, talk(U, A)),
    "ShareGPT, system above": Good({"conversations": [HUMAN, GPT], "system": "Be brief."}, talk(S, U, A)),
    "ShareGPT, system in it wins": Good(
        {"conversations": [{"from": "system", "value": "Be brief."}, HUMAN, GPT], "system": "x"}, talk(S, U, A)
    ),
    "SlimOrca, weights of prompts": Good(
        {"conversations": [HUMAN | {"weight": 0.0}, GPT | {"weight": 1.0}]}, talk(U, A)
    ),
    "Pygmalion": Good(
        {"conversations": [{"role": "user", "value": "Why?"}, {"role": "bot", "value": "Because."}]}, talk(*TALK)
    ),
    "lmsys, WildChat": Good({"conversation": [ASKED, ANSWER], "model": "m"}, talk(*TALK)),
    "ms-swift's exchanges": Good(
        {
            "conversation": [{"human": "Why?", "assistant": "Because."}, {"human": "And then?", "assistant": "So."}],
            "system": "Be brief.",
        },
        talk(S, U, A, BYE, SO),
    ),
    "Capybara": Good({"conversation": [{"input": "Why?", "output": "Because."}], "source": "x"}, talk(*TALK)),
    "moss, exchanges with a system": Good(
        {"conversation": [{"system": "Be brief.", "human": "Why?", "assistant": "Because."}]}, talk(S, U, A)
    ),
    "ultrachat's first": Good({"id": "1", "data": ["Why?", "Because.", "And then?", "So."]}, talk(U, A, BYE, SO)),
    "daily_dialog": Good({"dialog": ["Why?", "Because."]}, talk(*TALK)),
    "turns of texts": Good({"turns": ["Why?", "Because."]}, talk(*TALK)),
    "dialogue of messages": Good({"dialogue": [ASKED, ANSWER]}, talk(*TALK)),
    "messages as JSON text": Good({"messages": json.dumps([ASKED, ANSWER])}, talk(*TALK)),
    "upper case roles": Good(
        chat({"role": "User", "content": "Why?"}, {"role": "Assistant", "content": "Because."}), talk(*TALK)
    ),
    "a system prompt above messages": Good(chat(ASKED, ANSWER, system_prompt="Be brief."), talk(S, U, A)),
    # prompts and answers
    "TRL": Good(_PAIR, talk(*TALK), "prompt_completion"),
    "TRL, conversational": Good(
        {"prompt": [SYSTEM, ASKED], "completion": [ANSWER]}, talk(S, U, A), "prompt_completion"
    ),
    "TRL, answers in the prompt": Good(
        {"prompt": [ASKED, ANSWER, NEXT], "completion": [THEN]},
        talk(U, Message("assistant", "Because.", learnt=False), BYE, SO),
        "prompt_completion",
    ),
    "MetaMathQA": Good({"query": "Why?", "response": "Because.", "type": "x"}, talk(*TALK), "prompt_completion"),
    "gsm8k": Good({"question": "Why?", "answer": "Because."}, talk(*TALK), "prompt_completion"),
    "Open-Orca": Good(
        {"id": "1", "system_prompt": "Be brief.", "question": "Why?", "response": "Because."},
        talk(S, U, A),
        "prompt_completion",
    ),
    "NuminaMath": Good({"problem": "Why?", "solution": "Because.", "source": "x"}, talk(*TALK), "prompt_completion"),
    "a worked solution before its last number": Good(
        {"problem": "Why?", "solution": "Because.", "answer": "7"}, talk(*TALK), "prompt_completion"
    ),
    "input and output": Good({"input": "Why?", "output": "Because."}, talk(*TALK), "prompt_completion"),
    "Nemotron, input of messages": Good(
        {"input": [ASKED], "output": "Because.", "system_prompt": "Be brief."}, talk(S, U, A), "prompt_completion"
    ),
    "Firefly": Good({"kind": "x", "input": "Why?", "target": "Because."}, talk(*TALK), "prompt_completion"),
    "aya, FLAN": Good({"inputs": "Why?", "targets": "Because."}, talk(*TALK), "prompt_completion"),
    "prompt and answer": Good({"prompt": "Why?", "answer": "Because."}, talk(*TALK), "prompt_completion"),
    "text to SQL, with its tables": Good(
        {"question": "Why?", "context": "CREATE TABLE t", "answer": "Because."},
        talk(Message("user", "Why?\n\nCREATE TABLE t"), A),
        "prompt_completion",
    ),
    "several contexts": Good(
        {"question": "Why?", "contexts": ["One.", "Two."], "answer": "Because."},
        talk(Message("user", "Why?\n\nOne.\n\nTwo."), A),
        "prompt_completion",
    ),
    "SQuAD": Good(
        {"context": "It is.", "question": "Why?", "answers": {"text": ["Because.", "It is."], "answer_start": [0, 0]}},
        talk(Message("user", "Why?\n\nIt is."), A),
        "prompt_completion",
    ),
    "reasoning in a column": Good(
        {"question": "Why?", "reasoning": "Hm.", "answer": "Because."}, talk(U, _THOUGHT), "prompt_completion"
    ),
    "documents": Good(
        _PAIR | {"documents": [{"title": "Sky", "text": "Blue."}]},
        talk(*TALK, template_kwargs='{"documents": [{"title": "Sky", "text": "Blue."}]}'),
        "prompt_completion",
    ),
    # instructions
    "Alpaca": Good({"instruction": "Why?", "input": "", "output": "Because."}, talk(*TALK), "alpaca"),
    "Alpaca with input": Good(
        {"instruction": "Why?", "input": "x", "output": "Because."}, talk(Message("user", "Why?\n\nx"), A), "alpaca"
    ),
    "dolly": Good(
        {"instruction": "Why?", "context": "x", "response": "Because."}, talk(Message("user", "Why?\n\nx"), A), "alpaca"
    ),
    "instruction, output and context": Good(
        {"instruction": "Why?", "context": "x", "output": "Because."}, talk(Message("user", "Why?\n\nx"), A), "alpaca"
    ),
    "LLaMA-Factory's history": Good(
        {"instruction": "And then?", "output": "So.", "system": "Be brief.", "history": [["Why?", "Because."]]},
        talk(S, U, A, BYE, SO),
        "alpaca",
    ),
    "history as JSON text": Good(
        {"instruction": "And then?", "output": "So.", "history": '[["Why?", "Because."]]'},
        talk(U, A, BYE, SO),
        "alpaca",
    ),
    "history of messages": Good(
        {"query": "And then?", "response": "So.", "history": [ASKED, ANSWER]}, talk(U, A, BYE, SO), "prompt_completion"
    ),
    "text": Good({"text": "Once."}, PlainText("Once.", 1), "text"),
    # what is learnt
    "OpenAI's weight 0": Good(
        chat(ASKED, OTHER | {"weight": 0}, NEXT, THEN | {"weight": 1}),
        talk(U, Message("assistant", "No idea.", learnt=False), BYE, SO),
    ),
    "axolotl's train": Good(
        chat(ASKED | {"train": False}, OTHER | {"train": False}, NEXT, THEN | {"train": True}),
        talk(U, Message("assistant", "No idea.", learnt=False), BYE, SO),
    ),
    "ms-swift's loss": Good(
        chat(ASKED, OTHER | {"loss": False}, NEXT, THEN | {"loss": True}),
        talk(U, Message("assistant", "No idea.", learnt=False), BYE, SO),
    ),
    "axolotl's train_detail": Good(
        answered(train_detail=_DETAIL), talk(U, Message("assistant", "Because.", spans=((4, 8),)))
    ),
    "axolotl's older names": Good(
        chat(ASKED, OTHER | {"training": False}, NEXT, THEN | {"training_detail": [_WHOLE]}),
        talk(U, Message("assistant", "No idea.", learnt=False), BYE, SO),
    ),
    "all of it in ranges": Good(
        answered(train_detail=[{"begin_offset": 0, "end_offset": 7, "train": True}]), talk(*TALK)
    ),
    # reasoning
    "reasoning_content": Good(answered(reasoning_content="Hm."), talk(U, _THOUGHT)),
    "reasoning": Good(answered(reasoning="Hm."), talk(U, _THOUGHT)),
    "gpt-oss, thinking": Good(answered(thinking="Hm."), talk(U, _THOUGHT)),
    "reasoning twice the same": Good(answered(reasoning="Hm.", reasoning_content="Hm."), talk(U, _THOUGHT)),
    "reasoning in a field and the text": Good(
        answered(reasoning_content="Hm.", content="<think>\nHm.\n</think>\n\nBecause."), talk(U, _THOUGHT)
    ),
    "Anthropic, thinking": Good(
        answered(
            content=[{"type": "thinking", "thinking": "Hm.", "signature": "x"}, {"type": "text", "text": "Because."}]
        ),
        talk(U, _THOUGHT),
    ),
    "SmolLM3's template variables": Good(
        chat(ASKED, ANSWER, chat_template_kwargs={"enable_thinking": False, "xml_tools": None}),
        talk(*TALK, template_kwargs='{"enable_thinking": false}'),
    ),
    "template variables as text": Good(
        chat(ASKED, ANSWER, chat_template_kwargs='{"enable_thinking": true}'),
        talk(*TALK, template_kwargs='{"enable_thinking": true}'),
    ),
    # tools
    "OpenAI, tool_calls": Good(
        chat(
            ASKED,
            {"role": "assistant", "content": None, "tool_calls": CALLS},
            {"role": "tool", "tool_call_id": "c1", "content": "blue"},
            ANSWER,
            tools=[LOOK],
        ),
        talk(U, _CALLING, _RESULT, A, tools=TOOLS),
    ),
    "tool_calls as JSON text": Good(
        chat(ASKED, {"role": "assistant", "content": "", "tool_calls": json.dumps(CALLS)}, tools=TOOLS),
        talk(U, _CALLING, tools=TOOLS),
    ),
    "tool_calls beside text parts": Good(
        chat(ASKED, ANSWER | {"content": [{"type": "text", "text": "Because."}], "tool_calls": CALLS}),
        talk(U, Message("assistant", "Because.", calls=(CALL,))),
    ),
    "arguments as an object": Good(
        chat(ASKED, {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {"at": "sky"}}}]}),
        talk(U, _BARE_CALLING),
    ),
    "OpenAI's function_call": Good(
        chat(
            ASKED,
            {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": '{"at": "sky"}'}},
            {"role": "function", "name": "look", "content": "blue"},
            ANSWER,
            functions=[LOOK["function"]],
        ),
        talk(U, _BARE_CALLING, Message("tool", "blue", name="look"), A, tools=TOOLS),
    ),
    "LLaMA-Factory's function_call": Good(
        {
            "conversations": [
                HUMAN,
                {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "sky"}}'},
                {"from": "observation", "value": "blue"},
                GPT,
            ],
            "tools": TOOLS,
        },
        talk(U, _BARE_CALLING, Message("tool", "blue"), A, tools=TOOLS),
    ),
    "ms-swift's tool_call twice": Good(
        chat(
            ASKED,
            {"role": "tool_call", "content": '{"name": "look", "arguments": {"at": "sky"}}'},
            {"role": "tool_call", "content": '{"name": "look", "arguments": {"at": "sea"}}'},
            {"role": "tool_response", "content": "blue"},
            {"role": "tool_response", "content": "green"},
            ANSWER,
        ),
        talk(
            U,
            Message("assistant", "", calls=(BARE, ToolCall("look", '{"at": "sea"}'))),
            Message("tool", "blue"),
            Message("tool", "green"),
            A,
        ),
    ),
    "Anthropic, tool_use and tool_result": Good(
        chat(
            ASKED,
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "Because."},
                    {"type": "tool_use", "id": "c1", "name": "look", "input": {"at": "sky"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "blue"}]},
                    {"type": "text", "text": "And then?"},
                ],
            },
            THEN,
            tools=[{"name": "look", "description": "Looks.", "input_schema": {"type": "object"}}],
        ),
        talk(U, Message("assistant", "Because.", calls=(CALL,)), _RESULT, BYE, SO, tools=TOOLS),
    ),
    "a result that is an object": Good(
        chat(ASKED, {"role": "assistant", "tool_calls": CALLS}, {"role": "tool", "content": {"sky": "blue"}}, ANSWER),
        talk(U, _CALLING, Message("tool", '{"sky": "blue"}'), A),
    ),
    "Hermes": Good(
        {
            "conversations": [
                {"from": "system", "value": HERMES},
                HUMAN,
                {"from": "gpt", "value": '<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call>'},
                {"from": "tool", "value": "<tool_response>\nblue\n</tool_response>"},
                GPT,
            ]
        },
        talk(U, _BARE_CALLING, Message("tool", "blue"), A, tools=TOOLS),
    ),
    "Hermes' calls beside a column of tools": Good(
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                HUMAN,
                {
                    "from": "gpt",
                    "value": 'Because.\n<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call>',
                },
            ],
            "tools": TOOLS,
        },
        talk(S, U, Message("assistant", "Because.", calls=(BARE,)), tools=TOOLS),
    ),
    "calls in text without tools stay text": Good(
        chat(ASKED, {"role": "assistant", "content": '<tool_call>{"name": "look", "arguments": {}}</tool_call>'}),
        talk(U, Message("assistant", '<tool_call>{"name": "look", "arguments": {}}</tool_call>')),
    ),
    "Glaive": Good(
        {
            "system": "SYSTEM: You are a helpful assistant with access to the following functions. Use them if "
            f"required -\n{json.dumps(LOOK['function'])}\n",
            "chat": 'USER: Why?\n\n\nASSISTANT: <functioncall> {"name": "look", "arguments": \'{"at": "sky"}\'} '
            "<|endoftext|>\n\n\nFUNCTION RESPONSE: blue\n\n\nASSISTANT: Because. <|endoftext|>\n\n\n",
        },
        talk(
            Message("system", "You are a helpful assistant."), U, _BARE_CALLING, Message("tool", "blue"), A, tools=TOOLS
        ),
    ),
    "Glaive without tools": Good(
        {"system": "SYSTEM: Be brief.", "chat": "USER: Why?\n\n\nASSISTANT: Because. <|endoftext|>\n"}, talk(S, U, A)
    ),
    "xLAM": Good(
        {
            "query": "Why?",
            "answers": '[{"name": "look", "arguments": {"at": "sky"}}]',
            "tools": json.dumps(_XLAM_TOOLS),
        },
        talk(U, _BARE_CALLING, tools=json.dumps(_XLAM_BECOMES)),
        "prompt_completion",
    ),
    "tools in a table, with each other's keys": Good(
        chat(ASKED, ANSWER, tools=[LOOK["function"] | {"strict": None}]), talk(*TALK, tools=TOOLS)
    ),
    # preferences
    "TRL, preference": Good(_TWO, preference(U), "prompt_completion", "pairs"),
    "TRL, conversational preference": Good(
        {"prompt": [ASKED], "chosen": [ANSWER], "rejected": [OTHER]}, preference(U), "chat", "pairs"
    ),
    "TRL, implicit prompt": Good(
        {"chosen": [ASKED, ANSWER], "rejected": [ASKED, OTHER]}, preference(U), "chat", "pairs"
    ),
    "TRL, implicit prompt in texts": Good(
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        Preference(
            (Message("user", "The sky is"),), (Message("assistant", "blue."),), (Message("assistant", "green."),), 1
        ),
        "prompt_completion",
        "pairs",
    ),
    "implicit prompt of several turns": Good(
        {"chosen": [ASKED, ANSWER, NEXT, THEN], "rejected": [ASKED, ANSWER, NEXT, OTHER]},
        preference(U, A, BYE, chosen=(SO,)),
        "chat",
        "pairs",
    ),
    "UltraFeedback, the prompt again": Good(
        {"prompt": "Why?", "chosen": [ASKED, ANSWER], "rejected": [ASKED, OTHER], "score_chosen": 8.0},
        preference(U),
        "chat",
        "pairs",
    ),
    "UltraFeedback, the whole preferred conversation besides": Good(
        {
            "prompt": "Why?",
            "chosen": [ASKED, ANSWER],
            "rejected": [ASKED, OTHER],
            "messages": [ASKED, ANSWER],
        },
        preference(U),
        "chat",
        "pairs",
    ),
    "a history before the answers' own question": Good(
        {"messages": [ASKED, ANSWER], "chosen": [NEXT, ANSWER], "rejected": [NEXT, OTHER]},
        preference(U, A, BYE),
        "chat",
        "pairs",
    ),
    "a system prompt in the prompt alone": Good(
        {"prompt": [SYSTEM, ASKED], "chosen": [ASKED, ANSWER], "rejected": [ASKED, OTHER]},
        preference(S, U),
        "chat",
        "pairs",
    ),
    "Intel's orca_dpo_pairs": Good(
        {"system": "Be brief.", "question": "Why?", "chosen": "Because.", "rejected": "No idea."},
        preference(S, U),
        "prompt_completion",
        "pairs",
    ),
    "hh-rlhf": Good(
        {"chosen": _HH.format("Because."), "rejected": _HH.format("No idea.")}, preference(U), "chat", "pairs"
    ),
    "LLaMA-Factory's ranking": Good(
        {"instruction": "Why?", "input": "x", "chosen": "Because.", "rejected": "No idea."},
        preference(Message("user", "Why?\n\nx")),
        "alpaca",
        "pairs",
    ),
    "LLaMA-Factory's ranking of ShareGPT": Good(
        {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "No idea."}},
        preference(U),
        "chat",
        "pairs",
    ),
    "axolotl's argilla": Good(
        {"instruction": "Why?", "chosen_response": "Because.", "rejected_response": "No idea."},
        preference(U),
        "alpaca",
        "pairs",
    ),
    "ms-swift's rejected_response": Good(
        chat(ASKED, ANSWER, rejected_response="No idea."), preference(U), "chat", "pairs"
    ),
    "ms-swift's rejected_messages": Good(
        chat(ASKED, ANSWER, rejected_messages=[ASKED, OTHER]), preference(U), "chat", "pairs"
    ),
    "OpenAI's preference": Good(
        {
            "input": {"messages": [ASKED], "tools": [LOOK], "parallel_tool_calls": True},
            "preferred_output": [ANSWER],
            "non_preferred_output": [OTHER],
        },
        preference(U, tools=TOOLS),
        "chat",
        "pairs",
    ),
    "a preference checked without an objective": Good(_TWO, preference(U), "prompt_completion", "any"),
    # labels
    "TRL, unpaired": Good(_PAIR | {"label": True}, talk(*TALK, desirable=True), "prompt_completion", "labels"),
    "LLaMA-Factory's kto_tag": Good(
        {"instruction": "Why?", "output": "Because.", "kto_tag": False},
        talk(*TALK, desirable=False),
        "alpaca",
        "labels",
    ),
    "a chat's label": Good(chat(ASKED, ANSWER, label=False), talk(*TALK, desirable=False), "chat", "labels"),
    "a label as a number": Good(_PAIR | {"label": 1}, talk(*TALK, desirable=True), "prompt_completion", "labels"),
    "a label without an objective": Good(
        _PAIR | {"label": False}, talk(*TALK, desirable=False), "prompt_completion", "any"
    ),
}

_NOT_TEXT = "wanted text"
_NAME_ARGUMENTS = "wanted an object with name and arguments"


def _calling(calls: Any) -> dict[str, Any]:
    return chat(ASKED, {"role": "assistant", "content": None, "tool_calls": calls})


_RESULT_OF_NOTHING = {"role": "tool", "tool_call_id": "c9", "content": "blue"}
_PAIRS = {"wants": "pairs"}

BAD: dict[str, Bad] = {
    "no known columns": Bad(
        {"Frage": "Why?", "Antwort": "x"}, "wrong_columns", "", "the columns Frage, Antwort", "wanted messages"
    ),
    "a slip of the finger": Bad(
        {"promt": "a", "completion": "b"}, "wrong_columns", "", "promt", "Did you mean 'promt' for 'prompt'"
    ),
    "another format than asked for": Bad(
        _PAIR, "wrong_columns", "", "prompt", "set data.format to", {"format": "chat"}
    ),
    "a prompt alone": Bad({"prompt": "Why?"}, "wrong_columns", "", "the columns prompt", "prompt + completion"),
    "a dialogue to sum up": Bad(
        {"dialogue": "A: Why?", "summary": "Because."},
        "wrong_columns",
        "",
        "the columns dialogue, summary",
        "data.columns",
    ),
    "a message a row": Bad(ASKED, "wrong_columns", "", "the columns role, content", "all messages of its conversation"),
    "a message of a tree": Bad(
        {"text": "Why?", "role": "prompter", "message_id": "a", "parent_id": None},
        "message_tree",
        "text",
        "one message of a tree",
        "a whole conversation",
    ),
    "a text that is none": Bad({"text": 3}, "not_text", "text", "found a number", _NOT_TEXT),
    "a null prompt": Bad({"prompt": None, "completion": "b"}, "not_text", "prompt", "found null", _NOT_TEXT),
    "an answer that is a number": Bad(
        {"question": "2+2?", "answer": 4}, "not_text", "answer", "found a number", _NOT_TEXT
    ),
    "half a character": Bad(
        {"prompt": "a\ud83d", "completion": "b"}, "lone_surrogate", "prompt", "\\ud83d", "no tokenizer"
    ),
    "half a character in a tool": Bad(
        chat(ASKED, ANSWER, tools=[{"name": "look\ud83d"}]), "lone_surrogate", "tools", "\\ud83d", "no tokenizer"
    ),
    "messages that are text": Bad({"messages": "hello"}, "wrong_type", "messages", "found text", "a list of messages"),
    "messages that are no JSON": Bad(
        {"messages": '[{"role": '}, "wrong_type", "messages", "not JSON", "a list of messages"
    ),
    "messages that are an object": Bad(
        {"messages": {"a": 1}}, "wrong_type", "messages", "the keys a", "a list of messages"
    ),
    "a message that is text": Bad(chat("hello"), "wrong_type", "messages[0]", "found text", "role and content"),  # type: ignore[arg-type]
    "a message without a role": Bad(
        chat({"content": "Why?"}), "wrong_type", "messages[0]", "the keys content", "role and content"
    ),
    "an unknown role": Bad(
        chat({"role": "asistant", "content": "x"}),
        "unknown_role",
        "messages[0].role",
        "'asistant'",
        "Did you mean 'assistant'",
    ),
    "a role that is null": Bad(
        chat({"role": None, "content": "x"}), "unknown_role", "messages[0].role", "the role null", "wanted one of"
    ),
    "no content": Bad(chat({"role": "user"}, ANSWER), "not_text", "messages[0].content", "found nothing", _NOT_TEXT),
    "content that is null": Bad(
        chat(ASKED, {"role": "assistant", "content": None}), "not_text", "messages[1].content", "found null", _NOT_TEXT
    ),
    "content that is an object": Bad(
        chat(ASKED | {"content": {"a": 1}}, ANSWER), "not_text", "messages[0].content", "the keys a", _NOT_TEXT
    ),
    "a part that is no text": Bad(
        chat(ASKED | {"content": [{"type": "text", "text": 3}]}, ANSWER),
        "not_text",
        "messages[0].content",
        "found a list",
        _NOT_TEXT,
    ),
    "an exchange without an answer": Bad(
        {"conversation": [{"human": "Why?"}]}, "wrong_type", "conversation[0]", "the keys human", "role and content"
    ),
    "an exchange whose answer is a number": Bad(
        {"conversation": [{"human": "a", "gpt": 1}]}, "not_text", "conversation[0].gpt", "found a number", _NOT_TEXT
    ),
    "a chat in a text without speakers": Bad(
        {"chat": "Why? Because."}, "wrong_type", "chat", "found text without USER", "a list of messages"
    ),
    "a system prompt that is a list": Bad(_PAIR | {"system": ["a"]}, "not_text", "system", "found a list", _NOT_TEXT),
    "a system prompt in a prompt's object": Bad(
        {"prompt": {"a": 1}, "completion": "b"}, "wrong_type", "prompt", "the keys a", "a list of messages"
    ),
    # calls
    "calls that are no JSON": Bad(
        _calling("look()"), "bad_call", "messages[1].tool_calls", "not JSON", _NAME_ARGUMENTS
    ),
    "a call that is a number": Bad(
        _calling([7]), "bad_call", "messages[1].tool_calls[0]", "found a number", _NAME_ARGUMENTS
    ),
    "a call without a name": Bad(
        _calling([{"function": {"arguments": "{}"}}]),
        "bad_call",
        "messages[1].tool_calls[0].function.name",
        "no name",
        "the name of the tool",
    ),
    "a name that is a number": Bad(
        _calling([{"name": 3, "arguments": {}}]),
        "bad_call",
        "messages[1].tool_calls[0].name",
        "a number",
        "the name of the tool",
    ),
    "arguments that are no JSON": Bad(
        _calling([{"name": "look", "arguments": "at=sky"}]),
        "bad_call",
        "messages[1].tool_calls[0].arguments",
        "not JSON",
        "an object",
    ),
    "arguments that are a list": Bad(
        _calling([{"name": "look", "arguments": "[1]"}]),
        "bad_call",
        "messages[1].tool_calls[0].arguments",
        "a list",
        "an object of arguments",
    ),
    "arguments with NaN": Bad(
        _calling([{"name": "look", "arguments": '{"a": NaN}'}]),
        "bad_call",
        "messages[1].tool_calls[0].arguments",
        "NaN",
        "an object",
    ),
    "a function_call without a name": Bad(
        chat(ASKED, ANSWER | {"function_call": {"arguments": "{}"}}),
        "bad_call",
        "messages[1].function_call.name",
        "no name",
        "the name of the tool",
    ),
    "a turn of a call that is prose": Bad(
        {"conversations": [HUMAN, {"from": "function_call", "value": "look at the sky"}]},
        "bad_call",
        "conversations[1].value",
        "not JSON",
        _NAME_ARGUMENTS,
    ),
    "a tool_use without a name": Bad(
        answered(content=[{"type": "tool_use", "input": {}}]),
        "bad_call",
        "messages[1].content[0].name",
        "no name",
        "the name of the tool",
    ),
    "a user who calls": Bad(
        chat(ASKED | {"tool_calls": CALLS}, ANSWER),
        "bad_call",
        "messages[0]",
        "a call in a turn of role user",
        "only an assistant",
    ),
    "a result of no call": Bad(
        chat(ASKED, ANSWER, NEXT, _RESULT_OF_NOTHING, THEN),
        "result_without_call",
        "messages[3]",
        "'c9'",
        "the assistant's call first",
    ),
    "a result of another call": Bad(
        chat(ASKED, {"role": "assistant", "tool_calls": CALLS}, _RESULT_OF_NOTHING, ANSWER),
        "result_without_call",
        "messages[2]",
        "'c9'",
        "the assistant's call first",
    ),
    "a result after the next question": Bad(
        chat(ASKED, {"role": "assistant", "tool_calls": CALLS}, NEXT, {"role": "tool", "content": "blue"}, THEN),
        "result_without_call",
        "messages[3]",
        "found a result",
        "the assistant's call first",
    ),
    "a result before its call": Bad(
        chat(ASKED, {"role": "tool", "content": "blue"}, {"role": "assistant", "tool_calls": CALLS}),
        "result_without_call",
        "messages[1]",
        "found a result",
        "the assistant's call first",
    ),
    "xLAM's answers cut off": Bad(
        {"query": "Why?", "answers": '[{"name": "lo'}, "bad_call", "answers", "not JSON", "a list of calls"
    ),
    "a call of Glaive's that is none": Bad(
        {"chat": "USER: Why?\n\n\nASSISTANT: <functioncall> look <|endoftext|>", "system": ""},
        "bad_call",
        "chat: turn 1",
        "not JSON",
        _NAME_ARGUMENTS,
    ),
    # tools
    "tools that are no JSON": Bad(
        chat(ASKED, ANSWER, tools="look"), "bad_tools", "tools", "not JSON", "a list of tools"
    ),
    "tools that are a number": Bad(chat(ASKED, ANSWER, tools=3), "bad_tools", "tools", "a number", "a list of tools"),
    "a tool that is text": Bad(
        chat(ASKED, ANSWER, tools=["look"]), "bad_tools", "tools[0]", "not JSON", "name, description"
    ),
    "a tool without a name": Bad(
        chat(ASKED, ANSWER, tools=[{"description": "Looks."}]),
        "bad_tools",
        "tools[0].name",
        "no name",
        "the name of the tool",
    ),
    "Glaive's tools cut off": Bad(
        {"chat": "USER: Why?\n\nASSISTANT: So.", "system": 'SYSTEM: functions -\n{"name": "lo'},
        "bad_tools",
        "system",
        "not JSON",
        "an object for each",
    ),
    # beside
    "a history of three": Bad(
        {"instruction": "a", "output": "b", "history": [["x", "y", "z"]]},
        "bad_history",
        "history[0]",
        "a list of 3",
        "a question and its answer",
    ),
    "a history that is prose": Bad(
        {"instruction": "a", "output": "b", "history": "so far"},
        "bad_history",
        "history",
        "not JSON",
        "a list of pairs",
    ),
    "a history that is an object": Bad(
        _PAIR | {"history": {"a": 1}}, "bad_history", "history", "the keys a", "a list of pairs"
    ),
    "template variables in a list": Bad(
        chat(ASKED, ANSWER, chat_template_kwargs=["x"]),
        "bad_template_kwargs",
        "chat_template_kwargs",
        "a list",
        "an object",
    ),
    "template variables that are no JSON": Bad(
        chat(ASKED, ANSWER, chat_template_kwargs="thinking"),
        "bad_template_kwargs",
        "chat_template_kwargs",
        "not JSON",
        "an object",
    ),
    "a document that is a number": Bad(
        _PAIR | {"documents": [3]}, "bad_documents", "documents[0]", "a number", "title and text"
    ),
    "a context in pieces": Bad(
        {"question": "a", "answer": "b", "context": {"title": ["x"]}},
        "bad_context",
        "context",
        "the keys title",
        "data.prompt",
    ),
    # what is learnt
    "a weight of a half": Bad(answered(weight=0.5), "fractional_weight", "messages[1].weight", "found 0.5", "0 or 1"),
    "a weight of two": Bad(answered(weight=2), "fractional_weight", "messages[1].weight", "found 2", "0 or 1"),
    "a flag in words": Bad(answered(train="no"), "fractional_weight", "messages[1].train", "found text", "0 or 1"),
    "a range without an end": Bad(
        answered(train_detail=[{"begin_offset": 0, "train": True}]),
        "bad_span",
        "messages[1].train_detail[0]",
        "the keys",
        "end_offset",
    ),
    "a range beyond its text": Bad(
        answered(train_detail=[{"begin_offset": 0, "end_offset": 8, "train": True}]),
        "bad_span",
        "messages[1].train_detail[0]",
        "0 to 8 of a text of 8",
        "wanted 0 to 7",
    ),
    "ranges one over the other": Bad(
        answered(train_detail=[_DETAIL[0], _DETAIL[0]]),
        "bad_span",
        "messages[1].train_detail[1]",
        "a range before it",
        "each once",
    ),
    "untrained where all is trained": Bad(
        answered(weight=0),
        "untrained_message",
        "messages[1].weight",
        "found 0",
        "data.answers_only",
        {"answers_only": False},
    ),
    "an untrained prompt where all is trained": Bad(
        chat(ASKED | {"train": False}, ANSWER),
        "untrained_message",
        "messages[0].train",
        "found false",
        "data.answers_only",
        {"answers_only": False},
    ),
    # reasoning
    "two reasonings": Bad(
        answered(reasoning="Hm.", reasoning_content="Ah."),
        "reasoning",
        "messages[1].reasoning_content",
        "two different",
        "in one of them",
    ),
    "reasoning of two kinds": Bad(
        answered(reasoning_content="Hm.", content="<think>Ah.</think>Because."),
        "reasoning",
        "messages[1]",
        "another in the text",
        "in one of them",
    ),
    "a user who reasons": Bad(
        chat(ASKED | {"reasoning_content": "Hm."}, ANSWER),
        "reasoning",
        "messages[0].reasoning_content",
        "role user",
        "only an assistant",
    ),
    "reasoning that is a list": Bad(
        answered(reasoning=["Hm."]), "not_text", "messages[1].reasoning", "a list", _NOT_TEXT
    ),
    # preferences and labels
    "two answers where one is learnt": Bad(
        _TWO, "preference_pair", "chosen, rejected", "a preferred and a rejected", 'train.objective = "dpo"'
    ),
    "ms-swift's two answers where one is learnt": Bad(
        chat(ASKED, ANSWER, rejected_response="No idea."),
        "preference_pair",
        "messages, rejected_response",
        "a preferred",
        "train.objective",
    ),
    "one answer where two are wanted": Bad(_PAIR, "no_pair", "", "prompt, completion", "chosen and rejected", _PAIRS),
    "a rejected answer that is empty": Bad(
        _TWO | {"rejected": " "}, "no_pair", "", "rejected", "chosen and rejected", _PAIRS
    ),
    "two texts that begin differently": Bad(
        {"chosen": "Blue.", "rejected": "Green."},
        "no_prompt",
        "chosen, rejected",
        "no prompt",
        "a column prompt",
        _PAIRS,
    ),
    "two lists of answers alone": Bad(
        {"chosen": [ANSWER], "rejected": [OTHER]},
        "no_prompt",
        "chosen, rejected",
        "no prompt",
        "a column prompt",
        _PAIRS,
    ),
    "a chosen answer that is a number": Bad(
        _TWO | {"chosen": 3}, "wrong_type", "chosen", "a number", "a list of messages", _PAIRS
    ),
    "two answers where labels are wanted": Bad(
        _TWO, "preference_pair", "chosen, rejected", "a preferred", "train.objective", {"wants": "labels"}
    ),
    "a label where it is not learnt": Bad(
        _PAIR | {"label": False}, "desirable_label", "label", "found false", "remove the column"
    ),
    "no label": Bad(_PAIR, "no_label", "label", "found no label", "true or false", {"wants": "labels"}),
    "a label that is a class": Bad(
        _PAIR | {"label": "joy"}, "no_label", "label", "found joy", "true or false", {"wants": "labels"}
    ),
    "a label of a text": Bad(
        {"text": "Once."}, "no_label", "text", "a plain text", "a label true or false", {"wants": "labels"}
    ),
}
