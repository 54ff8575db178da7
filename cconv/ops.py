"""Ops: the public operators. Each call checks its arguments, looks up a plan and runs a program of one step.

In: NumPy (or DLPack) arrays and PyTorch's argument names.  Out: arrays of the same kind, or a typed error with nothing
computed.
"""

from functools import lru_cache, partial
from math import prod

import numpy as np

from . import backend
from .backend import checked
from .errors import ArgumentError, DTypeError, ShapeError
from .planning import ConvSpec, Cost, PoolSpec, Spec, batch_class, cost, plan, shapes, specs
from .weights import NO_WEIGHTS, Once, Weights

#: Programs a Conv2d keeps, one per shape of x; beyond, it begins anew. They share the packed weights.
PROGRAMS_PER_LAYER = 64
#: Operators without weights that are kept compiled for their shapes; and the largest: of how many tables' entries.
MADE_KEPT, LARGEST_KEPT = 128, 1 << 16
#: Elements of a result: beyond this NumPy cannot count its bytes.
LARGEST_RESULT = 2**59


def _remember(cache: dict, key, value, most: int):
    """Keep a value. A full cache begins anew; threads may do so at any moment, since nobody asks twice."""
    if len(cache) >= most:
        cache.clear()
    cache[key] = value
    return value


def _hashable(value, name: str):
    """An option as a cache key; what cannot be one is refused."""
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(v, name) for v in value)
    try:
        hash(value)
    except TypeError:
        raise ArgumentError(f"{name}: expected a name or a tuple, got {value!r}") from None
    return value


def _geometry(stride, padding, dilation, groups) -> tuple:
    """The options that decide shapes, checked and in one form: 1, True and 1.0 are one key of a cache."""
    if isinstance(padding, (list, tuple)):
        padding = tuple(shapes.integer(v, "padding", 0) for v in padding)
    elif not isinstance(padding, str):
        padding = shapes.integer(padding, "padding", 0)
    return (
        shapes.pair(stride, "stride", 1), padding, shapes.pair(dilation, "dilation", 1),
        shapes.integer(groups, "groups", 1),
    )  # fmt: skip


def _flag(value, name: str) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ArgumentError(f"{name}: expected True or False, got {type(value).__name__}")
    return bool(value)


def _images(x, name: str = "x"):
    """x as (N, C, H, W), and whether one image without N came in."""
    if x.ndim not in (3, 4) or not all(x.shape):
        shapes.shape(x.shape, name, (3, 4), "(N, C, H, W) or (C, H, W)")
    return (x[None], True) if x.ndim == 3 else (x, False)


def _check_weight(weight) -> None:
    if weight.ndim != 4 or not all(weight.shape):
        shapes.shape(weight.shape, "weight", 4, "(K, C/groups, R, S)")


def _bias(bias, weight_shape: tuple[int, ...]):
    """(K,), or the lecture's (K, C/G) summed over axis 1."""
    outputs, depth = weight_shape[:2]
    if bias.shape == (outputs,):
        return bias
    if bias.shape == (outputs, depth):
        return bias.sum(axis=1)
    raise ShapeError(f"bias: expected shape ({outputs},) or ({outputs}, {depth}), got {bias.shape}")


def _check_out(out, kind: type, shape: tuple[int, ...], dtype: str, apart: dict[str, object]) -> None:
    """Check `out` against the kind of array, shape and type that it must have, and the inputs it may not overlap."""
    if not isinstance(out, kind):
        library = kind.__module__.partition(".")[0].replace("numpy", "NumPy").replace("cupy", "CuPy")
        raise DTypeError(f"out: expected a {library} array, got {type(out).__name__}")
    if out.shape != shape:
        raise ShapeError(f"out: expected shape {shape}, got {out.shape}")
    if out.dtype != np.dtype(dtype):
        raise DTypeError(f"out: expected {dtype}, got {out.dtype}")
    if kind is np.ndarray and not out.flags.writeable:
        raise ArgumentError("out: expected a writeable array, got a read-only one")
    for name, source in apart.items():
        if backend.overlap(out, source):
            raise ArgumentError(f"out: expected memory apart from {name}'s, got an overlapping array")


@lru_cache(maxsize=1024)
def _conv_spec(
    image, weight, stride, padding, dilation, groups, bias, residual, activation, dtype, precision, algorithm
):
    return specs.conv(
        image, weight, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=bias, residual=residual,
        activation=activation, dtype=dtype, precision=precision, algorithm=algorithm,
    )  # fmt: skip


_made: dict[tuple, object] = {}


