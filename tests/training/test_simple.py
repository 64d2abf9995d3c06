"""The bare loop and the robust one take the same steps; what a batch may carry."""

from functools import partial

import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import interpolate

from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.samplers import ddim
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.networks.text_encoder import CharacterEncoder
from easy_diffusion.networks.unet import UNet
from easy_diffusion.training.data_loader import make_loader, unpack_batch
from easy_diffusion.training.optimizers import build_optimizers
from easy_diffusion.training.simple import train_simple
from easy_diffusion.training.trainer import train

DIFFUSION = GaussianDiffusion(NoiseSchedule.cosine(100), prediction_type="v")
LOOPS = ["train", "train_simple"]


class Shapes(torch.utils.data.Dataset):
    """16 random images; the caption is 红 or 黑, and the items may have labels or extras."""

    def __init__(self, labels=False, extras=()):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8, generator=generator)
        self.labels = labels
        self.extras = extras

    def __len__(self):
        return 16

    def __getitem__(self, i):
        image = self.images[i]
        caption = i % 4 if self.labels else "红黑"[i % 2]
        extras = {
            "control": image.float().mean(dim=0, keepdim=True) / 127.5 - 1,     # its grey levels
            "low_resolution": image[:, ::2, ::2],
        }
        chosen = {name: extras[name] for name in self.extras}
        return (image, caption, chosen) if chosen else (image, caption)


def full_precision():
    return Accelerator(mixed_precision="no")


def run(loop, network, loader, encoder, steps, learning_rate=1e-3, **options):
    """The same training by either loop: AdamW, a constant learning rate, idle safety features."""
    if loop == "train":
        return train(
            network, DIFFUSION, loader, encoder, steps=steps, learning_rate=learning_rate,
            warmup=0, decay=0, accelerator=full_precision(), **options,
        )
    models = torch.nn.ModuleList([network, encoder])
    (adamw, _), = build_optimizers(list(models.parameters()), learning_rate)
    return train_simple(network, DIFFUSION, loader, encoder, adamw, steps, **options)


def flat(module):
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach()


# ---------------------------------------------------------------- the two loops


def test_both_loops_end_with_the_same_weights():
    results = []
    for loop in LOOPS:
        torch.manual_seed(0)
        encoder = CharacterEncoder("红黑", dim=32, layers=1)
        network = UNet(channels=(32,), blocks=1, context_dim=32)
        initial = flat(network)
        steps = list(run(
            loop, network, make_loader(Shapes(), 5), encoder, 20,
            caption_dropout=0.3, ema=0.9, clip=0.5, seed=3,
        ))
        assert (flat(network) - initial).abs().max() > 1e-3
        ema_weights = flat(steps[-1].ema_network), flat(steps[-1].ema_encoder)
        losses = torch.tensor([step.loss for step in steps])
        results.append([flat(network), flat(encoder), *ema_weights, losses])
    for robust, simple in zip(*results):
        torch.testing.assert_close(robust, simple, rtol=0, atol=1e-6)


def test_the_bare_loop_trains_without_an_encoder_and_yields_each_step():
    network = UNet(channels=(32,), blocks=1, context_dim=None)
    steps = list(run("train_simple", network, make_loader(Shapes(), 8), None, 30, 3e-3))
    assert [step.index for step in steps] == list(range(30))
    assert sum(step.loss for step in steps[-5:]) < sum(step.loss for step in steps[:5])
    assert steps[-1].ema_encoder is None
    assert not steps[-1].ema_network.training
    assert not any(weight.requires_grad for weight in steps[-1].ema_network.parameters())


# ---------------------------------------------------------------- labels as captions


class LabelEncoder(torch.nn.Module):
    """Labels 0 … 3 and the unconditional label 4 → one token embedding each."""

    uncond = 4

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(5, 32)
        self.seen = []

    def forward(self, labels):
        self.seen += labels
        context = self.table(torch.tensor(labels))[:, None]                     # [B, 1, D]
        return context, torch.ones(len(labels), 1, dtype=torch.bool)


@pytest.mark.parametrize("loop", LOOPS)
def test_captions_may_be_labels_and_dropped_ones_become_the_encoders_uncond(loop):
    encoder = LabelEncoder()
    network = UNet(channels=(32,), blocks=1, context_dim=32)
    before = encoder.table.weight.detach().clone()
    loader = make_loader(Shapes(labels=True), 8)
    assert isinstance(next(iter(loader))[1], torch.Tensor)
    *_, step = run(loop, network, loader, encoder, 20, caption_dropout=0.25)
    assert set(encoder.seen) == {0, 1, 2, 3, 4}
    assert 0.15 < encoder.seen.count(4) / 160 < 0.35            # standard error 0.034
    changes = (step.ema_encoder.table.weight - before).abs().amax(dim=1)
    assert bool((changes > 0).all())


# ---------------------------------------------------------------- more tensors by name


