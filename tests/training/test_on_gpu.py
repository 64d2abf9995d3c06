"""What a GPU changes in training: where tensors are, how they arrive, and in which precision."""

import contextlib
import itertools

import pytest
import torch
from accelerate import Accelerator

from datasets.dishes import Dishes, dish_names
from easy_diffusion import presets
from easy_diffusion.generate import generate_images
from easy_diffusion.training.checkpoint import load_checkpoint
from easy_diffusion.training.data_loader import make_loader
from easy_diffusion.training.train_autoencoder import train_autoencoder
from easy_diffusion.training.trainer import train

from .test_train_autoencoder import PatchDiscriminator, make_autoencoder

NAMES = ["番茄炒鸡蛋", "土豆汤", "清炒青椒", "豆腐面"]

pytestmark = pytest.mark.usefixtures("gpu")


def start_training(steps, loader=None, **options):
    """A training of the demo's network, on four images unless a loader is given."""
    torch.manual_seed(0)
    network, encoder, diffusion = presets.build_networks("".join(dish_names("train")))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)
    loader = loader or [(images, NAMES)]
    options = presets.TRAINING | options
    return train(network, diffusion, loader, encoder, steps=steps, **options)


def test_the_weights_move_to_the_gpu_and_the_loss_falls():
    steps = list(start_training(40))
    assert next(steps[-1].ema_network.parameters()).device.type == "cuda"
    first, last = steps[:5], steps[-5:]
    assert sum(step.loss for step in last) < sum(step.loss for step in first)


def test_a_step_synchronizes_once():
    steps = start_training(10)
    for _ in range(2):
        next(steps)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as warnings:
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in warnings if "synchroniz" in str(w.message)]) == 1


def test_a_resumed_training_goes_on_with_the_losses_of_an_unbroken_one(tmp_path):
    """To the rounding of bfloat16; the sums of a GPU may differ from run to run."""
    unbroken = [step.loss for step in start_training(8)]
    path = tmp_path / "model.safetensors"
    interrupted = list(itertools.islice(start_training(8, checkpoint=path, save_seconds=0), 5))
    resumed = list(start_training(8, checkpoint=path, save_seconds=0))
    assert resumed[0].index in (4, 5)       # the fifth step may have been saved or not
    losses = [step.loss for step in interrupted][:resumed[0].index] + [s.loss for s in resumed]
    assert losses == pytest.approx(unbroken, rel=0.05)
    assert load_checkpoint(path)["index"] == 8


def test_workers_are_spawned_and_hand_over_pinned_batches():
    loader = make_loader(Dishes(16, 32), 8, workers=2)
    images, names = next(iter(loader))
    assert images.is_pinned()
    assert len(names) == 8
    assert [step.index for step in start_training(3, loader)] == [0, 1, 2]


def test_fp16_trains_with_its_scaler():
    accelerator = Accelerator(mixed_precision="fp16")
    steps = list(start_training(40, accelerator=accelerator))
    assert accelerator.scaler.get_scale() >= 1
    assert steps[-1].skipped < 20           # the scale begins too high and is halved
    assert sum(step.loss for step in steps[-5:]) < sum(step.loss for step in steps[:5])
    weights = steps[-1].ema_network.parameters()
    assert all(torch.isfinite(weight).all() for weight in weights)


def test_a_network_gives_the_images_of_the_cpu(monkeypatch):
    """In float32; the noise is that of the CPU, whose generator is seeded."""
    monkeypatch.setattr("easy_diffusion.generate.autocast", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    network, encoder, diffusion = presets.build_networks("".join(dish_names("train")))
    for parameter in network.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    images = [
        generate_images(network.to(device), encoder.to(device), diffusion, NAMES, 32)
        for device in ("cpu", "cuda")
    ]
    difference = abs(images[0].astype(int) - images[1].astype(int))
    assert difference.mean() < 0.5


def test_an_autoencoder_trains_with_its_discriminator():
    torch.manual_seed(0)
    steps = train_autoencoder(
        make_autoencoder(),
        make_loader(Dishes(20, 32), 4, workers=0),
        steps=8,
        discriminator=PatchDiscriminator(width=32),
        discriminator_from=0.4,
        muon_learning_rate=3e-3,
        warmup=2,
    )
    assert [step.index for step in steps] == list(range(8))
