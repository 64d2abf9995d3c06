"""Training an autoencoder: it learns, resumes exactly, and refuses incompatible checkpoints."""

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


def make_autoencoder():
    return Autoencoder((32, 32), blocks=1, patch=2)


def full_precision():
    return Accelerator(mixed_precision="no")


def run_training(steps, checkpoint=None, save_seconds=0.0, scaler=None, **options):
    """The same training at each call: weights, data, order and noise follow from seeds."""
    torch.manual_seed(0)
    autoencoder = make_autoencoder()
    discriminator = PatchDiscriminator(width=32)
    accelerator = full_precision()
    accelerator.scaler = scaler
    return train_autoencoder(
        autoencoder,
        make_loader(Dishes(20, 32), 4),
        steps=steps,
        checkpoint=checkpoint,
        save_seconds=save_seconds,
        discriminator=discriminator,
        discriminator_from=0.4,
        muon_learning_rate=3e-3,
        warmup=2,
        accelerator=accelerator,
        **options,
    )


def load_all_weights(checkpoint):
    """All weights in a checkpoint, by "network.parameter"."""
    saved = load_checkpoint(checkpoint)
    return {
        f"{name}.{key}": tensor
        for name, state in saved["models"].items() for key, tensor in state.items()
    }


def test_reconstructions_improve():
    *_, first = run_training(1)
    for last in run_training(120):
        pass
    assert last.terms["reconstruction"] < 0.6 * first.terms["reconstruction"]
    assert 0 < last.progress <= 1
    without_discriminator = {"reconstruction", "squared", "kl"}
    assert first.terms.keys() == without_discriminator          # it has not joined yet
    assert last.terms.keys() == without_discriminator | {"adversarial", "discriminator", "lambda"}
    assert not last.autoencoder.training
    assert not any(parameter.requires_grad for parameter in last.autoencoder.parameters())


def run_and_report(checkpoint, steps_done):
    torch.set_num_threads(1)
    for step in run_training(24, checkpoint):
        steps_done.value = step.index + 1


def test_killed_at_random_moments_it_ends_with_the_weights_of_an_uninterrupted_training(tmp_path):
    """It resumes optimizers, discriminator (which joins at step 10), EMA, noise and data order."""
    context = multiprocessing.get_context("spawn" if torch.cuda.is_initialized() else "fork")
    rng = np.random.default_rng(0)

    def start(name):
        steps_done = context.Value("i", 0)
        process = context.Process(target=run_and_report, args=(tmp_path / name, steps_done))
        process.start()
        return process, steps_done

    process, _ = start("uninterrupted")
    process.join()
    assert process.exitcode == 0
    for kill_after in (2, 7, 11, 16, 21):                       # a checkpoint is saved at each step
        process, steps_done = start("killed")
        while steps_done.value < kill_after and process.is_alive():
            time.sleep(0.001)
        time.sleep(float(rng.uniform(0, 0.05)))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert kill_after <= load_checkpoint(tmp_path / "killed")["index"] < 24
    process, _ = start("killed")
    process.join()
    assert process.exitcode == 0

    uninterrupted = load_all_weights(tmp_path / "uninterrupted")
    killed = load_all_weights(tmp_path / "killed")
    assert uninterrupted.keys() == killed.keys()
    assert len({name.split(".")[0] for name in uninterrupted}) == 3
    different = [
        name for name in uninterrupted if not torch.equal(uninterrupted[name], killed[name])
    ]
    assert different == []


def test_a_finished_training_yields_no_step_and_keeps_its_ema_weights(tmp_path):
    *_, last = run_training(3, tmp_path / "c")
    assert list(run_training(3, tmp_path / "c")) == []
    saved = load_checkpoint(tmp_path / "c")["models"]["ema"]
    expected = last.autoencoder.state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)


def test_the_loss_is_the_weighted_sum_of_its_terms_and_each_network_learns_from_its_own():
    def perceptual(x, y):
        return (x - y).square().flatten(1).mean(dim=1)

    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=32)
    initial_weights = copy.deepcopy(discriminator.state_dict())
    *_, step = train_autoencoder(
        make_autoencoder(),
        make_loader(Dishes(20, 32), 4),
        steps=3,
        squared=2.0,
        structure=0.3,
        kl=0.7,
        perceptual=perceptual,
        perceptual_weight=0.2,
        discriminator=discriminator,
        discriminator_from=0,
        discriminator_learning_rate=0,
        adversarial=0.4,
        accelerator=full_precision(),
    )
    terms = step.terms
    expected = (
        terms["reconstruction"]
        + 2.0 * terms["squared"]
        + 0.3 * terms["structure"]
        + 0.7 * terms["kl"]
        + 0.2 * terms["perceptual"]
        + 0.4 * terms["lambda"] * terms["adversarial"]
    )
    assert step.loss == pytest.approx(expected, rel=1e-5)
    assert min(terms["kl"], terms["perceptual"]) > 0
    for name, tensor in discriminator.state_dict().items():     # its own learning rate is 0
        assert torch.equal(initial_weights[name], tensor)


