"""Chat messages as clients send them, checked and brought to the form that chat templates take."""

import msgspec

from gemcutter.serve.errors import ApiError, bad_request

ROLES = ("system", "developer", "user", "assistant", "tool")
_PLAIN = ("name", "tool_call_id", "reasoning", "reasoning_content")  # passed on as they are


def check_messages(messages: list[dict]) -> list[dict]:
    """Messages with `content` a string (parts joined), tool arguments parsed, and developer named system.

    Raises ApiError (400) for no messages, unknown roles, missing or non-text content.
    """
    if not messages:
        raise bad_request("messages must not be empty", "messages")
    return [_check(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _check(message: dict, where: str) -> dict:
    role = message.get("role")
    if role not in ROLES:
        raise bad_request(
            f"{where}.role must be one of {', '.join(ROLES)}, got {str(role)[:100]!r}", "messages"
        )
    checked: dict = {"role": "system" if role == "developer" else role}
    calls = message.get("tool_calls")
    if calls:
        if role != "assistant":
            raise bad_request(f"{where}.tool_calls belong to an assistant, not to {role}", "messages")
        checked["tool_calls"] = [
            _call(call, f"{where}.tool_calls") for call in _listed(calls, f"{where}.tool_calls")
        ]
    content = message.get("content")
    if content is None and not calls:
        raise bad_request(f"{where}.content is missing", "messages")
    checked["content"] = _text(content, f"{where}.content")
    for name in _PLAIN:
        value = message.get(name)
        if value is not None:
            if not isinstance(value, str):
                raise bad_request(f"{where}.{name} must be a string", "messages")
            checked[name] = value
    return checked


def _text(content: object, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for part in _listed(content, where):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise _not_text(kind, where)
        if not isinstance(part.get("text"), str):
            raise bad_request(f"{where}: a text part needs a string in 'text'", "messages")
        texts.append(part["text"])
    return "".join(texts)


def _not_text(kind: object, where: str) -> ApiError:
    kind = str(kind)[:100]
    for medium, plural in (
        ("image", "images are"),
        ("audio", "audio is"),
        ("video", "videos are"),
        ("file", "files are"),
    ):
        if medium in kind:
            return bad_request(f"{where}: {plural} not supported, only text parts", "messages")
    return bad_request(f"{where}: parts must be objects of type 'text', got {kind!r}", "messages")


def _call(call: object, where: str) -> dict:
    """One tool call. The API carries its arguments as JSON text; templates walk through an object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise bad_request(f"{where}: each needs a function with a name", "messages")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments)
        except (msgspec.DecodeError, RecursionError) as error:
            raise bad_request(
                f"{where}: arguments of {function['name'][:100]} are not JSON: {error}", "messages"
            ) from error
    if not isinstance(arguments, dict):
        raise bad_request(f"{where}: arguments of {function['name'][:100]} must be a JSON object", "messages")
    checked = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if isinstance(call.get("id"), str):
        checked["id"] = call["id"]
    return checked


def _listed(value: object, where: str) -> list:
    if not isinstance(value, list):
        raise bad_request(f"{where} must be a list, got {type(value).__name__}", "messages")
    return value