def _maker(twin, spec: Spec, images: int = 1, packs: bool = False):
    """f(weights): a program of one operator, for about so many images. What no weight changes is made once."""
    machine = twin.machine()
    images = batch_class(images, machine.device)
    key = twin, spec, machine, images, packs
    maker = _made.get(key)
    if maker is None:
        planned = plan.single(spec, machine, images=images, packs=packs)
        prepare = getattr(twin, "prepare", None)  # a twin that has nothing to prepare only builds
        maker = partial(twin.build, planned) if prepare is None else prepare(planned)
        if _entries(spec) <= LARGEST_KEPT:
            _remember(_made, key, maker, MADE_KEPT)
    return maker


def _entries(spec: Spec) -> int:
    """Entries of the tables that a kernel holds."""
    if isinstance(spec, ConvSpec):
        return spec.depth
    return len(spec.rows.start) + len(spec.columns.start) if isinstance(spec, PoolSpec) else 0


def _run(spec: Spec, program, x, one_image: bool, residual=None, out=None, apart=None):
    """Check the residual and `out`, then run `program()` on x: images (N, C, H, W) already checked."""
    shape = (len(x), *spec.output)
    visible = shape[1:] if one_image else shape
    if prod(shape) > LARGEST_RESULT:
        raise ShapeError(f"x: expected a result of at most {LARGEST_RESULT} elements, got shape {shape}")
    inputs = [x]
    if residual is not None:
        if residual.shape != visible:
            raise ShapeError(f"residual: expected the output's shape {visible}, got {residual.shape}")
        inputs.append(residual.reshape(shape))
    if out is None:
        y = program().run(inputs)[0]
        return y[0] if one_image else y
    _check_out(out, np.ndarray if isinstance(x, np.ndarray) else type(x), visible, spec.dtype, apart)
    if residual is not None and residual is not out and backend.overlap(out, residual):
        inputs[1] = inputs[1].copy()
    program().run(inputs, [out.reshape(shape) if out.flags.c_contiguous else out[None] if one_image else out])
    return out


class Conv2d:
    """A convolutional layer that packs its weights once and runs on images of any size.

    ``y = activation(conv(x) + bias + residual)``, float32 or float64; arguments as in :func:`conv2d`.

    Parameters
    ----------
    weight : array (K, C/groups, R, S)
        Copied; later changes to it have no effect.
    bias : array (K,) or (K, C/groups), optional

    Raises
    ------
    ShapeError, DTypeError, ArgumentError
        For arguments that cannot belong to any image.

    Examples
    --------
    >>> import numpy as np
    >>> layer = Conv2d(np.ones((8, 3, 3, 3), np.float32), padding=1, activation="relu")
    >>> layer(np.zeros((2, 3, 32, 32), np.float32)).shape
    (2, 8, 32, 32)
    >>> layer.cost((2, 3, 32, 32)).macs
    442368
    """

    def __init__(
        self, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *,
        activation=None, precision="highest", algorithm="auto",
    ):  # fmt: skip
        self._twin, weight, dtype = checked(weight, "weight")
        _check_weight(weight)
        if bias is not None:
            bias = _bias(checked(bias, "bias", self._twin, dtype)[1], weight.shape).copy()
        # Copies of its own, so that nobody can change a layer from outside.
        self.weight, self.bias = weight.copy(order="C"), bias
        for array in (self.weight, bias):
            if isinstance(array, np.ndarray):
                array.flags.writeable = False
        self._twin.synchronize()  # programs read the copies from other streams and threads too
        self._weights = Weights(lambda _: (self.weight, self.bias))
        geometry = _geometry(stride, padding, dilation, groups)
        self._options = (*geometry, bias is not None)
        self._more = (
            _hashable(activation, "activation"), dtype, _hashable(precision, "precision"),
            _hashable(algorithm, "algorithm"),
        )  # fmt: skip
        #: (N, C, H, W), whether there is a residual, threads -> program.
        self._programs: dict[tuple, object] = {}
        # An image of the kernel's own reach fits every valid layer: planning for it checks the options now.
        *_, dilations, groups = geometry
        reach = (d * (k - 1) + 1 for d, k in zip(dilations, weight.shape[2:], strict=True))
        plan.single(self._spec((weight.shape[1] * groups, *reach), False), self._twin.machine())

    def __reduce__(self):
        *geometry, _ = self._options
        activation, _, precision, algorithm = self._more
        options = {"activation": activation, "precision": precision, "algorithm": algorithm}
        return partial(Conv2d, **options), (self.weight, self.bias, *geometry)

    def _spec(self, image, residual: bool) -> ConvSpec:
        return _conv_spec(image, self.weight.shape, *self._options, residual, *self._more)

    def cost(self, x_shape, *, residual: bool = False) -> Cost:
        """The exact cost for images of shape (N, C, H, W) or (C, H, W)."""
        *n, c, h, w = shapes.shape(x_shape, "x_shape", (3, 4), "(N, C, H, W) or (C, H, W)")
        return cost.of(self._spec((c, h, w), residual), n[0] if n else 1)

    def __call__(self, x, residual=None, out=None):
        """The maps of x: (N, K, P, Q), or (K, P, Q) for one (C, H, W) image.

        `residual` and `out` have the result's shape and type; `out` may be the residual, but may not overlap x.
        """
        # The short way: an image whose like has been checked and compiled for already.
        if residual is None and out is None and type(x) is type(self.weight) and x.dtype is self.weight.dtype:
            program = self._programs.get((x.shape, False, backend.get_num_threads()))
            if program is not None:
                return program.run([x])[0]
        dtype = self._more[1]
        x = checked(x, "x", self._twin, dtype)[1]
        if residual is not None:
            residual = checked(residual, "residual", self._twin, dtype)[1]
        images, one_image = _images(x)
        spec = self._spec(images.shape[1:], residual is not None)

        def program():
            key = images.shape, residual is not None, backend.get_num_threads()
            return self._programs.get(key) or _remember(
                self._programs, key, _maker(self._twin, spec, len(images))(self._weights), PROGRAMS_PER_LAYER
            )

        return _run(spec, program, images, one_image, residual, out, {"x": x, "weight": self.weight})


