"""The errors that cconv raises: every one is a CconvError, and also the built-in error a Python user would expect.

In: nothing.  Out: exception classes. No HTTP in here.
"""


class CconvError(Exception):
    """Base of every error that cconv raises on purpose."""


class ShapeError(CconvError, ValueError):
    """A rank, size, stride, padding, dilation or group count that does not fit."""


class DTypeError(CconvError, TypeError):
    """An element type that is not supported, or arrays whose types differ."""


class ArgumentError(CconvError, ValueError):
    """An option that is not one of the known names or lies outside its range."""


class ModelError(CconvError, ValueError):
    """An unknown model or layer, or a graph that cannot be run."""


class ImageError(CconvError, ValueError):
    """Bytes that are not a JPEG or PNG image, or one that is truncated or too large."""


class BackendUnavailable(CconvError, RuntimeError):
    """The device, instruction set or library that was asked for is not here."""


class OutOfMemory(CconvError, MemoryError):
    """A GPU's memory does not hold what a call needs; fewer images at a time may fit."""


class DeviceError(CconvError, RuntimeError):
    """A GPU failed while it was used. Nothing computed since is certain; only a new process can use it again."""


class Cancelled(CconvError):
    """The caller's cancel flag was set; what had been computed is discarded."""
