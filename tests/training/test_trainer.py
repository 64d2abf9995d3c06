import math
import random
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from easy_diffusion.diffusion import flow_matching, timesteps
from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.samplers import ddim
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.diffusion.score_sde import VarianceExploding
from easy_diffusion.diffusion.timesteps import ImportanceTimesteps, uniform_time
from easy_diffusion.networks import weights_io
from easy_diffusion.networks.text_encoder import CharacterEncoder
from easy_diffusion.networks.unet import UNet
from easy_diffusion.training.checkpoint import load_checkpoint
from easy_diffusion.training.data_loader import make_loader
from easy_diffusion.training.loss_history import update_quartile_losses
from easy_diffusion.training.trainer import train

DIFFUSION = GaussianDiffusion(NoiseSchedule.cosine(100), prediction_type="v")
BRIGHT = 220
DARK = 40


class BrightAndDark(torch.utils.data.Dataset):
    """16 images of one grey level each: 红 is bright, 黑 is dark."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        if i % 2:
            return torch.full((3, 8, 8), BRIGHT, dtype=torch.uint8), "红"
        return torch.full((3, 8, 8), DARK, dtype=torch.uint8), "黑"


def make_accelerator():
    return Accelerator(mixed_precision="no")


def make_models():
    torch.manual_seed(0)
    encoder = CharacterEncoder("红黑", dim=32, layers=1)
    return UNet(channels=(32,), blocks=1, context_dim=32), encoder


def train_unet(checkpoint=None, diffusion=DIFFUSION, **options):
    """12 steps of a small UNet with an encoder; an epoch has three batches of 5 images."""
    network, encoder = make_models()
    if getattr(diffusion, "variance", "") == "learned_range":
        network = UNet(channels=(32,), blocks=1, context_dim=32, out_channels=6)
    return train(
        network,
        diffusion,
        make_loader(BrightAndDark(), 5),
        encoder,
        checkpoint=checkpoint,
        accelerator=make_accelerator(),
        **{"steps": 12, "learning_rate": 1e-3, "warmup": 2} | options,
    )


class SmallNetwork(torch.nn.Module):
    """Two convolutions, for tests in which the network does not matter."""

    def __init__(self):
        super().__init__()
        self.conv_in = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.conv_out = torch.nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x_t, t, context=None, mask=None):
        h = torch.nn.functional.silu(self.conv_in(x_t))
        return self.conv_out(h * (1 + t / 100)[:, None, None, None])


def train_small(checkpoint=None, diffusion=DIFFUSION, **options):
    """12 steps of a SmallNetwork, without an encoder."""
    torch.manual_seed(0)
    return train(
        SmallNetwork(),
        diffusion,
        make_loader(BrightAndDark(), 5),
        checkpoint=checkpoint,
        accelerator=make_accelerator(),
        **{"steps": 12, "learning_rate": 1e-3, "warmup": 2} | options,
    )


class FaultyDiffusion(GaussianDiffusion):
    """Changes the loss at some steps, which it counts by itself."""

    def __init__(self, steps, change=lambda loss: loss * float("nan")):
        super().__init__(NoiseSchedule.cosine(100), prediction_type="v")
        self.steps = set(steps)
        self.change = change
        self.index = 0

    def loss(self, *arguments):
        loss = super().loss(*arguments)
        faulty = self.index in self.steps
        self.index += 1
        return self.change(loss) if faulty else loss


def is_finite(module):
    return all(torch.isfinite(parameter).all() for parameter in module.parameters())


def assert_equal_weights(module, other):
    for a, b in zip(module.parameters(), other.parameters()):
        assert torch.equal(a, b)


def assert_close_weights(module, other, atol):
    for a, b in zip(module.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def assert_bright_and_dark(images, tolerance):
    bright, dark = images.mean(dim=(1, 2, 3)).tolist()
    assert bright == pytest.approx(BRIGHT / 127.5 - 1, abs=tolerance)
    assert dark == pytest.approx(DARK / 127.5 - 1, abs=tolerance)


# ---------------------------------------------------------------- learning


def test_it_learns_what_the_captions_mean():
    options = dict(steps=250, ema=0.9, learning_rate=3e-3, caption_dropout=0.0)
    *_, step = train_unet(**options)
    assert step.smooth_loss < 0.2           # 1 for a network that predicts zero: E[v²]
    with torch.no_grad():
        denoise = DIFFUSION.denoiser(step.ema_network, *step.ema_encoder(["红", "黑"]))
    generator = torch.Generator().manual_seed(0)
    *_, last = ddim(denoise, DIFFUSION.schedule, (2, 3, 8, 8), steps=20, generator=generator)
    assert_bright_and_dark(last.x0, tolerance=0.2)


@torch.no_grad()
def test_the_same_loop_trains_a_flow():
    flow = flow_matching.RectifiedFlow()
    options = dict(steps=250, ema=0.9, learning_rate=3e-3, caption_dropout=0.0)
    with torch.enable_grad():
        *_, step = train_unet(
            diffusion=flow, timesteps=timesteps.logit_normal_time, **options
        )
    denoise = flow.denoiser(step.ema_network, *step.ema_encoder(["红", "黑"]))
    generator = torch.Generator().manual_seed(0)
    *_, last = flow_matching.flow_heun(denoise, (2, 3, 8, 8), steps=10, generator=generator)
    assert_bright_and_dark(last.x, tolerance=0.25)


def test_the_same_loop_trains_the_score_of_an_sde():
    options = dict(steps=120, learning_rate=3e-3, caption_dropout=0.0, timesteps=uniform_time)
    *_, step = train_unet(diffusion=VarianceExploding(5.0), **options)
    assert step.smooth_loss < 0.5           # 1 for a network that predicts zero: E[eps²]


def test_the_same_loop_trains_a_variance_with_importance_sampled_timesteps():
    diffusion = GaussianDiffusion(NoiseSchedule.cosine(10), "v", "learned_range", vlb_weight=1.0)
    timesteps = ImportanceTimesteps(10, history=4)
    options = dict(steps=60, timesteps=timesteps, caption_dropout=0.0)
    *_, step = train_unet(diffusion=diffusion, **options)
    assert timesteps.counts.sum() == 60 * 5
    assert timesteps.counts.min() >= 4
    assert timesteps.counts.max() > 1.5 * timesteps.counts.min()    # no longer uniform
    prediction, variance = step.ema_network.conv_out.weight.chunk(2)
    assert prediction.any()                 # both were zero at first
    assert variance.any()


def test_the_loss_of_each_quarter_of_the_schedule_is_smoothed_separately():
    smoothed = (float("nan"), 1.0, 2.0, 3.0)
    losses = torch.tensor([1.0, 3.0, 6.0, 53.0, 53.0])
    t = torch.tensor([0, 24, 25, 99, 99])
    # In turn: the first value; 1/50 of the way from 1 to 6; no new loss; from 3 to 53.
    assert update_quartile_losses(smoothed, losses, t, 100) == pytest.approx((2.0, 1.1, 2.0, 4.0))
    losses = torch.tensor([1.0, 53.0])
    t = torch.tensor([0.1, 1.0])            # continuous time
    assert update_quartile_losses(smoothed, losses, t, 1000) == pytest.approx((1.0, 1.0, 2.0, 4.0))


def test_the_ema_follows_the_weights():
    network, encoder = make_models()
    loader = torch.utils.data.DataLoader(BrightAndDark(), 8)
    expected = network.conv_in.weight.detach().clone()
    is_expected = []
    steps = train(
        network, DIFFUSION, loader, encoder, steps=20, ema=0.7, accelerator=Accelerator()
    )
    for i, step in enumerate(steps):
        decay = min(0.7, (1 + i) / (10 + i))
        expected = decay * expected + (1 - decay) * network.conv_in.weight.detach()
        is_expected.append(torch.allclose(step.ema_network.conv_in.weight, expected, atol=1e-6))
    assert all(is_expected)
    assert not torch.allclose(expected, network.conv_in.weight, atol=1e-5)
    assert not step.ema_network.training
    assert step.ema_network.conv_in.weight.grad is None


def test_captions_are_dropped_at_the_given_rate():
    encoded = []

    class RecordingEncoder(CharacterEncoder):
        def forward(self, captions):
            encoded.extend(captions)
            return super().forward(captions)

    network, _ = make_models()
    encoder = RecordingEncoder("红黑", dim=32, layers=1)
    loader = torch.utils.data.DataLoader(BrightAndDark(), 16)
    options = dict(steps=60, caption_dropout=0.3, accelerator=Accelerator())
    list(train(network, DIFFUSION, loader, encoder, **options))
    assert len(encoded) == 960
    assert 0.24 < encoded.count("") / 960 < 0.36        # standard error 0.015


# ---------------------------------------------------------------- the run: time, phases, arguments


def test_each_step_tells_its_index_learning_rate_and_progress():
    steps = list(train_unet())
    assert [step.index for step in steps] == list(range(12))
    assert steps[-1].progress == 1.0
    # Warm-up lasts 1.2 steps, a tenth of the run, which is shorter than the 2 steps asked for.
    assert steps[0].learning_rate == pytest.approx(1e-3 / 1.2)
    assert steps[1].learning_rate == pytest.approx(1e-3)
    assert steps[6].learning_rate == pytest.approx(1e-3)
    assert 0 < steps[-1].learning_rate < steps[6].learning_rate     # it falls in the last 40%
    assert all(step.images_per_second > 0 for step in steps)
    assert all(step.phase == "adamw" for step in steps)


def test_a_time_limit_ends_it():
    steps = list(train_unet(steps=10 ** 9, minutes=1 / 60))
    assert 0.9 < steps[-1].seconds < 3
    assert steps[-1].progress == 1.0


def test_without_a_limit_it_trains_until_the_caller_stops(tmp_path):
    for step in train_small(tmp_path / "c", steps=None, save_seconds=0, ema=0.5):
        assert step.progress == 0
        if step.index == 20:
            break
    assert step.learning_rate == pytest.approx(1e-3)        # it does not fall
    assert load_checkpoint(tmp_path / "c")["index"] == 21
    assert next(train_small(tmp_path / "c", steps=None)).index == 21


def test_a_short_run_reaches_the_peak_learning_rate():
    steps = list(train_small(steps=30, warmup=100, learning_rate=2e-3))
    assert max(step.learning_rate for step in steps) == pytest.approx(2e-3)
    assert steps[2].learning_rate == pytest.approx(2e-3)


def test_an_unknown_option_is_named():
    with pytest.raises(TypeError, match="no option 'step'; did you mean 'steps'"):
        next(train_small(step=3))


def test_the_callers_time_is_not_training_time():
    for step in train_unet(steps=3):
        time.sleep(0.5)
    assert step.seconds < 1


def test_sgd_takes_over_when_training_has_plateaued():
    options = dict(steps=420, window=60, learning_rate=3e-3, decay=0.0, sgd_learning_rate=1e-6)
    phases = [(step.phase, step.learning_rate) for step in train_unet(**options)]
    change = [phase for phase, _ in phases].index("sgd")
    assert 100 <= change < 420
    assert all(phase == "sgd" for phase, _ in phases[change:])
    assert phases[-1] == ("sgd", 1e-6)
    assert phases[change - 1] == ("adamw", 3e-3)


def test_it_can_start_with_sgd_and_the_plateau_test_is_an_argument():
    steps = train_small(phase="sgd", sgd_learning_rate=1e-3)
    assert {(step.phase, step.learning_rate) for step in steps} == {("sgd", 1e-3)}

    def plateaued(losses, window):
        return len(losses) == 200 and window == 7

    steps = list(train_small(steps=202, plateaued=plateaued, window=7))
    assert [step.phase for step in steps].index("sgd") == 200
    assert "training has plateaued after step 199" in steps[199].note
    assert "SGD at 1e-06 takes over from AdamW" in steps[199].note


@pytest.mark.parametrize("wrong", [dict(minutes=0), dict(minutes=-1), dict(steps=0)])
def test_no_time_and_no_steps_are_refused(wrong):
    with pytest.raises(ValueError, match=str(list(wrong.values())[0])):
        next(train_unet(**wrong))


def test_an_empty_loader_is_refused():
    network, encoder = make_models()
    with pytest.raises(ValueError, match="no batch"):
        list(train(network, DIFFUSION, [], encoder, steps=3, accelerator=Accelerator()))


def test_the_randomness_of_a_step_does_not_depend_on_the_callers_generators():
    """Neither does a run change them. This also holds for timesteps from numpy and Python."""

    def timesteps_of_other_generators(batch, steps, generator):
        t = torch.from_numpy(np.random.randint(steps - 1, size=batch))
        return t + random.randint(0, 1)

    def draw():
        return float(torch.rand(())), np.random.rand(), random.random()

    def seed_all(seed):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)

    losses = []
    for seed in (1, 2):
        steps = train_small()
        next(steps)
        seed_all(seed)
        expected = draw()
        seed_all(seed)
        next(steps)
        assert draw() == expected           # although a step of the run has taken place
        losses.append([step.loss for step in steps])
    assert losses[0] == losses[1]

    losses = []
    for seed in (1, 2):
        seed_all(seed)
        steps = train_small(timesteps=timesteps_of_other_generators)
        losses.append([step.loss for step in steps])
    assert losses[0] == losses[1]


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("muon", [None, 1e-3])
def test_a_broken_run_resumes_and_ends_with_the_weights_of_an_unbroken_one(tmp_path, muon):
    """The run breaks off within its second epoch; the order of the images continues, too."""
    path = tmp_path / "c.safetensors"
    *_, unbroken = train_unet(muon_learning_rate=muon)
    for broken in train_unet(path, save_seconds=0, muon_learning_rate=muon):
        if broken.index == 4:
            break
    assert load_checkpoint(path)["index"] == 5

    resumed = list(train_unet(path, muon_learning_rate=muon))
    assert [step.index for step in resumed] == list(range(5, 12))
    assert len(load_checkpoint(path)["losses"]) == 12
    weights = resumed[-1].ema_network.state_dict()
    different = [
        name for name, tensor in unbroken.ema_network.state_dict().items()
        if not torch.equal(tensor, weights[name])
    ]
    assert different == []

    assert list(train_unet(path, muon_learning_rate=muon)) == []    # the run is complete
    with pytest.raises(ValueError, match="with Muon" if muon else "without Muon"):
        list(train_unet(path, muon_learning_rate=None if muon else 1e-3))


def test_a_checkpoint_of_an_incompatible_network_is_refused_and_kept(tmp_path):
    path = tmp_path / "c.safetensors"
    list(train_unet(path, steps=2))
    content = path.read_bytes()
    wider = UNet(channels=(64,), blocks=1, context_dim=32)
    _, encoder = make_models()
    loader = torch.utils.data.DataLoader(BrightAndDark(), 8)
    with pytest.raises(ValueError, match=r"channels: \[32\] in the checkpoint, \(64,\) in the"):
        list(train(wider, DIFFUSION, loader, encoder, checkpoint=path))
    assert path.read_bytes() == content


def test_a_checkpoint_with_a_different_prediction_type_is_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    list(train_unet(path, steps=2))
    network, encoder = make_models()
    diffusion = GaussianDiffusion(NoiseSchedule.cosine(100), prediction_type="x0")
    loader = torch.utils.data.DataLoader(BrightAndDark(), 8)
    with pytest.raises(ValueError, match="to predict v, not x0"):
        next(train(network, diffusion, loader, encoder, checkpoint=path))


def test_importance_sampling_resumes_with_its_counts_and_losses(tmp_path):
    diffusion = GaussianDiffusion(NoiseSchedule.cosine(5), "v", "learned_range", vlb_weight=1.0)

    def train_weighted(checkpoint=None):
        timesteps = ImportanceTimesteps(5, history=2)
        return train_unet(checkpoint, diffusion, timesteps=timesteps, save_seconds=0)

    *_, unbroken = train_weighted()
    for step in train_weighted(tmp_path / "c"):
        if step.index == 8:
            break
    *_, resumed = train_weighted(tmp_path / "c")
    assert load_checkpoint(tmp_path / "c")["timesteps"]["counts"].sum() == 60
    assert_equal_weights(unbroken.ema_network, resumed.ema_network)


def test_the_best_and_the_previous_checkpoints_are_kept(tmp_path):
    diffusion = FaultyDiffusion(range(8, 12), lambda loss: 2.5 * loss)
    options = dict(steps=12, save_seconds=0, keep=3, window=2)
    for step in train_small(tmp_path / "c", diffusion=diffusion, **options):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"c", "c.1", "c.2", "c.best"}
    indices = [load_checkpoint(tmp_path / name)["index"] for name in ("c", "c.1", "c.2")]
    assert indices == [12, 12, 11]

    best = load_checkpoint(tmp_path / "c.best")
    means = [sum(pair) / 2 for pair in zip(best["losses"][:-1], best["losses"][1:])]
    assert best["index"] <= 8
    assert best["lowest_loss"] == pytest.approx(means[-1])
    assert means[-1] == min(means)

    resumed = list(train_small(tmp_path / "c", steps=14, keep=1))
    assert [step.index for step in resumed] == [12, 13]


def test_a_truncated_checkpoint_costs_only_the_steps_since_the_previous_one(tmp_path):
    *_, unbroken = train_small()
    for broken in train_small(tmp_path / "c", save_seconds=0):
        if broken.index == 6:
            break
    content = (tmp_path / "c").read_bytes()
    (tmp_path / "c").write_bytes(content[:len(content) // 2])
    with pytest.warns(UserWarning, match="c is damaged.*resumes from an earlier checkpoint, .*c.1"):
        resumed = list(train_small(tmp_path / "c"))
    assert resumed[0].index == 6
    assert_equal_weights(unbroken.ema_network, resumed[-1].ema_network)


def test_training_continues_while_the_disk_is_full(tmp_path, monkeypatch):
    """The previous checkpoint is kept; when there is space again, the next one is written."""
    attempts = []
    save_file = weights_io.save_file

    def save_to_full_disk(tensors, path, metadata):
        attempts.append(path)
        if 3 <= len(attempts) <= 5:
            path.write_bytes(b"half of i")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr("easy_diffusion.networks.weights_io.save_file", save_to_full_disk)
    indices = []
    message = "after step 2 could not be written; the previous one is kept.*: .*No space left"
    with pytest.warns(UserWarning, match=message):
        for step in train_small(tmp_path / "c", save_seconds=0):
            indices.append(load_checkpoint(tmp_path / "c")["index"])
            assert {path.name for path in tmp_path.iterdir()} <= {"c", "c.1", "c.best", "c.lock"}
    assert indices == [1, 2, 2, 2, 2, 6, 7, 8, 9, 10, 11, 12]

    attempts[:] = [None, None]              # the first attempt of the next run fails
    with pytest.raises(OSError, match="No space left"):
        list(train_small(tmp_path / "other", save_seconds=0))
    *_, unbroken = train_small()
    assert_equal_weights(unbroken.ema_network, step.ema_network)


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_that_could_not_be_written_is_not_the_best(tmp_path, monkeypatch):
    """The loss of step 5 is a tenth of the others', but the disk is full after that step."""
    save_file = weights_io.save_file
    index = 0

    def save_to_full_disk(tensors, path, metadata):
        if index == 5:
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr("easy_diffusion.networks.weights_io.save_file", save_to_full_disk)
    diffusion = FaultyDiffusion([5], lambda loss: loss / 10)
    for step in train_small(tmp_path / "c", save_seconds=0, window=1, diffusion=diffusion):
        index = step.index + 1
    saved = load_checkpoint(tmp_path / "c")
    best = load_checkpoint(tmp_path / "c.best")
    assert saved["lowest_loss"] == best["lowest_loss"] == best["losses"][-1]
    assert best["losses"][-1] > min(saved["losses"]) == saved["losses"][5]


