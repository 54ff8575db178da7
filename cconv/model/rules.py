"""Rules: the operators that compute, from a node and its operands to operations of planning.

In: a Node and Values.  Out: a Result. Data movement is in moves.py, the table in layers.py.
"""

from functools import lru_cache
from math import prod

from ..errors import ArgumentError, ModelError, ShapeError
from ..planning import Cost, cost, shapes, specs, tensors
from .graph import Constant, Node, Shape
from .operators import Affine, Part, Recipe, Result, Rule, Value, axis_of, size, weights


def maps_of(x: Value) -> tuple[int, specs.CHW]:
    """Images a run, and (C, H, W): a tensor (N, C, H, W), or (N, C, W) with one row."""
    if len(x.shape) == 4:
        return x.shape[0], x.shape[1:]
    if len(x.shape) == 3:
        return x.shape[0], (x.shape[1], 1, x.shape[2])
    raise ShapeError(f"x: expected a tensor (N, C, H, W) or (N, C, W), got shape {x.shape}")


def as_given(x: Value, times: int, maps: specs.CHW) -> Shape:
    """The shape of a result in the rank of its operand."""
    return (times, *maps) if len(x.shape) == 4 else (times, maps[0], maps[2])


def one(node: Node, spec, shape: Shape, *, times=1, recipe=None, parameters=0) -> Result:
    """A node that is one operation on its first operand, and costs what that costs."""
    part = Part(spec, (node.inputs[0],), node.name, recipe, times)
    return Result(shape, (part,), lambda n: cost.of(spec, n * times), parameters)


def padding(node: Node, image: specs.CHW, kernel: tuple[int, int]) -> tuple[int, int, int, int] | str | int:
    """The padding option; "same_lower" is "same" with the odd row and column at the beginning."""
    given = node.options.get("padding", 0)
    if given != "same_lower":
        return given
    stride, dilation = (shapes.pair(node.options.get(word, 1), word, 1) for word in ("stride", "dilation"))
    top, left, bottom, right = shapes.padding("same", image[1:], kernel, stride, dilation)
    return bottom, right, top, left


def filters_of(node: Node, weight: Value) -> Shape:
    """(K, C/groups, R, S) of a weight that may have one dimension only; as its node says, if it does."""
    kernel = node.options.get("kernel_shape")
    if len(weight.shape) not in (3, 4):
        raise ShapeError(f"weight: expected a shape of 3 or 4 sizes, got {weight.shape}")
    if kernel is not None and tuple(kernel) != weight.shape[2:]:
        raise ShapeError(f"kernel_shape: expected the weight's {weight.shape[2:]}, got {tuple(kernel)}")
    return weight.shape if len(weight.shape) == 4 else (*weight.shape[:2], 1, weight.shape[2])


def checked_bias(bias: Value | None, outputs: int) -> Constant | None:
    if bias is not None and bias.shape != (outputs,):
        raise ShapeError(f"bias: expected shape ({outputs},), got {bias.shape}")
    return None if bias is None else weights(bias, "biases")


def conv(node: Node, x: Value, weight: Value, bias: Value | None = None) -> Result:
    times, image = maps_of(x)
    filters = filters_of(node, weight)
    constants = weights(weight), checked_bias(bias, filters[0])
    words = {word: node.options[word] for word in ("stride", "dilation", "groups") if word in node.options}
    spec = specs.conv(image, filters, padding=padding(node, image, filters[2:]), bias=bias is not None, **words)
    recipe = Recipe("as given", constants, filters)
    return one(
        node, spec, as_given(x, times, spec.output), times=times, recipe=recipe, parameters=size(weight) + size(bias)
    )


def _dense(outputs: int, features: int, bias: bool):
    return specs.conv((features, 1, 1), (outputs, features, 1, 1), bias=bias)


