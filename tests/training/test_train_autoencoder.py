import copy
import multiprocessing
import signal
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from datasets.dishes import Dishes
from easy_diffusion.networks.autoencoder import Autoencoder
from easy_diffusion.training.autoencoder_losses import PatchDiscriminator
from easy_diffusion.training.checkpoint import load_checkpoint, save_checkpoint
from easy_diffusion.training.data_loader import make_loader
from easy_diffusion.training.train_autoencoder import measure_latent_scale, train_autoencoder


def run(steps, checkpoint=None, seconds=0.0, **options):
    """The same run each time: weights, data, order and noise from seeds. seconds: between two checkpoints."""
    torch.manual_seed(0)
    autoencoder, discriminator = Autoencoder((32, 32), blocks=1, patch=2), PatchDiscriminator(width=32)
    return train_autoencoder(autoencoder, make_loader(Dishes(20, 32), 4), steps=steps, checkpoint=checkpoint, save_seconds=seconds,
                             discriminator=discriminator, discriminator_from=0.4, muon_learning_rate=3e-3, warmup=2,
                             accelerator=Accelerator(mixed_precision="no"), **options)


def weights_of(checkpoint):
    saved = load_checkpoint(checkpoint)
    return {f"{name}.{key}": tensor for name, state in saved["models"].items() for key, tensor in state.items()}


def test_pictures_come_back_better_and_better():
    *_, first = run(1)
    for last in run(120):
        pass
    assert last.terms["reconstruction"] < 0.6 * first.terms["reconstruction"] and 0 < last.progress <= 1
    assert last.terms.keys() == {"reconstruction", "squared", "kl", "adversarial", "discriminator", "lambda"}
    assert first.terms.keys() == {"reconstruction", "squared", "kl"}      # the discriminator had not joined yet
    assert not last.autoencoder.training and not any(p.requires_grad for p in last.autoencoder.parameters())


def reported_run(checkpoint, done):
    torch.set_num_threads(1)
    for step in run(24, checkpoint):
        done.value = step.index + 1


def test_killed_at_random_moments_it_ends_with_the_weights_of_an_unbroken_run(tmp_path):
    """Both optimizers, the discriminator, which joins at step 10, the average, the generator and the order of the pictures go on."""
    context, random = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork"), np.random.default_rng(0)

    def start(name):
        done = context.Value("i", 0)
        process = context.Process(target=reported_run, args=(tmp_path / name, done))
        process.start()
        return process, done

    process, _ = start("whole")
    process.join()
    assert process.exitcode == 0
    for until in (2, 7, 11, 16, 21):                                        # the checkpoint is written at each step
        process, done = start("broken")
        while done.value < until and process.is_alive():
            time.sleep(0.001)
        time.sleep(float(random.uniform(0, 0.05)))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL and until <= load_checkpoint(tmp_path / "broken")["index"] < 24
    process, _ = start("broken")
    process.join()
    assert process.exitcode == 0
    whole, broken = weights_of(tmp_path / "whole"), weights_of(tmp_path / "broken")
    assert whole.keys() == broken.keys() and len({name.split(".")[0] for name in whole}) == 3
    assert [name for name in whole if not torch.equal(whole[name], broken[name])] == []


def test_a_finished_run_yields_nothing_and_keeps_its_average(tmp_path):
    *_, last = run(3, tmp_path / "c")
    assert list(run(3, tmp_path / "c")) == []
    kept, average = load_checkpoint(tmp_path / "c")["models"]["ema"], last.autoencoder.state_dict()
    assert kept.keys() == average.keys() and all(torch.equal(kept[name], average[name]) for name in kept)


def test_the_loss_is_the_sum_of_its_weighed_terms_and_each_network_learns_from_its_own():
    weights = dict(squared=2.0, structure=0.3, kl=0.7, perceptual_weight=0.2, adversarial=0.4)
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=32)
    before = copy.deepcopy(discriminator.state_dict())
    *_, step = train_autoencoder(Autoencoder((32, 32), blocks=1, patch=2), make_loader(Dishes(20, 32), 4), steps=3,
                                 perceptual=lambda x, y: (x - y).square().flatten(1).mean(dim=1), discriminator=discriminator,
                                 discriminator_from=0, discriminator_learning_rate=0, accelerator=Accelerator(mixed_precision="no"),
                                 **weights)
    terms = step.terms
    expected = (terms["reconstruction"] + 2.0 * terms["squared"] + 0.3 * terms["structure"] + 0.7 * terms["kl"] + 0.2 * terms["perceptual"]
                + 0.4 * terms["lambda"] * terms["adversarial"])
    assert step.loss == pytest.approx(expected, rel=1e-5) and min(terms["kl"], terms["perceptual"]) > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in discriminator.state_dict().items())


def test_half_precision_keeps_the_posterior_whole():
    """Under autocast the last convolution before the latent, and the latent, stay in single precision."""
    torch.manual_seed(0)
    autoencoder, x = Autoencoder((32, 32), blocks=1), torch.randn(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        posterior = autoencoder.encode(x)
        assert posterior.mean.dtype == posterior.log_variance.dtype == posterior.sample().dtype == torch.float32
        assert autoencoder(x)[0].shape == x.shape


def test_checkpoints_of_another_run_are_refused(tmp_path):
    for _ in run(2, tmp_path / "c"):
        pass
    with pytest.raises(ValueError, match="one has autoencoder, ema and 1"):
        next(train_autoencoder(Autoencoder((32, 32), blocks=1, patch=2), make_loader(Dishes(20, 32), 4), steps=4, checkpoint=tmp_path / "c",
                               accelerator=Accelerator(mixed_precision="no")))
    save_checkpoint(tmp_path / "other", {"weights": torch.ones(1)})
    with pytest.raises(ValueError, match="not one of an autoencoder's training"):
        next(run(2, tmp_path / "other"))
    with pytest.raises(ValueError, match="steps=0"):
        next(run(0))
    with pytest.raises(ValueError, match="no batch"):
        next(train_autoencoder(Autoencoder((32,), blocks=1), [], steps=1, accelerator=Accelerator(mixed_precision="no")))


def test_a_loss_that_is_not_finite_is_named_with_its_step():
    with pytest.raises(FloatingPointError, match="step 0"):
        next(run(3, kl=float("nan")))


def test_scale_and_shift_make_latents_standard():
    torch.manual_seed(0)
    autoencoder = Autoencoder((32, 32), blocks=1)
    data = make_loader(Dishes(64, 32), 16)
    scale, shift = measure_latent_scale(autoencoder, data, 64)
    assert (autoencoder.scale, autoencoder.shift) == (scale, shift)
    with torch.no_grad():
        z = torch.cat([autoencoder.encode(x.float() / 127.5 - 1).sample() for x, _ in data])
    z = (z - shift) * scale
    with pytest.raises(ValueError, match="no batch"):
        measure_latent_scale(autoencoder, [])
    assert float(z.mean()) == pytest.approx(0, abs=0.02) and float(z.std()) == pytest.approx(1, abs=0.02)