# ---------------------------------------------------------------- training health


def test_a_loss_that_is_never_finite_stops_the_run_and_names_the_step(tmp_path):
    network, encoder = make_models()
    with torch.no_grad():
        network.conv_out.bias.fill_(float("nan"))
    loader = torch.utils.data.DataLoader(BrightAndDark(), 8)
    with pytest.raises(FloatingPointError, match="nan at step 0"):
        list(train(network, DIFFUSION, loader, encoder, steps=3, accelerator=Accelerator()))


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_step_whose_loss_is_not_finite_is_skipped_and_counted(factor):
    diffusion = FaultyDiffusion({4}, lambda loss: loss * factor)
    with pytest.warns(UserWarning, match="step 4 is skipped: the loss is "):
        steps = list(train_small(diffusion=diffusion))
    assert [step.skipped for step in steps] == [0] * 4 + [1] * 8
    assert is_finite(steps[-1].ema_network)
    assert [math.isfinite(step.loss) for step in steps] == [True] * 4 + [False] + [True] * 7
    assert all(math.isfinite(step.smooth_loss) for step in steps)
    assert steps[4].note.startswith("step 4 is skipped")


def test_an_image_that_is_not_finite_costs_one_step_and_changes_no_weight():
    class Latents(BrightAndDark):
        def __getitem__(self, i):
            return torch.full((3, 8, 8), float("nan") if i == 3 else -0.5), "红"

    network, encoder = make_models()
    loader = make_loader(Latents(), 4)
    previous = []
    with pytest.warns(UserWarning, match="is skipped"):
        steps = train(
            network, DIFFUSION, loader, encoder, steps=12, accelerator=make_accelerator()
        )
        for step in steps:
            weights = [parameter.detach().clone() for parameter in network.parameters()]
            if previous and not math.isfinite(step.loss):
                assert all(torch.equal(a, b) for a, b in zip(previous, weights))
            previous = weights
    assert step.skipped == 3                # once in each epoch of four steps
    assert is_finite(network)
    assert is_finite(step.ema_network)


