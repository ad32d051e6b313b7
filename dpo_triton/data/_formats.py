"""One row of JSON as a pair: the forms in which people keep preferences, told apart by their shape.

    {"prompt": str, "chosen": str, "rejected": str}                       plain text
    {"prompt": messages, "chosen": messages, "rejected": messages}        a conversation
    {"prompt": str or messages, "chosen": conversation, "rejected": ...}  the prompt said again
    {"chosen": ..., "rejected": ...}                                      their common beginning
    {"conversations": messages, "chosen": message, "rejected": message}   ShareGPT

Messages are {"role": ..., "content": ...} or {"from": ..., "value": ...}; content is a string or a
list of {"type": "text", "text": ...}. A conversation may have "system" and "tools" beside it.
"""

import itertools
import json
import re
from typing import Any, NamedTuple

Message = dict[str, Any]  # role, content, and what else the chat template reads
Text = str | list[Message]  # plain, or messages

ROLES = {  # ShareGPT's names
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
}
# What a model would be shown beside the messages, and would be missing here.
BESIDE = (
    *("image", "images", "video", "videos", "audio", "audios"),
    *("documents", "chat_template_kwargs"),
)
ANSWERING = ("assistant", "user", "tool")  # roles within an answer; the first is scored
CURE = (
    'a row is {"prompt": ..., "chosen": ..., "rejected": ...}: three strings, or three lists of '
    '{"role": str, "content": str}'
)


class Pair(NamedTuple):
    """A prompt and two answers to it: three strings, or three lists of messages."""

    source: str  # file:line
    prompt: Text
    chosen: Text
    rejected: Text
    tools: list[Any] | None = None  # for the chat template


def parse_pair(source: str, text: str | bytes) -> Pair:
    """The pair of one row.

    Args:
        source: "file:line", which begins every message.
        text: JSON of the row.

    Raises:
        ValueError: no JSON object, or not one of the forms above. Nothing of a row is dropped in
            silence: pictures and sound, tools or system beside plain strings, roles without a
            meaning and answers without an assistant's turn are refused.
    """
    try:
        row = json.loads(text)
    except RecursionError as error:
        raise ValueError(
            f"{source}: a row must be one JSON object, got too deep nesting"
        ) from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{source}: a row must be one JSON object: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{source}: a row must be a JSON object, got {type(row).__name__}; {CURE}")
    try:
        return _pair(source, row)
    except _Refused as error:
        raise ValueError(f"{source}: {error}") from error


class _Refused(ValueError):
    """What is wrong with a row, without its source."""