def gemm(node: Node, a: Value, b: Value, c: Value | None = None) -> Result:
    """alpha * a @ b + beta * c; a dense layer is a 1x1 convolution, its rows are images of one pixel."""
    across, turned = (bool(node.options.get(word, 0)) for word in ("transA", "transB"))
    alpha, beta = (float(node.options.get(word, 1.0)) for word in ("alpha", "beta"))
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise ShapeError(f"expected matrices, got shapes {a.shape} and {b.shape}")
    rows, given = a.shape[::-1] if across else a.shape
    outputs, features = b.shape if turned else b.shape[::-1]
    if given != features:
        raise ShapeError(f"x: expected {features} features, got {given} in {a.shape}")
    weight = weights(b)
    rides = c is not None and c.constant is not None and prod(c.shape[:-1]) == 1 and size(c) in (1, outputs)
    spec = _dense(outputs, features, rides)
    parts, read = [], node.inputs[0]
    if across:
        turn = tensors.move(a.shape, (rows, given), [tensors.Axis(rows, 1, given), tensors.Axis(given, rows, 1)])
        parts.append(Part(turn, (read,), (node.name, 0)))
        read = node.name, 0
    recipe = Recipe("gemm", (weight, weights(c) if rides else None), (outputs, features, 1, 1), (turned, alpha, beta))
    later = c is not None and not rides
    parts.append(Part(spec, (read,), (node.name, 1) if later else node.name, recipe, rows))
    if later:
        added = tensors.arithmetic("add", (rows, outputs), c.shape, constant=c.constant is not None)
        if tensors.spread((rows, outputs), c.shape) != (rows, outputs) or beta != 1.0:
            raise ModelError(f"expected a third operand of {(rows, outputs)} and beta 1, got {c.shape} and {beta}")
        operand = Recipe("as given", (weights(c), None), c.shape) if c.constant else None
        reads = ((node.name, 1),) if c.constant else ((node.name, 1), node.inputs[2])
        parts.append(Part(added, reads, node.name, operand))
    billed = _dense(outputs, features, c is not None)
    return Result((rows, outputs), tuple(parts), lambda n: cost.of(billed, n * rows), size(b) + size(c))


def matmul(node: Node, a: Value, b: Value) -> Result:
    """A product of matrices; with a constant matrix on the right a dense layer on every row."""
    if not a.shape or not b.shape:
        raise ShapeError(f"expected tensors of rank 1 or more, got shapes {a.shape} and {b.shape}")
    left = a.shape if len(a.shape) > 1 else (1, *a.shape)
    right = b.shape if len(b.shape) > 1 else (*b.shape, 1)
    whole = tensors.matmul(left, right, constant=b.constant is not None)
    shape = (*tensors.spread((*left[:-2], 1, 1), (*right[:-2], 1, 1))[:-2], left[-2], right[-1])
    if len(a.shape) == 1:
        shape = (*shape[:-2], shape[-1])
    if len(b.shape) == 1:
        shape = shape[:-1]
    if a.constant is not None:
        raise ModelError("expected a left operand of MatMul that depends on the image")
    if b.constant is None:
        return Result(shape, (Part(whole, node.inputs[:2], node.name),), lambda n: cost.of(whole, n))
    if len(right) > 2:
        recipe = Recipe("as given", (weights(b), None), right)
        return one(node, whole, shape, recipe=recipe, parameters=size(b))
    features, outputs = right
    recipe = Recipe("gemm", (weights(b), None), (outputs, features, 1, 1), (False, 1.0, 1.0))
    return one(node, _dense(outputs, features, False), shape, times=prod(left[:-1]), recipe=recipe, parameters=size(b))


@lru_cache(maxsize=256)
def _normed(maps: specs.CHW) -> specs.ConvSpec:
    """A number per channel times each pixel, and another one: networks norm maps of few sizes many times."""
    return specs.conv(maps, (maps[0], 1, 1, 1), groups=maps[0], bias=True)


def batch_norm(node: Node, x: Value, *four: Value) -> Result:
    """y = x * a[c] + b[c]: a depthwise 1x1 convolution with bias, where it cannot be folded into the one before."""
    if len(x.shape) < 2 or len(four) != 4:
        raise ShapeError(f"expected (N, C, ...), scale, bias, mean and variance, got {x.shape} and {len(four)} more")
    channels = x.shape[1]
    if wrong := next((value.shape for value in four if value.shape != (channels,)), None):
        raise ShapeError(f"x: expected {prod(wrong)} channels, got {channels} in {x.shape}")
    constants = tuple(weights(value, "statistics") for value in four)
    affine = Affine("BatchNormalization", constants, float(node.options.get("epsilon", 1e-5)))
    maps = x.shape[1:] if len(x.shape) == 4 else (channels, 1, prod(x.shape[2:]))
    spec = _normed(maps)
    recipe = Recipe("ones", (), (channels, 1, 1, 1), affines=(affine,))
    part = Part(spec, (node.inputs[0],), node.name, recipe, x.shape[0])
    # Counted as what it is in the graph, not as the convolution that may carry it out.
    return Result(x.shape, (part,), lambda n: cost.batch_norm(n * size(x), channels, spec.dtype), 2 * channels)


