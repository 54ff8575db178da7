"""The built-in architectures: costs, parameters and shapes known from elsewhere, names that are torchvision's."""

import numpy as np
import pytest

from cconv import ShapeError, model_names
from cconv.model import load
from cconv.model.architectures import ARCHITECTURES

IMAGE = (1, 3, 224, 224)
#: Multiply-accumulates at 224x224, and learned parameters as torchvision's documentation gives them. It gives products
#: in thousandths of 10^9, to which all of these round; the digits behind them are this code's where nobody says them.
KNOWN = {
    "alexnet": (714_188_480, 61_100_840),
    "vgg11": (7_609_090_048, 132_863_336),
    "vgg11_bn": (7_609_090_048, 132_868_840),
    "vgg13": (11_308_466_176, 133_047_848),
    "vgg13_bn": (11_308_466_176, 133_053_736),
    "vgg16": (15_470_264_320, 138_357_544),
    "vgg16_bn": (15_470_264_320, 138_365_992),
    "vgg19": (19_632_062_464, 143_667_240),
    "vgg19_bn": (19_632_062_464, 143_678_248),
    "resnet18": (1_814_073_344, 11_689_512),
    "resnet34": (3_663_761_408, 21_797_672),
    "resnet50": (4_089_184_256, 25_557_032),
    "resnet50_v1": (3_857_973_248, 25_557_032),
    "resnet101": (7_801_405_440, 44_549_160),
    "resnet152": (11_513_626_624, 60_192_808),
    "resnext50_32x4d": (4_230_479_872, 25_028_904),
    "mobilenet_v2": (300_774_272, 3_504_872),
    "squeezenet1_0": (818_924_576, 1_248_424),
    "squeezenet1_1": (349_151_936, 1_235_496),
    "densenet121": (2_834_161_664, 7_978_856),
    "efficientnet_b0": (385_814_752, 5_288_548),
}

#: Maps at 224x224, from the papers' tables, and at another size.
SHAPES = {
    "alexnet": {"features.0": (64, 55, 55), "features.2": (64, 27, 27), "features.12": (256, 6, 6)},
    "vgg16": {"features.4": (64, 112, 112), "features.16": (256, 28, 28), "features.30": (512, 7, 7)},
    "vgg19": {"features.9": (128, 56, 56), "features.36": (512, 7, 7), "avgpool": (512, 7, 7)},
    "resnet18": {"conv1": (64, 112, 112), "maxpool": (64, 56, 56), "layer4.1.add": (512, 7, 7)},
    "resnet50": {"layer2.0.conv1": (128, 56, 56), "layer2.0.conv2": (128, 28, 28), "layer4.2.relu_2": (2048, 7, 7)},
    "resnet50_v1": {"layer2.0.conv1": (128, 28, 28), "layer2.0.conv2": (128, 28, 28), "avgpool": (2048, 1, 1)},
    "resnext50_32x4d": {"layer1.0.conv2": (128, 56, 56), "layer2.0.conv2": (256, 28, 28), "layer4.2.add": (2048, 7, 7)},
    "mobilenet_v2": {"features.3.conv.1.0": (144, 56, 56), "features.17.conv.3": (320, 7, 7)},
    "squeezenet1_0": {"features.2": (96, 54, 54), "features.12.cat": (512, 13, 13)},
    "squeezenet1_1": {"features.2": (64, 55, 55), "features.12.cat": (512, 13, 13)},
    "densenet121": {"features.denseblock1.cat": (256, 56, 56), "features.norm5": (1024, 7, 7)},
    "efficientnet_b0": {"features.2.0.block.1.0": (96, 56, 56), "features.7.0.block.3.1": (320, 7, 7)},
}
AT_96x160 = {
    "alexnet": {"features.0": (64, 23, 39), "features.12": (256, 2, 4), "avgpool": (256, 6, 6)},
    "vgg16": {"features.4": (64, 48, 80), "features.30": (512, 3, 5), "avgpool": (512, 7, 7)},
    "vgg19": {"features.36": (512, 3, 5)},
    "resnet18": {"maxpool": (64, 24, 40), "layer4.1.relu_1": (512, 3, 5)},
    "resnet50": {"layer4.2.relu_2": (2048, 3, 5), "flatten": (2048,)},
    "resnet50_v1": {"layer4.2.relu_2": (2048, 3, 5)},
    "resnext50_32x4d": {"layer4.2.relu_2": (2048, 3, 5)},
    "mobilenet_v2": {"features.18.2": (1280, 3, 5)},
    "squeezenet1_0": {"features.11": (512, 5, 9)},
    "squeezenet1_1": {"features.8": (256, 5, 9)},
    "densenet121": {"relu": (1024, 3, 5)},
    "efficientnet_b0": {"features.8.2": (1280, 3, 5)},
}

architecture = pytest.mark.parametrize("name", KNOWN)


def test_every_architecture_has_known_costs():
    assert set(KNOWN) == set(ARCHITECTURES)


@architecture
def test_cost_at_224_is_the_known_answer(name):
    bill = load(name).cost(IMAGE)
    assert bill.total.macs == KNOWN[name][0]
    assert bill.total.flops == 2 * KNOWN[name][0]
    assert sum(bill.layers.values()) == bill.total


@architecture
def test_parameters_are_as_many_as_published(name):
    assert sum(layer.parameters for layer in load(name).layers) == KNOWN[name][1]