def test_the_posterior_is_in_single_precision_under_autocast():
    """So is the last convolution before the latent."""
    torch.manual_seed(0)
    autoencoder = Autoencoder((32, 32), blocks=1)
    x = torch.randn(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        posterior = autoencoder.encode(x)
        assert posterior.mean.dtype == torch.float32
        assert posterior.log_variance.dtype == torch.float32
        assert posterior.sample().dtype == torch.float32
        assert autoencoder(x)[0].shape == x.shape


def test_incompatible_checkpoints_and_wrong_arguments_are_refused(tmp_path):
    for _ in run_training(2, tmp_path / "c"):
        pass
    without_discriminator = train_autoencoder(
        make_autoencoder(),
        make_loader(Dishes(20, 32), 4),
        steps=4,
        checkpoint=tmp_path / "c",
        accelerator=full_precision(),
    )
    with pytest.raises(ValueError, match="has the networks autoencoder, ema and optimizers: 1"):
        next(without_discriminator)
    save_checkpoint(tmp_path / "other", {"weights": torch.ones(1)})
    with pytest.raises(ValueError, match="not of an autoencoder's training"):
        next(run_training(2, tmp_path / "other"))
    with pytest.raises(ValueError, match="steps=0"):
        next(run_training(0))
    with pytest.raises(ValueError, match="no batch"):
        next(train_autoencoder(make_autoencoder(), [], steps=1, accelerator=full_precision()))


def test_the_error_for_a_loss_that_is_not_finite_names_the_step():
    with pytest.raises(FloatingPointError, match="step 0"):
        next(run_training(3, kl=float("nan")))


def test_a_gradient_scaler_changes_nothing_but_skips_steps_that_overflow(tmp_path):
    """As with fp16 on a GPU. The scale is that of float32, so that only the last case overflows."""
    *_, expected = run_training(4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 10)
    *_, scaled = run_training(4, tmp_path / "c", scaler=scaler)
    weights, scaled_weights = (
        torch.nn.utils.parameters_to_vector(step.autoencoder.parameters())
        for step in (expected, scaled)
    )
    torch.testing.assert_close(scaled_weights, weights, rtol=0, atol=1e-5)
    assert scaler.get_scale() == 2.0 ** 10

    resumed = torch.amp.GradScaler("cpu", init_scale=2.0)
    for _ in run_training(6, tmp_path / "c", scaler=resumed):
        pass
    assert resumed.get_scale() == 2.0 ** 10

    overflowing = torch.amp.GradScaler("cpu", init_scale=2.0 ** 127)
    step = next(run_training(4, scaler=overflowing))
    assert overflowing.get_scale() == 2.0 ** 126
    torch.manual_seed(0)
    for weight, initial in zip(step.autoencoder.parameters(), make_autoencoder().parameters()):
        assert torch.equal(weight, initial)


def test_scale_and_shift_give_latents_mean_0_and_standard_deviation_1():
    torch.manual_seed(0)
    autoencoder = Autoencoder((32, 32), blocks=1)
    loader = make_loader(Dishes(64, 32), 16)
    scale, shift = measure_latent_scale(autoencoder, loader, 64)
    assert (autoencoder.scale, autoencoder.shift) == (scale, shift)
    with torch.no_grad():
        z = torch.cat([autoencoder.encode(x.float() / 127.5 - 1).sample() for x, _ in loader])
    z = (z - shift) * scale
    assert float(z.mean()) == pytest.approx(0, abs=0.02)
    assert float(z.std()) == pytest.approx(1, abs=0.02)
    with pytest.raises(ValueError, match="no batch"):
        measure_latent_scale(autoencoder, [])


def test_the_kl_divergence_is_in_nats_per_element_of_an_image():
    torch.manual_seed(0)
    autoencoder = make_autoencoder()
    images = torch.stack([image for image, _ in Dishes(4, 32)])
    with torch.no_grad():
        kl = autoencoder.encode(images.float() / 127.5 - 1).kl().mean() / (3 * 32 * 32)
    step = next(train_autoencoder(
        autoencoder, [(images, ["汤"] * 4)], steps=2, accelerator=full_precision()
    ))
    assert step.terms["kl"] == pytest.approx(float(kl), rel=1e-5)