class ControlledNetwork(torch.nn.Module):
    """Predicts from x_t and a control image [B, 1, H, W], concatenated along the channels."""

    def __init__(self):
        super().__init__()
        self.conv_in = torch.nn.Conv2d(4, 32, 3, padding=1)
        self.conv_out = torch.nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x_t, t, context, mask, control):
        h = self.conv_in(torch.cat([x_t, control], dim=1))
        return self.conv_out(torch.nn.functional.silu(h))


class UpsamplingNetwork(torch.nn.Module):
    """Predicts from x_t and a low-resolution image [B, 3, H/2, W/2], which it records."""

    def __init__(self):
        super().__init__()
        self.conv_in = torch.nn.Conv2d(6, 32, 3, padding=1)
        self.conv_out = torch.nn.Conv2d(32, 3, 3, padding=1)
        self.seen = []

    def forward(self, x_t, t, context, mask, low_resolution):
        self.seen.append(low_resolution)
        enlarged = interpolate(low_resolution, scale_factor=2, mode="nearest")
        h = self.conv_in(torch.cat([x_t, enlarged], dim=1))
        return self.conv_out(torch.nn.functional.silu(h))


@pytest.mark.parametrize("loop", LOOPS)
def test_a_control_image_reaches_the_network_in_training_and_in_sampling(loop):
    torch.manual_seed(0)
    data = Shapes(extras=["control"])
    loader = make_loader(data, 8)
    *_, step = run(loop, ControlledNetwork(), loader, None, 60, 1e-2, ema=0.8)
    controls = torch.stack([data[i][2]["control"] for i in range(4)])           # [4, 1, 8, 8]
    noise = torch.Generator().manual_seed(0)
    errors = {}
    for name, control in (("right", controls), ("wrong", controls.roll(1, dims=0))):
        denoise = DIFFUSION.denoiser(partial(step.ema_network, control=control))
        with torch.no_grad():
            *_, last = ddim(denoise, DIFFUSION.schedule, (4, 3, 8, 8), 10, generator=noise)
        grey = last.x.mean(dim=1, keepdim=True)
        errors[name] = float((grey - controls).abs().mean())
    assert errors["right"] < 0.6 * errors["wrong"]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_low_resolution_image_reaches_the_network_by_its_name_as_pixels_in_minus_1_to_1(loop):
    torch.manual_seed(0)
    network = UpsamplingNetwork()
    data = Shapes(extras=["low_resolution"])
    next(iter(run(loop, network, make_loader(data, 16), None, 1)))
    seen, = network.seen
    assert seen.shape == (16, 3, 4, 4)
    expected = torch.stack([image[:, ::2, ::2] for image in data.images]).float() / 127.5 - 1
    assert sorted(seen.flatten().tolist()) == sorted(expected.flatten().tolist())


def test_micro_batches_divide_the_extras_like_the_images():
    weights = []
    for micro_batches in (1, 3):
        torch.manual_seed(0)
        network = ControlledNetwork()
        loader = make_loader(Shapes(extras=["control"]), 8)
        options = dict(phase="sgd", sgd_learning_rate=1e-2, micro_batches=micro_batches)
        for _ in run("train", network, loader, None, 10, **options):
            pass
        weights.append(flat(network))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- batches of another form

IMAGES = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    "batch, came",
    [
        (IMAGES, r"a tensor \[4, 3, 8, 8\]"),
        ([IMAGES], r"\(a tensor \[4, 3, 8, 8\]\)"),
        ((IMAGES, ["红"] * 4, {}, 0), r"\(a tensor \[4, 3, 8, 8\], a list of 4, .*, a int\)"),
        ((IMAGES, ["红"] * 3), "a list of 3"),
        ((IMAGES, "红黑红黑"), "a str"),
        ((IMAGES, ["红"] * 4, IMAGES), r"a tensor .*, a list of 4, a tensor"),
        ((IMAGES, ["红"] * 4, {"control": IMAGES[:2]}), r"'control': a tensor \[2, 3, 8, 8\]"),
        ({"image": IMAGES}, r"\{'image': a tensor \[4, 3, 8, 8\]\}"),
    ],
)
def test_a_batch_of_another_form_is_refused_with_what_came(loop, batch, came):
    network = UNet(channels=(32,), blocks=1, context_dim=None)
    message = rf"a batch must be \(images \[B, C, H, W\], B captions\).*the loader gave .*{came}"
    with pytest.raises(ValueError, match=message):
        next(iter(run(loop, network, [batch], None, 1)))


def test_a_batch_is_unpacked_into_images_a_list_of_captions_and_extras():
    assert unpack_batch((IMAGES, ("红", "黑", "红", "黑"))).captions == ["红", "黑", "红", "黑"]
    images, captions, extras = unpack_batch([IMAGES, torch.arange(4), {"mask": IMAGES[:, :1]}])
    assert captions == [0, 1, 2, 3]
    assert extras["mask"].shape == (4, 1, 8, 8)