def test_a_step_whose_gradient_is_not_finite_is_skipped():
    network, encoder = make_models()
    calls = []

    def spoil_third_gradient(gradient):
        calls.append(1)
        return gradient * float("inf") if len(calls) == 3 else gradient

    network.conv_in.weight.register_hook(spoil_third_gradient)
    loader = make_loader(BrightAndDark(), 5)
    with pytest.warns(UserWarning, match="step 2 is skipped: the gradient norm is (nan|inf)"):
        steps = list(train(
            network, DIFFUSION, loader, encoder, steps=6, accelerator=make_accelerator()
        ))
    assert [step.skipped for step in steps] == [0, 0, 1, 1, 1, 1]
    assert math.isfinite(steps[2].loss)
    assert is_finite(network)


def test_a_gradient_scaler_changes_nothing_but_skips_steps_that_overflow(tmp_path):
    """As with fp16 on a GPU: the loss is scaled by 2^16, and the gradient is scaled back before it
    is clipped. A gradient that is not finite halves the scale."""

    def train_scaled(steps, spoil=False, checkpoint=None):
        accelerator = make_accelerator()
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 16)
        network, encoder = make_models()
        calls = []

        def spoil_third_gradient(gradient):
            calls.append(1)
            return gradient * (float("inf") if len(calls) == 3 else 1)

        if spoil:
            network.conv_in.weight.register_hook(spoil_third_gradient)
        options = dict(steps=steps, learning_rate=1e-3, warmup=2, decay=0)
        *_, last = train(
            network,
            DIFFUSION,
            make_loader(BrightAndDark(), 5),
            encoder,
            checkpoint=checkpoint,
            accelerator=accelerator,
            **options,
        )
        return last, network, accelerator.scaler

    *_, unscaled = train_unet(steps=6, decay=0)
    expected = torch.nn.utils.parameters_to_vector(unscaled.ema_network.parameters())
    last, _, scaler = train_scaled(6)
    weights = torch.nn.utils.parameters_to_vector(last.ema_network.parameters())
    assert torch.allclose(expected, weights, atol=1e-5)
    assert last.skipped == 0
    assert scaler.get_scale() == 2.0 ** 16
    assert last.gradient_norm == pytest.approx(unscaled.gradient_norm, rel=1e-3)

    last, network, scaler = train_scaled(6, spoil=True, checkpoint=tmp_path / "c")
    assert last.skipped == 1
    assert is_finite(network)
    assert scaler.get_scale() == 2.0 ** 15
    _, _, scaler = train_scaled(8, checkpoint=tmp_path / "c")
    assert scaler.get_scale() == 2.0 ** 15  # from the checkpoint


