"""Errors: every refusal of the service as a type with its HTTP status. No Flask in here, and no cconv.

In: a text that names what was expected and what came.  Out: exceptions, which the factory turns into answers.
"""

#: Of a server that is being stopped: why it is not ready, and what who comes all the same is told.
SHUTTING_DOWN = "the server is shutting down"
CLOSING = f"{SHUTTING_DOWN}; try again"
NO_MEMORY = "the server has no memory left for this request; try again"
#: Of what nobody expected: it may name what clients are not to see.
INTERNAL = "internal error; the server's log says more"


class ServiceError(Exception):
    """Base of every refusal; the text goes to the client as it is, so it holds no paths and no secrets."""

    status = 500
    #: When to come again, if that helps.
    retry_after_s: int | None = None
    #: Why, as the label of the metric of refused requests.
    reason = "internal"


class InvalidRequest(ServiceError):
    """The request cannot be understood or its parts do not fit together."""

    status = 400
    reason = "invalid"


class Unauthorized(ServiceError):
    """No API key, or none that is good here."""

    status = 401
    reason = "unauthorized"


class Forbidden(ServiceError):
    """An API key that may not do this."""

    status = 403
    reason = "forbidden"


class NotFound(ServiceError):
    """No model of that name or version."""

    status = 404
    reason = "not_found"


class NotAcceptable(ServiceError):
    """No form of the answer that the client accepts."""

    status = 406
    reason = "not_acceptable"


class Conflict(ServiceError):
    """The idempotency key's request is being computed, or has been as often as it may be."""

    status = 409
    reason = "conflict"

    def __init__(self, text: str, retry_after_s: int | None = None):
        super().__init__(text)
        self.retry_after_s = retry_after_s


class Mismatch(ServiceError):
    """The idempotency key came with another request before."""

    status = 422
    reason = "mismatch"


class TooLarge(ServiceError):
    """More bytes, pixels, images or FLOPs than one request may ask for."""

    status = 413
    reason = "too_large"


class UnsupportedEncoding(ServiceError):
    """A compressed body."""

    status = 415
    reason = "unsupported_encoding"


class RateLimited(ServiceError):
    """More FLOPs than the account may have in this minute or month; the server itself has room."""

    status = 429
    reason = "rate"

    def __init__(self, text: str, retry_after_s: int):
        super().__init__(text)
        self.retry_after_s = retry_after_s


class QuotaExceeded(RateLimited):
    """The account has had its month."""

    reason = "quota"


class Overloaded(ServiceError):
    """The house is full; the same request may succeed a moment later."""

    status = 503
    reason = "overloaded"
    retry_after_s = 1


class Unavailable(ServiceError):
    """A device or library that this server does not have."""

    status = 503
    reason = "unavailable"


class NotRecorded(ServiceError):
    """The ledger cannot be written, or read; an answer without its record would be for nothing."""

    status = 503
    reason = "ledger"
    retry_after_s = 2


class DeviceLost(Overloaded):
    """The GPU failed. This process can compute nothing any more and is replaced; the next one may be asked."""

    reason = "device"


class DeadlineExceeded(ServiceError):
    """The time for the request ran out; what had been computed is discarded and nothing is billed."""

    status = 504
    reason = "deadline"
    #: Whether a part had been computed.
    computed = False
