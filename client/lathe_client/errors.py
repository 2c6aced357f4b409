"""What can go wrong, as exceptions; all of them are `LatheError`."""


class LatheError(Exception):
    """Base of every error of this package."""


class ConnectionFailedError(LatheError):
    """No answer came: the service is not reached, or went away, and the retries are spent."""


class UnexpectedAnswerError(LatheError):
    """An answer that no Lathe service gives: something else listens there, or a stream ended early."""


class ApiStatusError(LatheError):
    """The service refused, after the retries that make sense.

    Attributes:
        status: of HTTP.
        code: stable and machine-readable, such as "prompt_not_found".
        param: the field at fault, or None.
        request_id: to find the request in the service's log; None where the answer had none.
        is_repeated: the request was sent before and its answer was lost, so that it may have been carried out then.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str,
        param: str | None = None,
        request_id: str | None = None,
        is_repeated: bool = False,
    ) -> None:
        where = f" (parameter {param})" if param else ""
        super().__init__(f"{message}{where} [{status} {code}]")
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.request_id = request_id
        self.is_repeated = is_repeated


class JobEndedError(LatheError):
    """A job that was waited for ended without success.

    Attributes:
        status: "failed" or "cancelled".
        code: of the job's error; None where it has none.
    """

    def __init__(self, job_id: str, status: str, code: str | None, message: str) -> None:
        super().__init__(f"job {job_id} {status}: {message}")
        self.job_id = job_id
        self.status = status
        self.code = code


class StoreMismatchError(LatheError):
    """A local store was made for another graph, encoder, width or version of this package."""