def test_a_spike_is_skipped():
    diffusion = FaultyDiffusion({110}, lambda loss: 1000 * loss)
    message = "step 110 is skipped: the loss is .*, a spike: the mean of the last 100 losses is "
    with pytest.warns(UserWarning, match=message):
        steps = list(train_small(steps=115, diffusion=diffusion))
    assert steps[-1].skipped == 1
    assert steps[110].loss > 100
    assert steps[-1].smooth_loss < 2


def test_bad_steps_in_a_row_roll_back_to_earlier_ema_weights_and_halve_the_learning_rate():
    """Ten bad steps with a patience of five: two roll-backs."""
    weights = {}
    learning_rates = {}
    message = (
        "5 bad steps in a row: rolled back to the EMA weights of step 100; learning rate × 0.5"
    )
    with pytest.warns(UserWarning, match=message):
        for step in train_small(steps=140, decay=0, diffusion=FaultyDiffusion(range(120, 130))):
            if step.index in (100, 119, 129, 130):
                weights[step.index] = step.ema_network.conv_in.weight.detach().clone()
                learning_rates[step.index] = step.learning_rate
    assert step.skipped == 10
    assert is_finite(step.ema_network)
    assert not torch.equal(weights[100], weights[119])
    assert torch.equal(weights[129], weights[100])      # the second time, to the same weights
    assert learning_rates[119] == pytest.approx(1e-3)
    assert learning_rates[130] == pytest.approx(0.25e-3)


