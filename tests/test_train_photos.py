"""The command python -m easy_diffusion.train_photos: from a folder to samples, and resuming."""

import json
import math

import pytest
import torch
from PIL import Image

from datasets.aipos import AiposFood
from datasets.dishes import draw_dish
from easy_diffusion import photo_presets
from easy_diffusion.dish_classifier import load_whole_dataset
from easy_diffusion.networks.autoencoder import load_autoencoder
from easy_diffusion.presets import reconstruct
from easy_diffusion.pretrained import load_model
from easy_diffusion.train_photos import main, measure_accuracy, parse_options
from easy_diffusion.training.checkpoint import load_checkpoint

NAMES = ["土豆汤", "清炒青椒", "番茄炒鸡蛋"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty "photographs" of each of three dishes, and a damaged file."""
    folder = tmp_path_factory.mktemp("photographs") / "dishes"
    for name in NAMES:
        (folder / name).mkdir(parents=True)
        for seed in range(20):
            pixels = draw_dish(name, 48, seed).transpose(1, 2, 0)
            Image.fromarray(pixels).save(folder / name / f"{seed}.png")
    (folder / NAMES[0] / "damaged.jpg").write_text("not an image")
    return folder


def arguments(folder, out, minutes=0.05):
    return [
        str(folder), "--out", str(out), "--size", "32", "--views", "2", "--batch-size", "16",
        "--minutes", str(minutes), "--autoencoder-minutes", "0.05", "--samples", "6",
        "--evaluate-minutes", "10",
    ]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert main(arguments(folder, out)) == 0
    return out


def test_the_report_has_all_measurements(finished, folder):
    report = json.loads((finished / "report.json").read_text())
    assert {"real", "reconstructed", "samples"} == report.keys()
    assert report["real"]["top1"] > 0.8                     # three dishes of different colours
    # How good an autoencoder of three seconds is depends on the machine, the figure does not.
    images, _ = load_whole_dataset(AiposFood(folder, 32, "test", photo_presets.TEST_FRACTION))
    again = reconstruct(load_autoencoder(finished / "autoencoder_32.safetensors"), images)
    expected = -10 * ((images.double() - again) / 255).square().mean(dim=(1, 2, 3)).log10().mean()
    assert report["reconstructed"]["psnr_db"] == pytest.approx(float(expected), abs=0.1)
    samples = report["samples"]
    assert 0 <= samples["top1"] <= samples["top5"] == 1     # there are three names
    assert samples["kernel_distance"] > 0 and 0 <= samples["copied_fraction"] <= 1


def test_images_and_the_log_are_written(finished):
    for name in ("samples.png", "neighbours.png", "autoencoder_32.png", "log.png"):
        with Image.open(finished / name) as image:
            assert image.width > 64
    header, *_, last = (finished / "log.csv").read_text().splitlines()
    row = dict(zip(header.split(","), last.split(",")))
    assert float(row["kernel_distance"]) > 0


def test_the_model_is_one_for_the_demo(finished):
    model = load_model(finished / "weights")
    assert set(model.encoder.characters) == set("".join(NAMES))
    assert model.autoencoder is not None
    assert model.network.settings["dropout"] == photo_presets.CPU_UNET["dropout"]


def test_the_same_command_repeats_nothing_and_more_minutes_go_on(folder, finished, capsys):
    checkpoint = finished / "model.safetensors"
    autoencoder = (finished / "autoencoder_32.safetensors").read_bytes()
    steps = load_checkpoint(checkpoint)["index"]
    assert main(arguments(folder, finished)) == 0
    assert load_checkpoint(checkpoint)["index"] == steps
    assert main(arguments(folder, finished, minutes=0.1)) == 0
    assert load_checkpoint(checkpoint)["index"] > steps
    assert (finished / "autoencoder_32.safetensors").read_bytes() == autoencoder
    assert "1 files skipped" in capsys.readouterr().out


def test_features_of_other_photographs_are_refused(folder, finished, tmp_path):
    photographs = photo_presets.prepare_views(folder, tmp_path, 32, views=1)
    with pytest.raises(ValueError, match="features of other photographs: remove it"):
        photo_presets.prepare_metrics(
            photographs, finished / "features.safetensors", torch.nn.Identity()
        )


def test_dishes_without_a_training_photograph_do_not_count(folder, finished):
    photographs = photo_presets.prepare_views(folder, finished, 32, views=2)
    metrics = photo_presets.prepare_metrics(photographs, finished / "features.safetensors")
    images, names = photographs.test_images, photographs.test_names
    expected = measure_accuracy(metrics, images, names)
    more = torch.cat([images, images[:2]])
    assert measure_accuracy(metrics, more, [*names, "汉堡", "热狗"]) == expected
    assert math.isnan(measure_accuracy(metrics, images[:1], ["汉堡"])["top1"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--minutes", "0"], "--minutes must be 0.001 or more"),
        (["--size", "30"], "multiple of 8"),
        (["--views", "0"], "--views must be 1 or more"),
        (["--samples", "3"], "--samples must be 4 or more"),
    ],
)
def test_bad_options_end_before_the_work(option, message, capsys):
    with pytest.raises(SystemExit):
        parse_options(["photos", *option])
    assert message in capsys.readouterr().err


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        main([str(tmp_path / "nothing"), "--out", str(tmp_path)])


def test_what_the_network_cannot_have_is_refused_before_the_trainings(folder, tmp_path):
    options = [str(folder), "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="--size must be a multiple of 16, not 40"):
        main([*options, "--size", "40"])
    with pytest.raises(FileNotFoundError, match="--initial-weights .*nothing"):
        main([*options, "--initial-weights", str(tmp_path / "nothing")])
    assert not list((tmp_path / "out").glob("*"))
    with pytest.raises(ValueError, match="at most 31 characters"):
        photo_presets.check_photo_networks(["stir-fried tomatoes with scrambled eggs"], 128)
