"""Errors: every refusal of the service as a type with its HTTP status. No Flask in here, and no cconv.

In: a text that names what was expected and what came.  Out: exceptions, which the factory turns into answers.
"""


class ServiceError(Exception):
    """Base of every refusal; the text goes to the client as it is, so it holds no paths and no secrets."""

    status = 500
    #: Why, as the label of the metric of refused requests.
    reason = "internal"


class InvalidRequest(ServiceError):
    """The request cannot be understood or its parts do not fit together."""

    status = 400
    reason = "invalid"


class NotFound(ServiceError):
    """No model of that name or version."""

    status = 404
    reason = "not_found"


class NotAcceptable(ServiceError):
    """No form of the answer that the client accepts."""

    status = 406
    reason = "not_acceptable"


class TooLarge(ServiceError):
    """More bytes, pixels, images or FLOPs than one request may ask for."""

    status = 413
    reason = "too_large"


class UnsupportedEncoding(ServiceError):
    """A compressed body."""

    status = 415
    reason = "unsupported_encoding"


class Overloaded(ServiceError):
    """The house is full; the same request may succeed a moment later."""

    status = 503
    reason = "overloaded"
    retry_after_s = 1


class Unavailable(ServiceError):
    """A device or library that this server does not have."""

    status = 503
    reason = "unavailable"


class DeviceLost(Overloaded):
    """The GPU failed. This process can compute nothing any more and is replaced; the next one may be asked."""

    reason = "device"


class DeadlineExceeded(ServiceError):
    """The time for the request ran out; what had been computed is discarded and nothing is billed."""

    status = 504
    reason = "deadline"