def test_a_run_that_stays_unhealthy_stops_with_the_reason_and_its_last_checkpoint(tmp_path):
    path = tmp_path / "c.safetensors"
    message = (
        r"the loss is nan at step 45; 20 steps were skipped, 5 of them in a row after 3 roll-backs"
        r".*last good checkpoint is .*c\.safetensors"
    )
    diffusion = FaultyDiffusion(range(30, 100))
    with pytest.warns(UserWarning, match="rolled back to the EMA weights"), \
            pytest.raises(FloatingPointError, match=message):
        list(train_small(path, steps=100, save_seconds=0, diffusion=diffusion))
    saved = load_checkpoint(path)
    assert saved["index"] == len(saved["losses"]) == 30
    assert all(torch.isfinite(tensor).all() for tensor in saved["models"].values())

    message = "the loss is nan at step 0.*there is no checkpoint"
    with pytest.raises(FloatingPointError, match=message):
        list(train_small(steps=100, diffusion=FaultyDiffusion(range(100))))


# ---------------------------------------------------------------- micro-batches, compiled networks


@pytest.mark.parametrize("micro_batches", [2, 5])
def test_micro_batches_give_the_gradient_of_the_whole_batch(micro_batches):
    """Five images as 3 + 2, and one by one: only the order of the additions differs.

    With SGD, because AdamW turns gradients that are pure rounding errors into large steps.
    """
    options = dict(phase="sgd", sgd_learning_rate=1e-2)
    initial, _ = make_models()
    *_, whole = train_unet(**options)
    *_, divided = train_unet(micro_batches=micro_batches, **options)
    assert_close_weights(whole.ema_network, divided.ema_network, atol=1e-6)
    changes = [
        float((a - b).abs().max().detach())
        for a, b in zip(whole.ema_network.parameters(), initial.parameters())
    ]
    assert max(changes) > 1e-3
    assert whole.loss == pytest.approx(divided.loss, rel=1e-4)


