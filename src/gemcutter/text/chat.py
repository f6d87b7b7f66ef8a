"""Chat: a conversation to one text, by the checkpoint's own Jinja template.

The template comes with the checkpoint, never from a request. It runs in Jinja's immutable sandbox, as transformers
sets it up: underscore attributes, mutation of its inputs and ranges over 100 000 are refused. The sandbox does not
bound time or memory: a checkpoint whose template nests loops or multiplies strings can hang or fill the process
that renders it. Names such as `chat_template` cannot be passed, so a client never brings code.
"""

import inspect
import json

from transformers import PreTrainedTokenizerFast

from gemcutter.text.tokens import Tokenizer

ROLES = ("system", "developer", "user", "assistant", "model", "tool")
MAX_MESSAGES = 10_000
# Arguments of apply_chat_template that are not variables of the template.
RESERVED = frozenset(inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters) - {"kwargs"}


class ChatError(ValueError):
    """The conversation cannot be rendered; the message says why, for the client."""


def render(
    tokenizer: Tokenizer,
    messages: list[dict],
    tools: list[dict] | None = None,
    add_generation_prompt: bool = True,
    **kwargs,
) -> str:
    """The text of a conversation, <bos> as the template writes it: encode it without special tokens.

    Args:
        messages: OpenAI's: "role" and "content" (text, or a list of {"type": "text", "text": …}), on assistants
            "tool_calls", whose arguments may be JSON text, on tools "tool_call_id" or "name".
        tools: OpenAI's function declarations.
        add_generation_prompt: end with the opening of the model's turn.
        kwargs: variables of the template, such as enable_thinking.

    Raises:
        ChatError: no template, no messages, a malformed message, an unknown role, or what the template objects to.
    """
    if tokenizer.chat_template is None:
        raise ChatError("this checkpoint has no chat template; send a plain prompt instead")
    taken = kwargs.keys() & (RESERVED | tokenizer.special_names)
    if taken:
        raise ChatError(f"{', '.join(sorted(taken))} cannot be passed to the chat template")
    if not isinstance(messages, list) or not messages:
        raise ChatError("messages must be a non-empty list")
    if len(messages) > MAX_MESSAGES:
        raise ChatError(f"at most {MAX_MESSAGES} messages, got {len(messages)}")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ChatError("tools must be a list of objects")
    checked = [_checked(index, message) for index, message in enumerate(messages)]
    try:
        return tokenizer.apply_chat_template(
            checked, tools=tools or None, add_generation_prompt=add_generation_prompt, **kwargs
        )
    # The template is code that runs on the client's data: whatever it raises (TypeError, ZeroDivisionError,
    # RecursionError, SecurityError, …) means that these messages cannot be rendered by it.
    except Exception as error:
        raise ChatError(f"the chat template refused the conversation: {error or type(error).__name__}") from error


def _checked(index: int, message: dict) -> dict:
    """The message with tool arguments parsed. Raises ChatError for what no template should see."""
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        raise ChatError(f"{where} must be an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ChatError(f"{where}.role must be one of {', '.join(ROLES)}, got {str(role)[:40]!r}")
    calls = message.get("tool_calls")
    if content is None:
        if role not in ("assistant", "model") or not calls:
            raise ChatError(f"{where}.content is missing")
    elif isinstance(content, list):
        for part in content:
            _check_part(where, part)
    elif not isinstance(content, str) and not (role == "tool" and isinstance(content, dict)):
        raise ChatError(f"{where}.content must be text or a list of parts, got {type(content).__name__}")
    if calls is None:
        return message
    if not isinstance(calls, list):
        raise ChatError(f"{where}.tool_calls must be a list")
    return {**message, "tool_calls": [_parsed(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls)]}


def _check_part(where: str, part: dict) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise ChatError(f"{where}.content has a part of type {str(kind)[:40]!r}; only text is supported")
    if not isinstance(part.get("text"), str):
        raise ChatError(f"{where}.content has a text part without text")


def _parsed(where: str, call: dict) -> dict:
    """Gemma's template writes arguments in its own grammar, so it needs the object and not its JSON text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ChatError(f"{where} must hold a function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise ChatError(f"{where}.function.arguments is not valid JSON: {error}") from error
    if arguments is not None and not isinstance(arguments, dict):
        raise ChatError(f"{where}.function.arguments must be an object")
    return {**call, "function": {**function, "arguments": arguments or {}}}
