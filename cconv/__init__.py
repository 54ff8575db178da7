"""cconv: convolution, counted. The public names, nothing else; importing it probes no device."""

from . import filters, images, init
from .backend import cancel_flag, get_num_threads, limit_threads, set_num_threads, set_pool_limit, show_config
from .devices import device
from .errors import (
    ArgumentError,
    BackendUnavailable,
    Cancelled,
    CconvError,
    DeviceError,
    DTypeError,
    ImageError,
    ModelError,
    OutOfMemory,
    ShapeError,
)
from .model import Model, load, model_names
from .ops import (
    Conv2d,
    activate,
    avg_pool2d,
    conv2d,
    conv2d_cost,
    global_avg_pool2d,
    global_max_pool2d,
    max_pool2d,
)
from .planning import Cost, estimate

__all__ = [
    "ArgumentError",
    "BackendUnavailable",
    "Cancelled",
    "CconvError",
    "Conv2d",
    "Cost",
    "DTypeError",
    "DeviceError",
    "ImageError",
    "Model",
    "ModelError",
    "OutOfMemory",
    "ShapeError",
    "activate",
    "avg_pool2d",
    "cancel_flag",
    "conv2d",
    "conv2d_cost",
    "device",
    "estimate",
    "filters",
    "get_num_threads",
    "global_avg_pool2d",
    "global_max_pool2d",
    "images",
    "init",
    "limit_threads",
    "load",
    "max_pool2d",
    "model_names",
    "set_num_threads",
    "set_pool_limit",
    "show_config",
]