def test_out_of_memory_doubles_the_number_of_micro_batches_once(tmp_path):
    class LimitedUNet(UNet):
        max_batch = 3

        def forward(self, x_t, t, context=None, mask=None):
            if len(x_t) > self.max_batch:
                raise torch.OutOfMemoryError("out of memory")
            return super().forward(x_t, t, context, mask)

    def train_limited(checkpoint=None, max_batch=3):
        torch.manual_seed(0)
        network = LimitedUNet(channels=(32,), blocks=1, context_dim=32)
        network.max_batch = max_batch
        return train(
            network,
            DIFFUSION,
            make_loader(BrightAndDark(), 5),
            CharacterEncoder("红黑", dim=32, layers=1),
            steps=8,
            phase="sgd",
            sgd_learning_rate=1e-2,
            checkpoint=checkpoint,
            save_seconds=0,
            accelerator=make_accelerator(),
        )

    message = "out of memory at step 0; .* 5 images is split into 2 micro-batches"
    with pytest.warns(UserWarning, match=message) as warned:
        *_, step = train_limited()
    assert len(warned) == 1
    *_, unlimited = train_limited(max_batch=5)
    assert_close_weights(unlimited.ema_network, step.ema_network, atol=1e-6)

    with pytest.warns(UserWarning, match="out of memory"):
        for broken in train_limited(tmp_path / "c"):
            if broken.index == 4:
                break
    *_, resumed = train_limited(tmp_path / "c")         # it resumes with 2, without a warning
    assert_equal_weights(step.ema_network, resumed.ema_network)

    with pytest.raises(torch.OutOfMemoryError, match="with 2 micro-batches, too"), \
            pytest.warns(UserWarning):
        list(train_limited(max_batch=1))