def conv_transpose(node: Node, x: Value, weight: Value, bias: Value | None = None) -> Result:
    """The gradient of a convolution: zeros between the pixels, then a convolution with the filters turned round."""
    times, image = maps_of(x)
    if len(weight.shape) == 3:
        kernel = (1, weight.shape[2])
    elif len(weight.shape) == 4:
        kernel = weight.shape[2:]
    else:
        raise ShapeError(f"weight: expected a shape of 3 or 4 sizes, got {weight.shape}")
    groups = shapes.integer(node.options.get("groups", 1), "groups", 1)
    if weight.shape[0] != image[0] or image[0] % groups:
        raise ShapeError(f"weight: expected {image[0]} channels in {groups} groups, got shape {weight.shape}")
    outputs = weight.shape[1] * groups
    constants = weights(weight), checked_bias(bias, outputs)
    sides, spread = _transposed_sides(node, image[1:], kernel)
    stride, dilation = (shapes.pair(node.options.get(word, 1), word, 1) for word in ("stride", "dilation"))
    wide = tensors.checked((image[0], *spread))
    axes, begin, at = [tensors.Axis(times * image[0], image[1] * image[2], spread[0] * spread[1])], 0, 0
    for i, (before, pitch_in, pitch_out) in enumerate(zip(sides, (image[2], 1), (spread[1], 1), strict=True)):
        # Pixels that fall outside, where the padding is larger than the filter, are left out.
        first = max(0, -(before // stride[i]))
        count = min(image[1 + i], (spread[i] - 1 - before) // stride[i] + 1) - first
        begin, at = begin + first * pitch_in, at + (before + first * stride[i]) * pitch_out
        axes.append(tensors.Axis(count, pitch_in, stride[i] * pitch_out))
        if count < 1:
            raise ShapeError(f"padding: expected less than the whole result, got {node.options.get('padding')}")
    insert = tensors.move((times, *image), (times, *wide), axes, begin=begin, at=at, fill=0.0)
    filters = (outputs, image[0] // groups, *kernel)
    spec = specs.conv(wide, filters, dilation=dilation, groups=groups, bias=bias is not None)
    recipe = Recipe("transposed", constants, filters, (groups,))
    parts = (
        Part(insert, (node.inputs[0],), (node.name, 0)),
        Part(spec, ((node.name, 0),), node.name, recipe, times),
    )

    def billed(n: int) -> Cost:
        return cost.conv_transpose(image, weight.shape, spec.output, n * times, bias=bias is not None)

    return Result(as_given(x, times, spec.output), parts, billed, size(weight) + size(bias))


def _transposed_sides(node: Node, given: tuple[int, int], kernel: tuple[int, int]):
    """Where the first pixel lies in the spread image, and that image's size, down and across."""
    word = node.options.get("padding", 0)
    stride, dilation = (shapes.pair(node.options.get(w, 1), w, 1) for w in ("stride", "dilation"))
    extra = shapes.pair(node.options.get("output_padding", 0), "output_padding", 0)
    wanted = node.options.get("output_shape")
    if word in ("same", "same_lower") and wanted is None:
        wanted = [n * s for n, s in zip(given, stride, strict=True)]
    starts = (0, 0) if isinstance(word, str) else shapes.padding(word, given, kernel, stride, dilation)
    sides, sizes = [], []
    for i in range(2):
        reach = dilation[i] * (kernel[i] - 1)
        full = stride[i] * (given[i] - 1) + extra[i] + reach + 1
        if wanted is not None:
            out = shapes.integer(wanted[i], "output_shape", 1)
            total = full - out
            start = total // 2 if word == "same" else total - total // 2
        elif isinstance(word, str):
            out, start = full, 0
        else:
            out, start = full - starts[i] - starts[i + 2], starts[i]
        if out < 1:
            raise ShapeError(f"padding: expected less than the whole result, got {word}")
        sides.append(reach - start)
        sizes.append(out + reach)
    return sides, tuple(sizes)


def pool(kind: str) -> Rule:
    def rule(node: Node, x: Value) -> Result:
        times, image = maps_of(x)
        kernel = shapes.pair(node.options.get("kernel_size"), "kernel_size", 1)
        words = ("stride", "dilation", "ceil_mode", "count_include_pad")
        given = {word: node.options[word] for word in words if word in node.options}
        spec = specs.pool(kind, image, kernel, padding=padding(node, image, kernel), **given)
        return one(node, spec, as_given(x, times, spec.output), times=times)

    return rule


def global_pool(kind: str) -> Rule:
    def rule(node: Node, x: Value) -> Result:
        if len(x.shape) < 3:
            raise ShapeError(f"x: expected a tensor (N, C, ...), got shape {x.shape}")
        maps = x.shape[1:] if len(x.shape) == 4 else (x.shape[1], 1, prod(x.shape[2:]))
        spec = specs.adaptive_pool(kind, maps, (1, 1))
        return one(node, spec, (*x.shape[:2], *(1,) * (len(x.shape) - 2)), times=x.shape[0])

    return rule


def adaptive_pool(node: Node, x: Value) -> Result:
    times, image = maps_of(x)
    spec = specs.adaptive_pool("average", image, node.options["output_size"])
    return one(node, spec, as_given(x, times, spec.output), times=times)


def reduce_mean(node: Node, x: Value, axes: Value | None = None) -> Result:
    """The mean over axes that lie side by side: an average pool over the middle of (before, those, behind)."""
    rank = len(x.shape)
    given = node.options.get("axes") if axes is None else axes.numbers()
    if not given and node.options.get("noop_with_empty_axes"):
        return Result(x.shape)
    over = sorted({axis_of(axis, rank) for axis in given or range(rank)})
    keep = node.options.get("keepdims", 1)
    shape = tuple(1 if i in over else n for i, n in enumerate(x.shape) if keep or i not in over)
    if not over:  # a number is its own mean
        return Result(shape)
    first, last = over[0], over[-1] + 1
    if any(n > 1 and i not in over for i, n in enumerate(x.shape[first:last], start=first)):
        raise ModelError(f"expected axes of ReduceMean that lie side by side, got {over} of {x.shape}")
    middle, behind = prod(x.shape[first:last]), prod(x.shape[last:])
    spec = specs.pool("average", (1, middle, behind), (middle, 1))
    return one(node, spec, shape, times=prod(x.shape[:first]))


def activation(name: str) -> Rule:
    def rule(node: Node, x: Value) -> Result:
        alpha = node.options.get("alpha") if specs.ACTIVATIONS[name] is not None else None
        return one(node, specs.pointwise(tensors.row(size(x)), activation=(name, alpha)), x.shape)

    return rule


def _function(node: Node, x: Value, kind: str, *parameters: float) -> Result:
    return one(node, tensors.FunctionSpec(kind, size(x), parameters, "float32"), x.shape)


def gelu(node: Node, x: Value) -> Result:
    match node.options.get("approximate", b"none"):
        case b"none":
            return activation("gelu")(node, x)
        case b"tanh":
            return _function(node, x, "gelu_tanh")
        case other:
            raise ArgumentError(f"approximate: expected none or tanh, got {other!r:.40}")


def swish(node: Node, x: Value) -> Result:
    alpha = float(node.options.get("alpha", 1.0))
    return activation("silu")(node, x) if alpha == 1 else _function(node, x, "swish", alpha)


def hard_sigmoid(node: Node, x: Value) -> Result:
    alpha, beta = (float(node.options.get(word, default)) for word, default in (("alpha", 0.2), ("beta", 0.5)))
    return _function(node, x, "ramp", alpha, beta, 0.0, 1.0)


def clip(node: Node, x: Value, low: Value | None = None, high: Value | None = None) -> Result:
    """ReLU and ReLU6 where it is one of them, so that a convolution takes it in."""
    bottom = float(node.options.get("min", "-inf")) if low is None else float(low.number())
    top = float(node.options.get("max", "inf")) if high is None else float(high.number())
    named = {(0.0, float("inf")): "relu", (0.0, 6.0): "relu6"}.get((bottom, top))
    if named or (top > 3e38 and bottom == 0):
        return activation(named or "relu")(node, x)
    return _function(node, x, "clip", bottom, top)


def arithmetic(kind: str) -> Rule:
    def rule(node: Node, x: Value, other: Value) -> Result:
        return _arithmetic(node, kind, (x, node.inputs[0]), (other, node.inputs[1]))

    return rule


def _arithmetic(node: Node, kind: str, left: tuple, right: tuple, output=None) -> Result:
    """Of two operands (value, key): a constant is a weight, equal shapes are added as a convolution's residual is."""
    (x, x_key), (other, other_key) = left, right
    output = node.name if output is None else output
    swapped = x.constant is not None
    if swapped:
        (x, x_key), other = (other, other_key), x
    if kind == "prelu" and (swapped or tensors.spread(x.shape, other.shape) != x.shape):
        raise ShapeError(f"expected slopes that spread over x, got {other.shape} for {x.shape}")
    shape = tensors.spread(x.shape, other.shape)
    if other.constant is not None:
        commutes = kind in ("add", "mul", "max", "min")
        spec = tensors.arithmetic(kind, x.shape, other.shape, constant=True, swapped=swapped and not commutes)
        part = Part(spec, (x_key,), output, Recipe("as given", (weights(other), None), other.shape))
    elif kind == "add" and x.shape == other.shape:
        spec = specs.pointwise(tensors.row(size(x)), add=True)
        part = Part(spec, (x_key, other_key), output)
    else:
        spec = tensors.arithmetic(kind, x.shape, other.shape)
        part = Part(spec, (x_key, other_key), output)
    return Result(shape, (part,), lambda n: cost.of(spec, n), size(other) if other.constant else 0)


def prelu(node: Node, x: Value, slope: Value) -> Result:
    if node.options.get("per_channel") and len(slope.shape) == 1:  # old opsets
        slope = slope._replace(shape=(*slope.shape, *(1,) * (len(x.shape) - 2)))
    return arithmetic("prelu")(node, x, slope)


def summed(node: Node, first: Value, *others: Value) -> Result:
    """Sum: of any number of operands, pair by pair."""
    if not others:
        return Result(first.shape)
    # Constants last: the sum of two of them would be one that nobody folds.
    operands = sorted(zip((first, *others), node.inputs, strict=True), key=lambda pair: pair[0].constant is not None)
    results, left = [], operands[0]
    for i, right in enumerate(operands[1:]):
        key = node.name if i == len(others) - 1 else (node.name, i)
        results.append(_arithmetic(node, "add", left, right, key))
        left = Value(results[-1].shape), key
    parts = tuple(part for result in results for part in result.parts)
    parameters = sum(result.parameters for result in results)
    return Result(left[0].shape, parts, lambda n: sum(result.cost(n) for result in results), parameters)


def softmax(node: Node, x: Value) -> Result:
    """Over one axis; in opsets before 13 over all axes from the one given, as one."""
    if not x.shape:
        raise ShapeError("x: expected a tensor of rank 1 or more, got a number")
    flat = node.options.get("flat", False)
    axis = axis_of(node.options.get("axis", 1 if flat else -1), len(x.shape))
    over = prod(x.shape[axis:]) if flat else x.shape[axis]
    inner = 1 if flat else prod(x.shape[axis + 1 :])
    return one(node, tensors.SoftmaxSpec(over, inner, "float32"), x.shape, times=prod(x.shape[:axis]))


def lrn(node: Node, x: Value) -> Result:
    if len(x.shape) < 2:
        raise ShapeError(f"x: expected a tensor (N, C, ...), got shape {x.shape}")
    numbers = (float(node.options.get(w, d)) for w, d in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0)))
    window = shapes.integer(node.options.get("size"), "size", 1)
    spec = tensors.LrnSpec(x.shape[1], prod(x.shape[2:]), window, *numbers, "float32")
    return one(node, spec, x.shape, times=x.shape[0])
