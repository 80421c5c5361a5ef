"""Errors of OpenAI's protocol: a status of HTTP, and an object that says what is wrong with which field."""

from utils.text import printable


class ProtocolError(Exception):
    """A request that is refused. status: of HTTP; field: which one is wrong; code: a name for programs."""

    def __init__(self, message, field=None, status=400, code=None):
        super().__init__(message)
        self.message = printable(message)
        self.field = field
        self.status = status
        self.code = code

    def body(self):
        """{"error": {...}}, as the clients read it."""
        if self.status >= 500:
            kind = "server_error"
        elif self.status == 401:
            kind = "authentication_error"
        elif self.status == 429:
            kind = "rate_limit_error"
        else:
            kind = "invalid_request_error"
        error = {"message": self.message, "type": kind, "param": self.field, "code": self.code}
        return {"error": error}


def require(condition, message, field=None, status=400, code=None):
    """Raises ProtocolError unless the condition holds."""
    if not condition:
        raise ProtocolError(message, field, status, code)