def test_a_step_with_several_notes_joins_them_and_begins_with_that_on_the_memory():
    class Full(FaultyDiffusion):
        def loss(self, network, x0, *arguments):
            if len(x0) > 3:
                raise torch.OutOfMemoryError("out of memory")
            return super().loss(network, x0, *arguments)

    with pytest.warns(UserWarning):
        step = next(iter(train_small(diffusion=Full({0}), patience=100)))
    memory, split, health = step.note.split("; ")
    assert (memory, health) == ("out of memory at step 0", "step 0 is skipped: the loss is nan")
    assert split.startswith("from now on each batch of ")


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_network_trains_alike_and_resumes_even_uncompiled(tmp_path, monkeypatch):
    """Forward and backward are traced, without the C++ compiler that the default backend needs."""
    torch_compile = torch.compile
    compiled = []

    def compile_with_aot_eager(network):
        compiled.append(network)
        return torch_compile(network, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile_with_aot_eager)
    *_, plain = train_unet()
    *_, unbroken = train_unet(compile=True)
    for broken in train_unet(tmp_path / "c", compile=True, save_seconds=0):
        if broken.index == 6:
            break
    (tmp_path / "d").write_bytes((tmp_path / "c").read_bytes())
    *_, resumed = train_unet(tmp_path / "c", compile=True)
    *_, uncompiled = train_unet(tmp_path / "d")
    assert len(compiled) == 3
    assert_equal_weights(unbroken.ema_network, resumed.ema_network)
    assert_close_weights(unbroken.ema_network, plain.ema_network, atol=1e-5)
    assert_close_weights(unbroken.ema_network, uncompiled.ema_network, atol=1e-5)
