"""Guided denoisers of trained networks: the same prediction as the bare network, by fewer calls."""

import contextlib

import numpy as np
import pytest
import torch

from easy_diffusion.diffusion.flow_matching import RectifiedFlow
from easy_diffusion.diffusion.guidance import guided
from easy_diffusion.generate import (
    generate_images,
    guided_denoiser,
    load_x0,
    make_model_inpainter,
)
from easy_diffusion.presets import build_networks
from easy_diffusion.pretrained import load_model

NAMES = ["番茄炒鸡蛋", "土豆汤"]


class LabelEncoder(torch.nn.Module):
    """Class labels 0 … 2 as contexts of one token; 3 is the unconditional label."""

    uncond = 3

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(4, 128)

    def forward(self, labels):
        context = self.embedding(torch.tensor(labels))[:, None]  # [B, 1, 128]
        return context, torch.ones(len(labels), 1, dtype=torch.bool)


@pytest.fixture
def models():
    """The demo's network with random weights in every layer, its encoder, its diffusion."""
    torch.manual_seed(0)
    network, encoder, diffusion = build_networks("".join(NAMES))
    for parameter in network.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    return network.eval(), encoder.eval(), diffusion


@pytest.mark.parametrize("labels", [True, False])
def test_the_guided_denoiser_equals_guidance_with_the_bare_network(models, labels):
    network, encoder, diffusion = models
    encoder = LabelEncoder() if labels else encoder
    captions = [0, 2] if labels else NAMES
    generator = torch.Generator().manual_seed(0)
    x_t, t = torch.randn(2, 3, 32, 32, generator=generator), torch.tensor([500, 500])
    denoise = guided_denoiser(network, encoder, diffusion, captions, guidance=3.0, clip=False)
    cond = diffusion.denoiser(network, *encoder(captions))
    uncond = diffusion.denoiser(network, *encoder([3] if labels else [""]))
    with torch.no_grad():
        expected = guided(cond, uncond, 3.0)(x_t, t)
        prediction = denoise(x_t, t)
    # `denoise` computes in bfloat16 where the hardware supports it.
    error = (prediction.x0 - expected.x0).norm() / expected.x0.norm()
    assert error < 0.03


def test_a_step_evaluates_the_first_layers_once_for_both_captions(models):
    network, encoder, diffusion = models
    batch_sizes = []
    network.conv_in.register_forward_hook(lambda _, x, __: batch_sizes.append(len(x[0])))
    generate_images(network, encoder, diffusion, NAMES, size=32, steps=3)
    assert batch_sizes == [2, 2, 2]


def test_an_image_is_generated_for_each_name_by_a_diffusion_and_by_a_flow(models):
    network, encoder, diffusion = models
    for process in (diffusion, RectifiedFlow()):
        images = generate_images(network, encoder, process, NAMES, size=32, steps=2)
        assert images.shape == (2, 32, 32, 3)
        assert images.dtype == "uint8"


def test_each_image_depends_on_its_seed_and_name_alone(random_weights, hide_gpu, monkeypatch):
    """In float32, to one grey level; a larger batch may be computed in another order."""
    monkeypatch.setattr("easy_diffusion.generate.autocast", lambda _: contextlib.nullcontext())
    model = load_model(random_weights, 32)
    options = dict(size=32, steps=3, autoencoder=model.autoencoder)
    arguments = model.network, model.encoder, model.diffusion
    both = generate_images(*arguments, ["番茄汤", "清炒土豆"], seed=[0, 5], **options)
    alone = generate_images(*arguments, ["清炒土豆"], seed=5, **options)
    assert abs(both[1].astype(int) - alone[0].astype(int)).max() <= 1
    other = generate_images(*arguments, ["清炒土豆"], seed=6, **options)
    assert abs(both[1].astype(int) - other[0].astype(int)).mean() > 8
    consecutive = generate_images(*arguments, ["番茄汤", "清炒土豆"], seed=4, **options)
    assert abs(consecutive[1].astype(int) - alone[0].astype(int)).max() <= 1
    with pytest.raises(ValueError, match="2 seeds do not fit 1 names"):
        generate_images(*arguments, ["番茄汤"], seed=[0, 5], **options)


def test_images_need_not_be_square(random_weights):
    model = load_model(random_weights, 32)
    images = generate_images(
        model.network, model.encoder, model.diffusion, ["番茄汤"], size=(32, 48), steps=2
    )
    assert images.shape == (1, 32, 48, 3)


@pytest.mark.parametrize("size, clip", [(32, True), (64, False)])
def test_guidance_is_passed_on_and_latents_are_not_clipped(random_weights, monkeypatch, size, clip):
    model = load_model(random_weights, size)
    received = []

    def record(network, encoder, diffusion, names, guidance, clip=True):
        received.append((names, guidance, clip))
        return guided_denoiser(network, encoder, diffusion, names, guidance, clip)

    monkeypatch.setattr("easy_diffusion.generate.guided_denoiser", record)
    generate_images(
        model.network, model.encoder, model.diffusion, ["番茄汤"], size, steps=1, guidance=3.5,
        autoencoder=model.autoencoder,
    )
    make_model_inpainter(*model, "清炒土豆", steps=4, guidance=1.5)
    assert received == [(["番茄汤"], 3.5, clip), (["清炒土豆"], 1.5, clip)]


@pytest.mark.parametrize("size", [32, 64])
def test_what_is_inpainted_depends_on_the_seed_alone(random_weights, monkeypatch, size):
    monkeypatch.setattr("easy_diffusion.generate.REPAINT", dict(jump=1, resamples=1))
    model = load_model(random_weights, size)
    image = np.full((size, size, 3), 128, np.uint8)
    mask = np.zeros((size, size), bool)
    mask[:, size // 2:] = True

    def inpaint(seed):
        return make_model_inpainter(*model, "", steps=2, guidance=1.0, seed=seed)(image, mask)

    assert np.array_equal(inpaint(3), inpaint(3))
    assert not np.array_equal(inpaint(3), inpaint(4))


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "damaged.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="damaged.png cannot be read"):
        load_x0(tmp_path / "damaged.png", 32, None)
    with pytest.raises(FileNotFoundError):
        load_x0(tmp_path / "missing.png", 32, None)
