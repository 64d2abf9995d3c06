import random
import time

import pytest
import torch
from accelerate import Accelerator

from easy_diffusion import flow_matching
from easy_diffusion.batches import batches
from easy_diffusion.checkpoint import load
from easy_diffusion.diffusion import GaussianDiffusion, ImportanceTimesteps
from easy_diffusion.samplers import ddim
from easy_diffusion.schedule import NoiseSchedule
from easy_diffusion.score_sde import VarianceExploding, uniform_time
from easy_diffusion.text import CharacterEncoder
from easy_diffusion.train import by_quartile, fast_precision, stopped_falling, train
from easy_diffusion.unet import UNet

DIFFUSION = GaussianDiffusion(NoiseSchedule.cosine(100), predicts="v")


class Bright(torch.utils.data.Dataset):
    """红 is a bright picture, 黑 a dark one."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        return torch.full((3, 8, 8), 220 if i % 2 else 40, dtype=torch.uint8), "红" if i % 2 else "黑"


def parts():
    torch.manual_seed(0)
    encoder = CharacterEncoder("红黑", dim=32, layers=1)
    return UNet(channels=(32,), blocks=1, context_dim=32), encoder


def run(checkpoint=None, diffusion=DIFFUSION, **options):
    network, encoder = parts()
    if getattr(diffusion, "variance", "") == "learned_range":
        network = UNet(channels=(32,), blocks=1, context_dim=32, out_channels=6)
    return train(network, diffusion, batches(Bright(), 5), encoder, checkpoint=checkpoint,
                 accelerator=Accelerator(mixed_precision="no"), **{"steps": 12, "learning_rate": 1e-3, "warmup": 2} | options)


def test_it_learns_what_the_words_mean():
    for step in run(steps=250, ema=0.9, learning_rate=3e-3, caption_dropout=0.0):
        pass
    assert step.smooth_loss < 0.2                                          # 1 for an answer of zero, E[v²]
    with torch.no_grad():
        denoise = DIFFUSION.denoiser(step.network, *step.encoder(["红", "黑"]))
    *_, last = ddim(denoise, DIFFUSION.schedule, (2, 3, 8, 8), steps=20, generator=torch.Generator().manual_seed(0))
    red, black = last.x0.mean(dim=(1, 2, 3)).tolist()
    assert red == pytest.approx(220 / 127.5 - 1, abs=0.2) and black == pytest.approx(40 / 127.5 - 1, abs=0.2)


def assert_bright_and_dark(pictures):
    red, black = pictures.mean(dim=(1, 2, 3)).tolist()
    assert red == pytest.approx(220 / 127.5 - 1, abs=0.25) and black == pytest.approx(40 / 127.5 - 1, abs=0.25)


@torch.no_grad()
def test_the_same_loop_trains_a_flow():
    flow = flow_matching.RectifiedFlow()
    with torch.enable_grad():
        *_, step = run(diffusion=flow, steps=250, ema=0.9, learning_rate=3e-3, caption_dropout=0.0,
                       timesteps=flow_matching.logit_normal_time)
    denoise = flow.denoiser(step.network, *step.encoder(["红", "黑"]))
    *_, last = flow_matching.heun(denoise, (2, 3, 8, 8), steps=10, generator=torch.Generator().manual_seed(0))
    assert_bright_and_dark(last.x)


def test_the_same_loop_trains_the_score_of_an_sde():
    *_, step = run(diffusion=VarianceExploding(5.0), steps=120, learning_rate=3e-3, caption_dropout=0.0, timesteps=uniform_time)
    assert step.smooth_loss < 0.5                                          # 1 for an answer of zero, E[z²]


def test_the_same_loop_trains_a_variance_at_timesteps_that_matter():
    diffusion = GaussianDiffusion(NoiseSchedule.cosine(10), "v", "learned_range", vlb_weight=1.0)
    timesteps = ImportanceTimesteps(10, history=4)
    steps = list(run(diffusion=diffusion, steps=60, timesteps=timesteps, caption_dropout=0.0))
    assert timesteps.drawn.sum() == 60 * 5 and timesteps.drawn.min() >= 4
    assert timesteps.drawn.max() > 1.5 * timesteps.drawn.min()             # no longer all alike
    answer, variance = steps[-1].network.conv_out.weight.chunk(2)
    assert answer.any() and variance.any()                                 # both began at zero


def test_the_loss_of_each_quarter_of_the_schedule_is_told_apart():
    before = (float("nan"), 1.0, 2.0, 3.0)
    t = torch.tensor([0, 24, 25, 99, 99])
    after = by_quartile(before, torch.tensor([1.0, 3.0, 6.0, 53.0, 53.0]), t, 100)
    assert after == pytest.approx((2.0, 1.1, 2.0, 4.0))                     # a first value, a fiftieth of the way, none seen, again
    assert by_quartile(before, torch.tensor([1.0, 53.0]), torch.tensor([0.1, 1.0]), 1000) == pytest.approx((1.0, 1.0, 2.0, 4.0))


def test_each_step_tells_where_it_is():
    steps = list(run())
    assert [s.index for s in steps] == list(range(12)) and steps[-1].progress == 1.0
    assert steps[0].learning_rate == pytest.approx(5e-4) and steps[1].learning_rate == pytest.approx(1e-3)
    assert 0 < steps[-1].learning_rate < steps[6].learning_rate == pytest.approx(1e-3)      # falling over the last 40%
    assert all(s.pictures_per_second > 0 and s.phase == "adamw" for s in steps)


def test_a_time_limit_ends_it():
    steps = list(run(steps=10 ** 9, minutes=1 / 60))
    assert 0.9 < steps[-1].seconds < 3 and steps[-1].progress == 1.0


def test_the_average_follows_the_weights():
    network, encoder = parts()
    first = network.conv_in.weight.detach().clone()
    loader = torch.utils.data.DataLoader(Bright(), 8)
    expected, trail = first.clone(), []
    for i, step in enumerate(train(network, DIFFUSION, loader, encoder, steps=20, ema=0.7, accelerator=Accelerator())):
        decay = min(0.7, (1 + i) / (10 + i))
        expected = decay * expected + (1 - decay) * network.conv_in.weight.detach()
        trail.append(torch.allclose(step.network.conv_in.weight, expected, atol=1e-6))
    assert all(trail) and not torch.allclose(expected, network.conv_in.weight, atol=1e-5)
    assert not step.network.training and step.network.conv_in.weight.grad is None


@pytest.mark.parametrize("muon", [None, 1e-3])
def test_a_broken_run_goes_on_and_ends_with_the_weights_of_an_unbroken_one(tmp_path, muon):
    """An epoch has three batches, so the run breaks off within its second; the order of the pictures goes on, too."""
    for step in run(muon_learning_rate=muon):
        pass
    for broken in run(tmp_path / "c.safetensors", save_seconds=0, muon_learning_rate=muon):
        if broken.index == 4:
            break
    assert load(tmp_path / "c.safetensors")["index"] == 5
    resumed = list(run(tmp_path / "c.safetensors", muon_learning_rate=muon))
    assert [s.index for s in resumed] == list(range(5, 12))
    different = [name for name, p in step.network.state_dict().items() if not torch.equal(p, resumed[-1].network.state_dict()[name])]
    assert len(load(tmp_path / "c.safetensors")["losses"]) == 12
    assert different == []
    assert list(run(tmp_path / "c.safetensors", muon_learning_rate=muon)) == []        # complete: nothing is left to do
    with pytest.raises(ValueError, match="with Muon" if muon else "without Muon"):
        list(run(tmp_path / "c.safetensors", muon_learning_rate=None if muon else 1e-3))


def test_a_checkpoint_of_another_network_is_refused_and_kept(tmp_path):
    list(run(tmp_path / "c.safetensors", steps=2))
    before = (tmp_path / "c.safetensors").read_bytes()
    other = UNet(channels=(64,), blocks=1, context_dim=32)
    with pytest.raises(ValueError, match="shape of network.conv_in.weight"):
        list(train(other, DIFFUSION, torch.utils.data.DataLoader(Bright(), 8), parts()[1], checkpoint=tmp_path / "c.safetensors"))
    assert (tmp_path / "c.safetensors").read_bytes() == before


def test_stopped_falling_tells_a_slope_from_a_plateau():
    def losses(slope, seed):
        noise = random.Random(seed)
        return [1 - slope * i + noise.gauss(0, 0.1) for i in range(800)]
    # The windows' means differ by 400 slopes, with a standard error of 0.1 sqrt(2 / 400) = 0.007.
    assert not any(stopped_falling(losses(1e-4, seed), 400) for seed in range(50))           # 0.04: 5.7 standard errors
    assert sum(stopped_falling(losses(0, seed), 400) for seed in range(50)) > 35             # P(z < 1) = 0.84, 42 of 50 expected
    assert not stopped_falling(losses(0, 0), 401), "two whole windows are needed"
    assert not stopped_falling([0.5 - i / 100 for i in range(10)], 5) and stopped_falling([0.4, 0.5] * 10, 10)


def test_sgd_settles_the_weights_when_the_loss_has_stopped_falling():
    phases = [(s.phase, s.learning_rate) for s in run(steps=420, window=60, learning_rate=3e-3, decay=0.0, sgd_learning_rate=1e-6)]
    change = [phase for phase, _ in phases].index("sgd")
    assert 100 <= change < 420 and all(phase == "sgd" for phase, _ in phases[change:])
    assert phases[-1] == ("sgd", 1e-6) and phases[change - 1] == ("adamw", 3e-3)


def test_a_loss_that_is_not_finite_stops_the_run_with_the_step(tmp_path):
    network, encoder = parts()
    with torch.no_grad():
        network.conv_out.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="nan at step 0"):
        list(train(network, DIFFUSION, torch.utils.data.DataLoader(Bright(), 8), encoder, steps=3, accelerator=Accelerator()))


@pytest.mark.parametrize("wrong", [dict(minutes=0), dict(minutes=-1), dict(steps=0)])
def test_no_time_and_no_steps_are_refused(wrong):
    with pytest.raises(ValueError, match=str(list(wrong.values())[0])):
        next(run(**wrong))


def test_a_checkpoint_that_predicts_something_else_is_refused(tmp_path):
    list(run(tmp_path / "c.safetensors", steps=2))
    network, encoder = parts()
    other = GaussianDiffusion(NoiseSchedule.cosine(100), predicts="x0")
    with pytest.raises(ValueError, match="to predict v, not x0"):
        next(train(network, other, torch.utils.data.DataLoader(Bright(), 8), encoder, checkpoint=tmp_path / "c.safetensors"))


def test_precision_is_one_that_accelerate_knows():
    assert fast_precision() in ("bf16", "no")


def test_an_empty_loader_is_named():
    network, encoder = parts()
    with pytest.raises(ValueError, match="no batch"):
        list(train(network, DIFFUSION, [], encoder, steps=3, accelerator=Accelerator()))


def test_what_the_caller_does_is_not_training_time():
    for step in run(steps=3):
        time.sleep(0.5)
    assert step.seconds < 1


def test_captions_are_dropped_at_the_rate_asked_for():
    seen = []
    class Encoder(CharacterEncoder):
        def forward(self, captions):
            seen.extend(captions)
            return super().forward(captions)
    network, _ = parts()
    loader = torch.utils.data.DataLoader(Bright(), 16)
    list(train(network, DIFFUSION, loader, Encoder("红黑", dim=32, layers=1), steps=60, caption_dropout=0.3, accelerator=Accelerator()))
    assert len(seen) == 960 and 0.24 < seen.count("") / 960 < 0.36         # standard error 0.015
