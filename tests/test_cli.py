"""Cli: what each command prints, writes and returns; one line and exit code 2 for whatever is wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest

import cconv
from cconv import cli
from cconv.model.architectures import build
from cconv.model.builtin import he_parameters

LAYER = ["--x", "1,100,64,64", "--w", "100,100,5,5", "--padding", "2"]


@pytest.fixture
def run(capsys):
    """f(*words) -> what was printed; the command must succeed."""

    def _run(*words):
        code = cli.main(list(words))
        output = capsys.readouterr()
        assert code == 0, output.err
        return output.out

    return _run


@pytest.fixture
def refused(capsys):
    """f(*words) -> the one line on stderr; the command must end with 2 and print nothing else."""

    def _refused(*words):
        code = cli.main(list(words))
        output = capsys.readouterr()
        assert (code, output.out) == (2, "")
        assert output.err.endswith("\n")
        assert output.err.count("\n") == 1
        return output.err

    return _refused


@pytest.fixture
def photographs(tmp_path, rng):
    """Three images of different sizes, two of them with the same name."""
    paths = []
    for name, shape in (("one.png", (20, 30, 3)), ("two.png", (33, 17, 3)), ("more/one.png", (25, 25, 3))):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(cconv.images.png(rng.integers(0, 256, shape).astype(np.uint8)))
        paths.append(str(path))
    return paths


class TestInfo:
    def test_it_says_what_is_here_and_why_the_rest_is_not(self, run):
        text = run("info")
        assert cconv.show_config()["isa"] in text
        assert "reference" in text
        assert "vgg16" in text

    def test_as_json(self, run):
        record = json.loads(run("info", "--json"))
        assert record["backends"]["cpu"] == "available"
        assert record["threads"] >= 1
        assert tuple(record["models"]) == cconv.model_names()


class TestCost:
    def test_of_a_layer(self, run):
        assert "1,024,000,000" in run("cost", *LAYER)
        record = json.loads(run("cost", *LAYER, "--bias", "--json"))
        expected = cconv.conv2d_cost((1, 100, 64, 64), (100, 100, 5, 5), bias=True, padding=2)
        assert {key: record["total"][key] for key in expected.as_dict()} == expected.as_dict()
        assert record["layers"][0]["output_shape"] == [1, 100, 64, 64]
        assert record["total"]["parameters"] == 250_100

    @pytest.mark.parametrize(
        ("words", "options"),
        [
            (["--stride", "2"], {"stride": 2}),
            (["--stride", "2,1", "--padding", "1,0"], {"stride": (2, 1), "padding": (1, 0)}),
            (["--padding", "0,1,2,3"], {"padding": (0, 1, 2, 3)}),
            (["--padding", "same", "--dilation", "2"], {"padding": "same", "dilation": 2}),
            (["--residual", "--activation", "gelu"], {"residual": True, "activation": "gelu"}),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_takes_every_option_of_conv2d(self, run, words, options):
        record = json.loads(run("cost", "--x", "2,6,12,13", "--w", "8,6,3,3", *words, "--json"))
        assert record["total"]["macs"] == cconv.conv2d_cost((2, 6, 12, 13), (8, 6, 3, 3), **options).macs
        assert record["total"]["bytes"] == cconv.conv2d_cost((2, 6, 12, 13), (8, 6, 3, 3), **options).bytes

    @pytest.mark.parametrize(
        ("name", "macs"),
        [
            ("alexnet", 714_188_480),
            ("vgg16", 15_470_264_320),
            ("vgg19", 19_632_062_464),
            ("resnet18", 1_814_073_344),
            ("resnet50", 4_089_184_256),
        ],
    )
    def test_of_the_known_networks(self, run, name, macs):
        assert f"{macs:,}" in run("cost", name).splitlines()[-2]
        assert json.loads(run("cost", name, "--json"))["total"]["macs"] == macs

    def test_of_a_network_at_another_size_and_batch(self, run):
        record = json.loads(run("cost", "vgg16", "--size", "64,96", "--batch", "3", "--layers", "features.4", "--json"))
        expected = cconv.load("vgg16").cost((3, 3, 64, 96), ["features.4"])
        assert [layer["name"] for layer in record["layers"]] == list(expected.layers)
        assert record["total"]["macs"] == expected.total.macs
        assert record["layers"][-1]["output_shape"] == [3, 64, 32, 48]

    def test_the_rows_add_up(self, run):
        record = json.loads(run("cost", "resnet18", "--json"))
        for key, value in record["total"].items():
            assert value == sum(layer[key] for layer in record["layers"])


class TestEstimate:
    def test_without_words_it_is_the_lectures_table(self, run):
        text = run("estimate")
        assert "10,240,000,000,000,000 macs" in text
        for rate, time_ in (("0.15 T macs/s", "18.96 h"), ("12 T macs/s", "14.2 min"), ("0.15 T flops/s", "37.93 h"),
                            ("12 T flops/s", "28.4 min")):  # fmt: skip
            assert any(rate in line and line.endswith(time_) for line in text.splitlines()), (rate, text)
        assert "this machine" in text

    def test_its_words_change_the_lectures_table(self, run):
        record = json.loads(run("estimate", "--samples", "1", "--no-measure", "--flops-per-s", "2.048T", "--json"))
        assert record["macs"] == 10_240_000_000
        assert record["estimates"] == [{"counting": "flops", "rate_per_s": 2.048e12, "seconds": pytest.approx(0.01)}]
        assert "measured" not in record

    def test_of_a_network(self, run):
        record = json.loads(run("estimate", "alexnet", "--samples", "10", "--macs-per-s", "1e12", "--json"))
        assert record["estimates"][0]["seconds"] == pytest.approx(10 * 714_188_480 / 1e12)

    def test_measures_this_machine_when_asked(self, run):
        record = json.loads(
            run("estimate", "--x", "3,16,16", "--w", "4,3,3,3", "--measure", "--samples", "7", "--json")
        )
        measured = record["measured"]
        assert measured["flops_per_s"] == pytest.approx(2 * measured["macs_per_s"])
        assert measured["seconds"] == pytest.approx(7 * measured["seconds_each"])

    @pytest.mark.parametrize(
        ("text", "value"), [("0.15T", 0.15e12), ("12T", 12e12), ("1e12", 1e12), ("300G", 3e11), ("5k", 5e3), ("7", 7.0)]
    )
    def test_rates_are_read_as_people_write_them(self, text, value):
        assert cli.rate(text) == pytest.approx(value)

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (68266.7, "18.96 h"),
            (853.3, "14.2 min"),
            (3, "3.00 s"),
            (0.0025, "2.50 ms"),
            (4e-6, "4.00 us"),
            (1e6, "11.57 d"),
        ],
    )
    def test_times_are_written_as_people_read_them(self, seconds, text):
        assert cli.duration(seconds) == text


class TestExtract:
    def test_maps_of_images_of_different_sizes(self, run, photographs, tmp_path):
        out = tmp_path / "maps.npz"
        record = json.loads(
            run("extract", *photographs, "--model", "texture", "--layers", "level1.relu", "--out", str(out), "--json")
        )
        model = cconv.load("texture")
        with np.load(out) as maps:
            assert sorted(maps) == ["one.png#2/level1.relu", "one.png/level1.relu", "two.png/level1.relu"]
            for path, bill in zip(photographs, record["images"], strict=True):
                image = cconv.images.read(path)
                got = maps[f"{bill['image']}/level1.relu"]
                np.testing.assert_array_equal(got, model.run(image, ["level1.relu"])["level1.relu"])
                assert bill["macs"] == model.cost(image.shape, ["level1.relu"]).total.macs
        assert record["total"]["macs"] == sum(bill["macs"] for bill in record["images"])
        assert record["executed_flops"] > 0

    def test_a_picture_of_the_maps(self, run, photographs, tmp_path):
        run("extract", photographs[0], "--png", str(tmp_path / "grid.png"))
        picture = cconv.images.read(tmp_path / "grid.png")
        expected = cconv.images.grid(cconv.load("edges")(cconv.images.read(photographs[0])))
        np.testing.assert_allclose(picture[0] * 255, expected, atol=1e-4)

    def test_a_picture_for_each_image_where_there_are_several(self, run, photographs, tmp_path):
        run("extract", *photographs[:2], "--png", str(tmp_path / "grid.png"))
        assert {p.name for p in tmp_path.glob("grid*")} == {"grid.one.png.conv.png", "grid.two.png.conv.png"}

    def test_the_bill_is_printed(self, run, photographs):
        lines = run("extract", *photographs).splitlines()
        total = sum(cconv.load("edges").cost(cconv.images.read(p).shape).total.macs for p in photographs)
        (line,) = (line for line in lines if line.startswith("total"))
        assert f"{total:,}" in line

    def test_a_state_dict_is_given_pictures_as_it_was_trained_on_them(self, run, refused, photographs, tmp_path):
        numpy = pytest.importorskip("safetensors.numpy")
        graph = build("squeezenet1_1", partial(he_parameters, seed=0), "drawn")
        path = tmp_path / "net.safetensors"
        numpy.save_file({name: constant.read() for name, constant in graph.constants.items()}, path)
        words = [photographs[0], "--model", str(path), "--layers", "features.2", "--json"]
        (told,) = json.loads(run("extract", *words, "--architecture", "squeezenet1_1"))["images"]
        assert told["input_shape"] == [3, 224, 224]
        assert told["macs"] == cconv.load("squeezenet1_1").cost((3, 224, 224), ["features.2"]).total.macs
        size = list(cconv.images.read(photographs[0]).shape)
        words += ["--architecture", "squeezenet1_1", "--preprocessing", "none"]
        assert json.loads(run("extract", *words))["images"][0]["input_shape"] == size
        assert "the closest are squeezenet1_1" in refused("extract", *words, "--architecture", "squeezenet1.1")
        assert "349,151,936" in run("cost", str(path), "--architecture", "squeezenet1_1")

    def test_a_failure_leaves_no_half_file(self, refused, photographs, tmp_path):
        broken = tmp_path / "broken.png"
        broken.write_bytes((tmp_path / "one.png").read_bytes()[:60])
        before = set(tmp_path.iterdir())
        line = refused("extract", photographs[0], str(broken), "--out", str(tmp_path / "maps.npz"))
        assert "broken.png" in line
        assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["command"]),
        (["frobnicate"], ["frobnicate", "info", "extract"]),
        (["cost"], ["vgg16", "--x"]),
        (["cost", "vgg61"], ["vgg61", "vgg16"]),
        (["cost", "vgg16", "--layers", "features.99"], ["features.99"]),
        (["cost", "vgg16", "--size", "big"], ["--size", "big"]),
        (["cost", "vgg16", "--size", "-5"], ["-5"]),
        (["cost", "vgg16", "--batch", "0"], ["--batch", "'0'"]),
        (["cost", "vgg16", "--stride", "2"], ["--stride"]),
        (["cost", *LAYER, "--size", "32"], ["--size"]),
        (["cost", "--x", "1,3,8,8"], ["--w"]),
        (["cost", "--x", "8,8", "--w", "4,3,3,3"], ["--x", "8x8"]),
        (["cost", "--x", "1,3,8,8", "--w", "4,2,3,3"], ["channels"]),
        (["cost", "--x", "1,3,8,8", "--w", "4,3,3,3", "--activation", "mish"], ["mish", "relu"]),
        (["cost", "--x", "1,3,8,8", "--w", "4,3,3,3", "--padding", "full"], ["full"]),
        (["estimate", "--samples", "-1"], ["samples"]),
        (["estimate", "--samples", "many"], ["many"]),
        (["estimate", "--macs-per-s", "0"], ["'0'"]),
        (["estimate", "--macs-per-s", "12X"], ["12X"]),
        (["estimate", "--macs-per-s", "nan"], ["nan"]),
        (["extract"], ["IMAGE"]),
        (["extract", "missing.png"], ["missing.png"]),
        (["extract", __file__], ["JPEG or PNG"]),
        (["extract", "missing.png", "--model", "nope"], ["nope", "edges"]),
        (["extract", "missing.png", "--out", ""], ["--out", "a file's name", "''"]),
        (["extract", "missing.png", "--out", "."], ["--out", "a file's name", "'.'"]),
        (["extract", "missing.png", "--png", ""], ["--png", "a file's name", "''"]),
        (["extract", "missing.png", "--png", ".."], ["--png", "a file's name", "'..'"]),
        (["extract", "missing.png", "--layers", ","], ["--layers", "names separated by commas", "','"]),
        (["cost", "vgg16", "--layers", ","], ["--layers", "names separated by commas", "','"]),
        (["estimate", "vgg16", "--samples", "9" * 400], ["samples"]),
        (["estimate", "--x", "1,1,8,8", "--w", "1,1,3,3", "--stride", "9" * 22, "--measure"], ["stride"]),
        (["estimate", "--x", "1,1,8,8", "--w", "1,1,3,3", "--padding", "20000000000", "--measure"], ["padding"]),
        (["estimate", "--x", "1,1,2000000000,2000000000", "--w", "1,1,1,1", "--measure"], ["--measure", "bytes"]),
    ],
    ids=lambda value: " ".join(value)[:50] or "nothing",
)
def test_what_is_wrong_is_said_in_one_line(refused, words, parts):
    line = refused(*words)
    assert "error" in line
    for part in parts:
        assert part in line


@pytest.mark.parametrize("error", [MemoryError(), MemoryError("2 TiB\nmore"), OverflowError("int too large")])
def test_too_little_memory_or_too_large_a_number_is_no_traceback(refused, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(cli, "show_config", fail)
    assert refused("info").startswith(f"cconv: error: {type(error).__name__}: {' '.join(str(error).split())}")


class TestDevice:
    """Where it computes: a GPU is planted whose kernels are the CPU's, or there is none."""

    @pytest.fixture
    def no_gpu(self, monkeypatch):
        def unavailable():
            raise cconv.BackendUnavailable("gpu: planted, there is none")

        monkeypatch.setattr(cconv.backend.get("gpu"), "machine", unavailable)

    @pytest.fixture
    def gpu(self, monkeypatch):
        """The arrays that went there."""
        gpu, cpu, went = cconv.backend.get("gpu"), cconv.backend.get("cpu"), []
        monkeypatch.setattr(gpu, "machine", cpu.machine)
        monkeypatch.setattr(gpu, "synchronize", cpu.synchronize)
        monkeypatch.setattr(gpu, "asarray", lambda array: went.append(array.shape) or array)
        monkeypatch.setattr(gpu, "feed", lambda function, x, step, cancel: went.append(x.shape) or iter([function(x)]))
        return went

    def test_auto_is_the_cpu_where_there_is_no_gpu(self, run, no_gpu, photographs):
        for words in ([], ["--device", "auto"]):
            assert json.loads(run("extract", photographs[0], "--json", *words))["device"] == "cpu"
        words = ["estimate", *LAYER, "--measure", "--json"]
        assert json.loads(run(*words, "--device", "cpu"))["measured"]["device"] == "cpu"

    def test_cuda_without_a_gpu_is_one_line(self, refused, no_gpu, photographs):
        for words in (["extract", photographs[0]], ["estimate", *LAYER, "--measure"]):
            assert refused(*words, "--device", "cuda") == "cconv: error: gpu: planted, there is none\n"

    def test_a_gpu_gives_the_same_maps_and_is_named(self, run, gpu, photographs, tmp_path):
        maps = []
        for name in ("cpu", "cuda"):
            out = tmp_path / f"{name}.npz"
            told = json.loads(run("extract", photographs[0], "--device", name, "--out", str(out), "--json"))
            assert told["device"] == name
            assert bool(gpu) == (name == "cuda")
            maps.append(dict(np.load(out)))
        assert maps[0].keys() == maps[1].keys()
        assert all(np.array_equal(maps[0][key], maps[1][key]) for key in maps[0])

    def test_a_gpu_is_measured_on_its_own_arrays(self, run, gpu):
        assert "this machine's GPU" in run("estimate", *LAYER, "--bias", "--measure", "--device", "cuda")
        assert {(100, 100, 5, 5), (100,), (1, 100, 64, 64)} <= set(gpu)