#: Types of options that mean the same wherever they are equal: True, 1 and 1.0 would be one key.
_PLAIN = frozenset({int, str, type(None)})
_functions: dict[tuple, object] = {}


def _function_key(x, weight, bias, options: tuple):
    """What `conv2d` finds a geometry by; None for arrays and options that have to be checked on every call."""
    if not type(x) is type(weight) is np.ndarray or weight.dtype is not x.dtype or x.ndim != 4:
        return None
    if bias is not None and (type(bias) is not np.ndarray or bias.dtype is not x.dtype or bias.ndim != 1):
        return None
    for option in options:
        if type(option) not in _PLAIN and not (type(option) is tuple and all(type(v) is int for v in option)):
            return None
    dtype = backend.DTYPE_NAMES.get(x.dtype)
    bias_shape = None if bias is None else bias.shape
    return x.shape, weight.shape, bias_shape, dtype, backend.get_num_threads(), options


def conv2d(
    x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *,
    activation=None, residual=None, precision="highest", algorithm="auto", out=None,
):  # fmt: skip
    """2-D convolution (cross-correlation, as in every CNN library) of images with a bank of filters.

    ``y[n,k,p,q] = activation(sum over c,r,s of x[n, c, p*stride + r*dilation - top, q*stride + s*dilation - left]
    * weight[k, c, r, s] + bias[k] + residual[n,k,p,q])``

    Parameters
    ----------
    x : array (N, C, H, W) or (C, H, W), float32 or float64
        Any strides; never written. NumPy, or any CPU array with DLPack; CuPy's, and CUDA arrays with DLPack, are
        computed on the GPU, and so must all others of the call be.
    weight : array (K, C/groups, R, S)
    bias : array (K,) or (K, C/groups), optional
        The second form is summed over axis 1.
    stride, dilation : int or (height, width)
    padding : int, (height, width), (top, left, bottom, right), "valid" or "same"
        "same" gives ceil(size / stride) outputs; an odd row or column goes to the end.
    groups : int
        Divides C and K; C itself makes it depthwise.
    activation : str, optional
        relu, relu6, leaky_relu (or ("leaky_relu", slope)), sigmoid, silu, hardswish, tanh, gelu.
    residual : array of the output's shape, optional
    precision : "highest", "high" or "medium"
        The error bound that the algorithm must meet; see docs/api.md.
    algorithm : "auto", "direct" or "winograd" (which a GPU does not have)
    out : array, optional
        Exact shape and type; may be the residual; may not overlap x or weight.

    Returns
    -------
    array (N, K, P, Q), or (K, P, Q) for one image, of x's type and on its device, where it may still be computed.

    Raises
    ------
    ShapeError, DTypeError, ArgumentError, BackendUnavailable
        Before anything is computed.

    Notes
    -----
    The weight is packed on every call; a :class:`Conv2d` packs it once.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.stack([np.arange(0.0, 9).reshape(3, 3), np.arange(1.0, 10).reshape(3, 3)])
    >>> k = np.stack([np.arange(0.0, 4).reshape(2, 2), np.arange(1.0, 5).reshape(2, 2)])
    >>> conv2d(x, k[None])[0]
    array([[ 56.,  72.],
           [104., 120.]])
    """
    key = None
    if residual is None and out is None:
        options = stride, padding, dilation, groups, activation, precision, algorithm
        key = _function_key(x, weight, bias, options)
        maker = _functions.get(key)
        # The short way: arrays and options whose like has been checked and compiled for already.
        if maker is not None:
            return maker(Once((weight, bias))).run([x])[0]
    twin, x, dtype = checked(x, "x")
    weight = checked(weight, "weight", twin, dtype)[1]
    _check_weight(weight)
    if bias is not None:
        bias = _bias(checked(bias, "bias", twin, dtype)[1], weight.shape)
    if residual is not None:
        residual = checked(residual, "residual", twin, dtype)[1]
    images, one_image = _images(x)
    spec = _conv_spec(
        images.shape[1:], weight.shape, *_geometry(stride, padding, dilation, groups), bias is not None,
        residual is not None, _hashable(activation, "activation"), dtype, _hashable(precision, "precision"),
        _hashable(algorithm, "algorithm"),
    )  # fmt: skip
    if out is not None and bias is not None and backend.overlap(out, bias):
        bias = bias.copy()

    def program():
        maker = _maker(twin, spec, len(images), packs=True)
        if key is not None and _entries(spec) <= LARGEST_KEPT:
            _remember(_functions, key, maker, MADE_KEPT)
        return maker(Once((weight, bias)))

    return _run(spec, program, images, one_image, residual, out, {"x": x, "weight": weight})