def _pair(source: str, row: dict[str, Any]) -> Pair:
    beside = [name for name in BESIDE if row.get(name)]
    if beside:
        raise _Refused(f"a row must have no {beside[0]}, which cannot be scored; leave it out")
    named = "conversations" if "conversations" in row else "prompt"
    prompt = None if row.get(named) is None else _text(row[named], named)
    missing = [name for name in ("chosen", "rejected") if row.get(name) is None]
    if missing:
        have = ", ".join(row) or "nothing"
        raise _Refused(f"a row must have {missing[0]}, got {have}; {CURE}")
    chosen, rejected = (_text(row[name], name) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise _Refused(
            "a row must have chosen and rejected of one kind, got "
            f"{type(row['chosen']).__name__} and {type(row['rejected']).__name__}; {CURE}"
        )
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            prompt, chosen, rejected = _common_text(chosen, rejected)
        if isinstance(prompt, list):
            chosen, rejected = ([_message("assistant", text)] for text in (chosen, rejected))
    if isinstance(chosen, list) and isinstance(rejected, list):
        prompt, chosen, rejected = _conversation(prompt, chosen, rejected)
    tools, system = _tools(row.get("tools")), row.get("system") or None
    if prompt is None or isinstance(prompt, str):
        unread = "tools" if tools else "system" if system else None
        if unread:
            raise _Refused(f"{unread} needs a chat template; make prompt a list of messages")
        return Pair(source, prompt or "", chosen, rejected)
    if system is not None:
        if prompt[0]["role"] == "system":
            raise _Refused("system is given beside a prompt that begins with one; drop either")
        prompt = [_message("system", _content(system, "system")), *prompt]
    return Pair(source, prompt, chosen, rejected, tools)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _text(field: Any, name: str) -> Text:
    """A string, or messages in one form."""
    if isinstance(field, str):
        return _content(field, name)
    messages = [field] if isinstance(field, dict) else field
    if not isinstance(messages, list) or not messages:
        got = "an empty list" if field == [] else type(field).__name__
        raise _Refused(f"a row must have text or messages in {name}, got {got}; {CURE}")
    return [_normalised(message, f"{name}[{i}]") for i, message in enumerate(messages)]


def _normalised(message: Any, name: str) -> Message:
    if not isinstance(message, dict):
        raise _Refused(f"a row must have messages in {name}, got {type(message).__name__}; {CURE}")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if not isinstance(role, str):
        raise _Refused(f"a row must have a role in {name}, got {', '.join(message)}; {CURE}")
    rest = {k: v for k, v in message.items() if k not in ("role", "from", "content", "value")}
    if content is None and message.get("tool_calls"):
        content = ""
    return {"role": ROLES.get(role, role), "content": _content(content, f"{name}.content"), **rest}


def _content(content: Any, name: str) -> str:
    """A string that can be written as UTF-8, or the texts of its parts."""
    if isinstance(content, list) and content:
        other = [p for p in content if not (isinstance(p, dict) and isinstance(p.get("text"), str))]
        if other:
            kind = other[0].get("type") if isinstance(other[0], dict) else type(other[0]).__name__
            raise _Refused(f"a row must have parts of text in {name}, got {kind}; leave it out")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise _Refused(f"a row must have text in {name}, got {type(content).__name__}; {CURE}")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise _Refused(
            f"a row must have Unicode text in {name}, got half of a surrogate pair at character "
            f"{error.start}; write the file anew from its source"
        ) from error
    return content


def _tools(tools: Any) -> list[Any] | None:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise _Refused(f"tools must be a list, or JSON of one: {error}") from error
    if not tools:
        return None
    if not isinstance(tools, list):
        raise _Refused(f"tools must be a list, or JSON of one, got {type(tools).__name__}")
    return tools


def _common_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The texts' common beginning, up to the last space in it, and what is left of either."""
    same = (a == b for a, b in zip(chosen, rejected, strict=False))
    common = chosen[: sum(1 for _ in itertools.takewhile(bool, same))]
    space = re.search(r"\s\S*\Z", common)
    size = space.start() if space else 0
    return _checked_beginning(chosen[:size], chosen[size:], rejected[size:])


def _checked_beginning(prompt: Any, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    if not prompt or not chosen or not rejected or chosen == rejected:
        raise _Refused(
            "a row without a prompt must have answers that begin alike and then differ; write the "
            "prompt apart"
        )
    return prompt, chosen, rejected


def _conversation(
    prompt: Text | None, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """The prompt as messages, and answers that do not say it again."""
    are_whole = any(answer[0]["role"] not in ("assistant", "tool") for answer in (chosen, rejected))
    if prompt is None or (isinstance(prompt, str) and are_whole):
        same = [a == b for a, b in zip(chosen, rejected, strict=False)]
        size = same.index(False) if False in same else len(same)
        if isinstance(prompt, str) and not any(m["content"] == prompt for m in chosen[:size]):
            raise _Refused(
                "a row whose answers are whole conversations must have its prompt in both, got "
                "another; drop prompt, or write it as messages"
            )
        prompt, chosen, rejected = _checked_beginning(chosen[:size], chosen[size:], rejected[size:])
    elif isinstance(prompt, str):
        prompt = [_message("user", prompt)]
    elif are_whole:
        size = len(prompt)
        if not all(answer[:size] == prompt and answer[size:] for answer in (chosen, rejected)):
            raise _Refused(
                "a row's answers must begin with an assistant's message, or with the whole prompt "
                f"and then one, got {chosen[0]['role']} and {rejected[0]['role']}"
            )
        chosen, rejected = chosen[size:], rejected[size:]
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        roles = [message["role"] for message in answer]
        if roles[0] != "assistant" or not set(roles) <= set(ANSWERING):
            raise _Refused(
                f"a row must have an assistant's message first in {name}, then none but those of "
                f"{', '.join(ANSWERING)}, got {', '.join(roles)}: the assistant's alone are scored"
            )
    assert isinstance(prompt, list)
    return prompt, chosen, rejected