def test_help_is_not_an_error(run):
    assert "extract" in run("--help")
    assert "--macs-per-s" in run("estimate", "--help")


def test_a_reader_that_goes_away_is_not_a_traceback():
    """`cconv cost ... | head -1`: the table is larger than a pipe holds."""
    writer = subprocess.Popen(
        [sys.executable, "-m", "cconv.cli", "cost", "--x", "1,3,8,8", "--w", "4,3,3,3", "--count", "20000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    writer.stdout.readline()
    writer.stdout.close()
    errors = writer.stderr.read()
    writer.stderr.close()
    assert writer.wait(timeout=60) == 128 + signal.SIGPIPE
    assert errors == b""


def test_an_interrupt_is_not_a_traceback(tmp_path):
    ready = tmp_path / "ready"
    code = f"""
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs this in the background may have it ignored
from cconv import cli
from cconv.model.architectures import build
from cconv.model.builtin import he_parameters
def wait(*_):
    open({os.fspath(ready)!r}, "w").close()
    time.sleep(60)
cli.measured_seconds = wait
sys.exit(cli.main(["estimate"]))
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for _ in range(600):
        if ready.exists():
            break
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGINT
    assert errors == b"cconv: interrupted\n"


@pytest.mark.parametrize("module", ["tqdm", "PIL"])
def test_a_missing_extra_is_named(module, photographs):
    code = f"import sys; sys.modules[{module!r}] = None; from cconv.cli import main; sys.exit(main(sys.argv[1:]))"
    child = subprocess.run(
        [sys.executable, "-c", code, "extract", photographs[0]], capture_output=True, text=True, check=False
    )
    assert child.returncode == 2
    assert "cconv[batch]" in child.stderr
    assert child.stderr.count("\n") == 1