@pytest.mark.parametrize("name", SHAPES)
def test_layers_have_the_published_shapes(name):
    model = load(name)
    for size, expected in (((224, 224), SHAPES[name]), ((96, 160), AT_96x160[name])):
        for batch in ((), (5,)):
            shapes = model.shapes((*batch, 3, *size), expected)
            assert shapes == {layer: (*batch, *shape) for layer, shape in expected.items()}


@architecture
def test_the_default_output_is_a_thousand_classes(name):
    model = load(name)
    assert model.shapes(IMAGE) == {model.outputs[0]: (1, 1000)}
    assert model.layers[-1].name == model.outputs[0]


def test_convolutions_alone_of_vgg16_are_the_known_answer():
    bill = load("vgg16").cost(IMAGE, ["features.30"])
    assert bill.total.macs == 15_346_630_656


def test_stride_on_the_1x1_or_the_3x3_is_all_that_differs():
    ours, papers = ({layer.name: layer for layer in load(name).layers} for name in ("resnet50", "resnet50_v1"))
    differing = {name for name in ours if ours[name].output_shape != papers[name].output_shape}
    assert differing == {f"layer{i}.0.{part}" for i in (2, 3, 4) for part in ("conv1", "bn1", "relu")}
    assert {name: ours[name].parameters for name in ours} == {name: papers[name].parameters for name in papers}


def test_layer_names_are_torchvisions():
    names = [layer.name for layer in load("resnet18").layers]
    assert names[:4] == ["conv1", "bn1", "relu", "maxpool"]
    assert names[4:11] == [f"layer1.0.{part}" for part in ("conv1", "bn1", "relu", "conv2", "bn2", "add", "relu_1")]
    block = ("conv1", "bn1", "relu", "conv2", "bn2", "downsample.0", "downsample.1", "add", "relu_1")
    assert [name for name in names if name.startswith("layer3.0.")] == [f"layer3.0.{part}" for part in block]
    assert names[-3:] == ["avgpool", "flatten", "fc"]
    block = (
        "conv1",
        "bn1",
        "relu",
        "conv2",
        "bn2",
        "relu_1",
        "conv3",
        "bn3",
        "downsample.0",
        "downsample.1",
        "add",
        "relu_2",
    )
    names = [layer.name for layer in load("resnet50").layers]
    assert [name for name in names if name.startswith("layer1.0.")] == [f"layer1.0.{part}" for part in block]
    for model, features in (("alexnet", 13), ("vgg16", 31), ("vgg19", 37)):
        names = [layer.name for layer in load(model).layers]
        rest = ["avgpool", "flatten", *(f"classifier.{i}" for i in range(7))]
        assert names == [*(f"features.{i}" for i in range(features)), *rest]


def test_layers_of_alexnet_and_vgg_do_what_torchvisions_do():
    operators = {layer.name: layer.operator for layer in load("alexnet").layers}
    assert [i for i in range(13) if operators[f"features.{i}"] == "Conv"] == [0, 3, 6, 8, 10]
    assert [i for i in range(13) if operators[f"features.{i}"] == "MaxPool"] == [2, 5, 12]
    assert [operators[f"classifier.{i}"] for i in range(7)] == [
        "Dropout",
        "Gemm",
        "Relu",
        "Dropout",
        "Gemm",
        "Relu",
        "Gemm",
    ]
    operators = {layer.name: layer.operator for layer in load("vgg16").layers}
    assert [i for i in range(31) if operators[f"features.{i}"] == "MaxPool"] == [4, 9, 16, 23, 30]
    assert [operators[f"classifier.{i}"] for i in range(7)] == [
        "Gemm",
        "Relu",
        "Dropout",
        "Gemm",
        "Relu",
        "Dropout",
        "Gemm",
    ]


def test_describing_a_model_draws_no_weights():
    model = load("vgg19")
    assert model.layers
    assert model.cost(IMAGE).total.macs
    assert model.executed_flops(IMAGE)
    assert model.weights.nbytes == 0


@pytest.mark.parametrize(("name", "size"), [("alexnet", (63, 63)), ("resnet18", (32, 48)), ("resnet50_v1", (33, 33))])
def test_random_weights_keep_the_signal_finite_and_alive(name, size, normal):
    y = load(name)(normal((2, 3, *size)))
    assert y.shape == (2, 1000)
    assert np.isfinite(y).all()
    assert (y.std(axis=1) > 1e-3).all()
    assert not np.array_equal(y[0], y[1])


def test_an_image_that_is_too_small_is_refused_by_the_layer_where_it_ends():
    with pytest.raises(ShapeError, match=r"layer 'features.\d+' \(MaxPool\) on an image of \(3, 20, 20\)"):
        load("alexnet").cost((3, 20, 20))


@pytest.mark.parametrize("name", model_names())
def test_every_built_in_describes_itself(name):
    model = load(name)
    assert model.name == name
    assert model.description.endswith(".")
    assert set(model.outputs) <= {layer.name for layer in model.layers}
    layers = model.layers_at((2, *model.input_shape))
    assert [layer.output_shape[1:] for layer in layers] == [layer.output_shape for layer in model.layers]
    assert all(layer.output_shape[0] == 2 for layer in layers)
    assert (
        sum((layer.cost for layer in model.layers), 0)
        == model.cost(model.input_shape, [layer.name for layer in layers]).total
    )