def conv2d_cost(
    x_shape, w_shape, *, bias=False, stride=1, padding=0, dilation=1, groups=1, activation=None, residual=False
) -> Cost:
    """The exact cost of `conv2d` on these shapes; `bytes` are those of float32.

    Examples
    --------
    >>> conv2d_cost((1, 100, 64, 64), (100, 100, 5, 5), padding=2).macs
    1024000000
    """
    *n, c, h, w = shapes.shape(x_shape, "x_shape", (3, 4), "(N, C, H, W) or (C, H, W)")
    strides, pads, dilations, groups = _geometry(stride, padding, dilation, groups)
    spec = specs.conv(
        (c, h, w), w_shape, stride=strides, padding=pads, dilation=dilations, groups=groups, bias=_flag(bias, "bias"),
        residual=_flag(residual, "residual"), activation=_hashable(activation, "activation"),
    )  # fmt: skip
    return cost.of(spec, n[0] if n else 1)


def _simple(x, make_spec):
    """Run an operator that has no weights: `make_spec(image, dtype)` on a checked x."""
    twin, x, dtype = checked(x, "x")
    images, one_image = _images(x)
    spec = make_spec(images.shape[1:], dtype)
    return _run(spec, lambda: _maker(twin, spec)(NO_WEIGHTS), images, one_image)


def max_pool2d(x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
    """The maximum of each window of (N, C, H, W) or (C, H, W) maps; padding never wins, NaN does.

    `stride` defaults to `kernel_size`; every window must hold at least one position of the image (else ShapeError).

    Examples
    --------
    >>> import numpy as np
    >>> max_pool2d(np.arange(16.0).reshape(1, 4, 4), 2)
    array([[[ 5.,  7.],
            [13., 15.]]])
    """
    return _simple(x, lambda image, dtype: specs.pool(
        "max", image, kernel_size, stride=stride, padding=padding, dilation=dilation, ceil_mode=ceil_mode, dtype=dtype,
    ))  # fmt: skip


def avg_pool2d(x, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, *, dilation=1):
    """The mean of each window; padded positions are zeros and count in the divisor unless `count_include_pad` is false.

    Examples
    --------
    >>> import numpy as np
    >>> avg_pool2d(np.arange(16.0).reshape(1, 4, 4), 2)
    array([[[ 2.5,  4.5],
            [10.5, 12.5]]])
    """
    return _simple(x, lambda image, dtype: specs.pool(
        "average", image, kernel_size, stride=stride, padding=padding, dilation=dilation, ceil_mode=ceil_mode,
        count_include_pad=count_include_pad, dtype=dtype,
    ))  # fmt: skip


def global_max_pool2d(x):
    """The maximum of each map: (N, C, H, W) to (N, C, 1, 1)."""
    return _simple(x, lambda image, dtype: specs.adaptive_pool("max", image, (1, 1), dtype=dtype))


def global_avg_pool2d(x):
    """The mean of each map: (N, C, H, W) to (N, C, 1, 1)."""
    return _simple(x, lambda image, dtype: specs.adaptive_pool("average", image, (1, 1), dtype=dtype))


def activate(x, activation):
    """An activation by name, elementwise: relu, relu6, leaky_relu, sigmoid, silu, hardswish, tanh or gelu.

    Examples
    --------
    >>> import numpy as np
    >>> activate(np.array([[[-1.0, 2.0]]]), "relu")
    array([[[0., 2.]]])
    """
    return _simple(
        x, lambda image, dtype: specs.pointwise(image, activation=_hashable(activation, "activation"), dtype=dtype)
    )
