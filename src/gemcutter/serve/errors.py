"""ApiError: what a client is told when its request fails, as OpenAI's error object."""

import msgspec
from starlette.responses import Response


class ApiError(Exception):
    """`status` is the HTTP status; `param` names the request's field at fault, where there is one."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    @property
    def type(self) -> str:
        if self.status >= 500:
            return "server_error"
        return {401: "authentication_error", 404: "not_found_error"}.get(self.status, "invalid_request_error")

    def body(self) -> bytes:
        return msgspec.json.encode(
            {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}
        )

    def response(self) -> Response:
        headers = {"www-authenticate": "Bearer"} if self.status == 401 else {}
        if self.status in (408, 413):
            headers["connection"] = "close"  # the rest of the body is not read
        return Response(self.body(), self.status, headers, "application/json")


def bad_request(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param)


class ClientGone(Exception):
    """The client closed its connection: nobody reads the answer any more."""
