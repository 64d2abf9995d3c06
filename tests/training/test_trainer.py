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
from easy_diffusion.networks.text_encoder import CharacterEncoder
from easy_diffusion.networks.unet import UNet
from easy_diffusion.training import checkpoint
from easy_diffusion.training.checkpoint import load_checkpoint
from easy_diffusion.training.data_loader import make_loader
from easy_diffusion.training.distributed import fast_precision
from easy_diffusion.training.optimizers import has_plateaued
from easy_diffusion.training.trainer import train, update_quartile_losses

DIFFUSION = GaussianDiffusion(NoiseSchedule.cosine(100), prediction_type="v")


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
    return train(network, diffusion, make_loader(Bright(), 5), encoder, checkpoint=checkpoint,
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
                       timesteps=timesteps.logit_normal_time)
    denoise = flow.denoiser(step.network, *step.encoder(["红", "黑"]))
    *_, last = flow_matching.flow_heun(denoise, (2, 3, 8, 8), steps=10, generator=torch.Generator().manual_seed(0))
    assert_bright_and_dark(last.x)


def test_the_same_loop_trains_the_score_of_an_sde():
    *_, step = run(diffusion=VarianceExploding(5.0), steps=120, learning_rate=3e-3, caption_dropout=0.0, timesteps=uniform_time)
    assert step.smooth_loss < 0.5                                          # 1 for an answer of zero, E[z²]


def test_the_same_loop_trains_a_variance_at_timesteps_that_matter():
    diffusion = GaussianDiffusion(NoiseSchedule.cosine(10), "v", "learned_range", vlb_weight=1.0)
    timesteps = ImportanceTimesteps(10, history=4)
    steps = list(run(diffusion=diffusion, steps=60, timesteps=timesteps, caption_dropout=0.0))
    assert timesteps.counts.sum() == 60 * 5 and timesteps.counts.min() >= 4
    assert timesteps.counts.max() > 1.5 * timesteps.counts.min()             # no longer all alike
    answer, variance = steps[-1].network.conv_out.weight.chunk(2)
    assert answer.any() and variance.any()                                 # both began at zero


def test_the_loss_of_each_quarter_of_the_schedule_is_told_apart():
    before = (float("nan"), 1.0, 2.0, 3.0)
    t = torch.tensor([0, 24, 25, 99, 99])
    after = update_quartile_losses(before, torch.tensor([1.0, 3.0, 6.0, 53.0, 53.0]), t, 100)
    assert after == pytest.approx((2.0, 1.1, 2.0, 4.0))                     # a first value, a fiftieth of the way, none seen, again
    assert update_quartile_losses(before, torch.tensor([1.0, 53.0]), torch.tensor([0.1, 1.0]), 1000) == pytest.approx((1.0, 1.0, 2.0, 4.0))


def test_each_step_tells_where_it_is():
    steps = list(run())
    assert [s.index for s in steps] == list(range(12)) and steps[-1].progress == 1.0
    assert steps[0].learning_rate == pytest.approx(5e-4) and steps[1].learning_rate == pytest.approx(1e-3)
    assert 0 < steps[-1].learning_rate < steps[6].learning_rate == pytest.approx(1e-3)      # falling over the last 40%
    assert all(s.images_per_second > 0 and s.phase == "adamw" for s in steps)


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
    assert load_checkpoint(tmp_path / "c.safetensors")["index"] == 5
    resumed = list(run(tmp_path / "c.safetensors", muon_learning_rate=muon))
    assert [s.index for s in resumed] == list(range(5, 12))
    different = [name for name, p in step.network.state_dict().items() if not torch.equal(p, resumed[-1].network.state_dict()[name])]
    assert len(load_checkpoint(tmp_path / "c.safetensors")["losses"]) == 12
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
    assert not any(has_plateaued(losses(1e-4, seed), 400) for seed in range(50))           # 0.04: 5.7 standard errors
    assert sum(has_plateaued(losses(0, seed), 400) for seed in range(50)) > 35             # P(z < 1) = 0.84, 42 of 50 expected
    assert not has_plateaued(losses(0, 0), 401), "two whole windows are needed"
    assert not has_plateaued([0.5 - i / 100 for i in range(10)], 5) and has_plateaued([0.4, 0.5] * 10, 10)


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
    other = GaussianDiffusion(NoiseSchedule.cosine(100), prediction_type="x0")
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


class Ill(GaussianDiffusion):
    """At these steps the loss is what `of` makes of it; clock: the caller counts the steps."""

    def __init__(self, steps, of=lambda loss: loss * float("nan")):
        super().__init__(NoiseSchedule.cosine(100), prediction_type="v")
        self.steps, self.of, self.index = set(steps), of, 0

    def loss(self, *arguments):
        loss, self.index = super().loss(*arguments), self.index + 1
        return self.of(loss) if self.index - 1 in self.steps else loss


class Plain(torch.nn.Module):
    """Two convolutions, for runs whose network does not matter."""

    def __init__(self):
        super().__init__()
        self.conv_in, self.conv_out = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x_t, t, context=None, mask=None):
        return self.conv_out(torch.nn.functional.silu(self.conv_in(x_t)) * (1 + t / 100)[:, None, None, None])


def quick(checkpoint=None, diffusion=DIFFUSION, **options):
    torch.manual_seed(0)
    return train(Plain(), diffusion, make_loader(Bright(), 5), checkpoint=checkpoint, accelerator=Accelerator(mixed_precision="no"),
                 **{"steps": 12, "learning_rate": 1e-3, "warmup": 2} | options)


def begun():
    """The weights that run() begins with."""
    return parts()[0].parameters()


def finite(module):
    return all(torch.isfinite(parameter).all() for parameter in module.parameters())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_step_whose_loss_is_not_finite_is_skipped_and_counted(wrong):
    with pytest.warns(UserWarning, match="step 4 is skipped: the loss is "):
        steps = list(quick(diffusion=Ill({4}, lambda loss: loss * wrong)))
    assert [s.skipped for s in steps] == [0] * 4 + [1] * 8 and finite(steps[-1].network)
    assert [math.isfinite(s.loss) for s in steps] == [True] * 4 + [False] + [True] * 7
    assert all(math.isfinite(s.smooth_loss) for s in steps) and steps[4].note.startswith("step 4 is skipped")


def test_a_picture_that_is_not_finite_costs_one_step_and_changes_no_weight():
    class Latents(Bright):
        def __getitem__(self, i):
            return torch.full((3, 8, 8), float("nan") if i == 3 else 0.5), "红"
    network, encoder = parts()
    before = []
    with pytest.warns(UserWarning, match="is skipped"):
        for step in train(network, DIFFUSION, make_loader(Latents(), 4), encoder, steps=12, accelerator=Accelerator(mixed_precision="no")):
            state = [parameter.detach().clone() for parameter in network.parameters()]
            assert not before or math.isfinite(step.loss) or all(torch.equal(a, b) for a, b in zip(before, state))
            before = state
    assert step.skipped == 3 and finite(network) and finite(step.network)  # once an epoch of four steps


def test_a_gradient_that_is_not_finite_is_skipped_too():
    network, encoder = parts()
    seen = []

    def spoiled(gradient):
        seen.append(1)
        return gradient * float("inf") if len(seen) == 3 else gradient
    network.conv_in.weight.register_hook(spoiled)
    with pytest.warns(UserWarning, match="step 2 is skipped: the length of the gradient is (nan|inf)"):
        steps = list(train(network, DIFFUSION, make_loader(Bright(), 5), encoder, steps=6, accelerator=Accelerator(mixed_precision="no")))
    assert [s.skipped for s in steps] == [0, 0, 1, 1, 1, 1] and math.isfinite(steps[2].loss) and finite(network)


def test_a_scaler_of_half_precision_changes_nothing_but_skips_what_overflows(tmp_path):
    """As with fp16 on a GPU: the loss is scaled by 2^16, the gradient back again before it is clipped; an infinite one halves the scale."""
    def scaled(steps, spoiled=False, checkpoint=None):
        accelerator = Accelerator(mixed_precision="no")
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 16)
        network, encoder = parts()
        seen = []
        if spoiled:
            network.conv_in.weight.register_hook(lambda gradient: gradient * (seen.append(1) or (float("inf") if len(seen) == 3 else 1)))
        walk = train(network, DIFFUSION, make_loader(Bright(), 5), encoder, steps=steps, learning_rate=1e-3, warmup=2, decay=0,
                     checkpoint=checkpoint, accelerator=accelerator)
        return list(walk)[-1], network, accelerator.scaler
    plain = list(run(steps=6, decay=0))[-1]
    expected = torch.nn.utils.parameters_to_vector(plain.network.parameters())
    last, _, scaler = scaled(6)
    assert torch.allclose(expected, torch.nn.utils.parameters_to_vector(last.network.parameters()), atol=1e-5)
    assert last.skipped == 0 and scaler.get_scale() == 2.0 ** 16 and last.gradient_norm == pytest.approx(plain.gradient_norm, rel=1e-3)
    last, network, scaler = scaled(6, spoiled=True, checkpoint=tmp_path / "kept")
    assert last.skipped == 1 and finite(network) and scaler.get_scale() == 2.0 ** 15
    assert scaled(8, checkpoint=tmp_path / "kept")[2].get_scale() == 2.0 ** 15                              # it goes on with that


def test_a_spike_is_skipped():
    with pytest.warns(UserWarning, match="step 110 is skipped: the loss is .* after .* on average over 100 steps"):
        steps = list(quick(steps=115, diffusion=Ill({110}, lambda loss: 1000 * loss)))
    assert steps[-1].skipped == 1 and steps[110].loss > 100 and steps[-1].smooth_loss < 2


def test_ten_in_a_row_bring_back_the_average_of_a_while_ago_at_a_lower_rate():
    kept = {}
    with pytest.warns(UserWarning, match="the 5th in a row: back to the average of step 100, at 0.5 of the learning rate"):
        for step in quick(steps=140, decay=0, diffusion=Ill(range(120, 130))):
            if step.index in (100, 119, 129, 130):
                kept[step.index] = step.network.conv_in.weight.detach().clone(), step.learning_rate
    assert step.skipped == 10 and finite(step.network) and not torch.equal(kept[100][0], kept[119][0])
    assert torch.equal(kept[129][0], kept[100][0])                          # the second time as the first
    assert kept[119][1] == pytest.approx(1e-3) and kept[130][1] == pytest.approx(0.25e-3)


def test_a_run_that_cannot_be_saved_stops_with_the_reason_and_its_last_good_checkpoint(tmp_path):
    with pytest.warns(UserWarning, match="back to the average"), \
            pytest.raises(FloatingPointError, match=r"the loss is nan at step 45; 20 steps were skipped, 5 of them in a row, and 3 times .*"
                                                    r"last good checkpoint is .*c\.safetensors"):
        list(quick(tmp_path / "c.safetensors", steps=100, save_seconds=0, diffusion=Ill(range(30, 100))))
    saved = load_checkpoint(tmp_path / "c.safetensors")
    assert saved["index"] == len(saved["losses"]) == 30 and all(torch.isfinite(tensor).all() for tensor in saved["models"].values())
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0.*there is no checkpoint"):
        list(quick(steps=100, diffusion=Ill(range(100))))


@pytest.mark.parametrize("pieces", [2, 5])
def test_in_pieces_a_batch_teaches_the_same(pieces):
    """Five pictures as 3 and 2, and one by one; what is different is the order in which numbers are added. By SGD, since AdamW makes large
    steps of gradients that are nothing but such differences."""
    *_, whole = run(phase="sgd", sgd_learning_rate=1e-2)
    *_, divided = run(phase="sgd", sgd_learning_rate=1e-2, micro_batches=pieces)
    for a, b in zip(whole.network.parameters(), divided.network.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert max(float((a - b).abs().max()) for a, b in zip(whole.network.parameters(), begun())) > 1e-3
    assert whole.loss == pytest.approx(divided.loss, rel=1e-4)


def test_out_of_memory_is_met_once_by_pieces_half_as_large(tmp_path):
    class Small(UNet):
        most = 3

        def forward(self, x_t, t, context=None, mask=None):
            if len(x_t) > self.most:
                raise torch.OutOfMemoryError("out of memory")
            return super().forward(x_t, t, context, mask)

    def tight(checkpoint=None, most=3):
        torch.manual_seed(0)
        network, encoder = Small(channels=(32,), blocks=1, context_dim=32), CharacterEncoder("红黑", dim=32, layers=1)
        network.most = most
        return train(network, DIFFUSION, make_loader(Bright(), 5), encoder, steps=8, phase="sgd", sgd_learning_rate=1e-2, checkpoint=checkpoint,
                     save_seconds=0, accelerator=Accelerator(mixed_precision="no"))

    with pytest.warns(UserWarning, match="memory ran out at step 0.* in 2 micro_batches") as said:
        *_, step = tight()
    assert len(said) == 1
    *_, roomy = tight(most=5)
    for a, b in zip(roomy.network.parameters(), step.network.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    with pytest.warns(UserWarning, match="memory ran out"):
        for broken in tight(tmp_path / "c"):
            if broken.index == 4:
                break
    *_, resumed = tight(tmp_path / "c")                                     # it remembers, and has nothing to say
    assert all(torch.equal(a, b) for a, b in zip(step.network.parameters(), resumed.network.parameters()))
    with pytest.raises(torch.OutOfMemoryError, match="in 2 micro_batches, too"), pytest.warns(UserWarning):
        list(tight(most=1))


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_network_trains_alike_and_goes_on_from_its_checkpoint_even_uncompiled(tmp_path, monkeypatch):
    """Traced forwards and backwards, but without the C++ compiler that the default backend wants."""
    compiler, compiled = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(1) or compiler(network, backend="aot_eager"))
    *_, plain = run()
    *_, whole = run(compile=True)
    for broken in run(tmp_path / "c", compile=True, save_seconds=0):
        if broken.index == 6:
            break
    (tmp_path / "d").write_bytes((tmp_path / "c").read_bytes())
    *_, resumed = run(tmp_path / "c", compile=True)
    *_, uncompiled = run(tmp_path / "d")
    assert len(compiled) == 3
    for a, b, c, d in zip(*(step.network.parameters() for step in (whole, resumed, plain, uncompiled))):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=0, atol=1e-5)
        torch.testing.assert_close(a, d, rtol=0, atol=1e-5)


def test_chance_of_a_step_is_its_own_whatever_the_caller_draws():
    """The generators of the caller have no say in a run, nor a run in them; timesteps of numpy's and Python's go on, too."""
    def by_numpy(batch, steps, generator):
        return torch.from_numpy(np.random.randint(steps - 1, size=batch)) + random.randint(0, 1)
    def draws():
        return float(torch.rand(())), np.random.rand(), random.random()

    def seeded(seed):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)

    losses = []
    for seed in (1, 2):
        steps = quick()
        next(steps)
        seeded(seed)
        expected = draws()
        seeded(seed)
        next(steps)
        assert draws() == expected                                          # a step of the run lies between
        losses.append([step.loss for step in steps])
    assert losses[0] == losses[1]
    seen = []
    for seed in (1, 2):
        seeded(seed)
        seen.append([step.loss for step in quick(timesteps=by_numpy)])
    assert seen[0] == seen[1]


def test_it_can_begin_with_sgd_and_the_test_is_an_argument():
    assert {(s.phase, s.learning_rate) for s in quick(phase="sgd", sgd_learning_rate=1e-3)} == {("sgd", 1e-3)}
    steps = list(quick(steps=202, plateaued=lambda losses, window: len(losses) == 200 and window == 7, window=7))
    assert [s.phase for s in steps].index("sgd") == 200 and "SGD at 1e-06 takes over from AdamW" in steps[199].note


def test_the_best_and_those_before_stay(tmp_path):
    for step in quick(tmp_path / "c", steps=12, save_seconds=0, keep=3, window=2, diffusion=Ill(range(8, 12), lambda loss: 2.5 * loss)):
        pass
    assert {p.name for p in tmp_path.iterdir()} == {"c", "c.1", "c.2", "c.best"}
    assert [load_checkpoint(tmp_path / name)["index"] for name in ("c", "c.1", "c.2")] == [12, 12, 11]
    best = load_checkpoint(tmp_path / "c.best")
    means = [sum(step) / 2 for step in zip(best["losses"][:-1], best["losses"][1:])]
    assert best["index"] <= 8 and best["lowest_loss"] == pytest.approx(means[-1]) and means[-1] == min(means)
    run_on = list(quick(tmp_path / "c", steps=14, keep=1))
    assert [s.index for s in run_on] == [12, 13]


def test_a_checkpoint_cut_in_half_costs_the_steps_since_the_one_before_and_nothing_else(tmp_path):
    *_, whole = quick()
    for broken in quick(tmp_path / "c", save_seconds=0):
        if broken.index == 6:
            break
    content = (tmp_path / "c").read_bytes()
    (tmp_path / "c").write_bytes(content[:len(content) // 2])
    with pytest.warns(UserWarning, match="c is damaged.*goes on from the checkpoint before it, .*c.1"):
        resumed = list(quick(tmp_path / "c"))
    assert resumed[0].index == 6
    assert all(torch.equal(a, b) for a, b in zip(whole.network.parameters(), resumed[-1].network.parameters()))


def test_a_disk_that_fills_stops_no_training(tmp_path, monkeypatch):
    """The checkpoint of before stays, and when there is room again, it is written as ever."""
    saves, real = [], checkpoint.save_file

    def full(tensors, path, metadata):
        saves.append(1)
        if 3 <= len(saves) <= 5:
            path.write_bytes(b"half of i")
            raise OSError(28, "No space left on device")
        real(tensors, path, metadata)
    monkeypatch.setattr("easy_diffusion.training.checkpoint.save_file", full)
    found = []
    with pytest.warns(UserWarning, match="after step 2 could not be written, that of before stays.*: .*No space left"):
        for step in quick(tmp_path / "c", save_seconds=0):
            found.append(load_checkpoint(tmp_path / "c")["index"])
            assert {p.name for p in tmp_path.iterdir()} <= {"c", "c.1", "c.best"}
    assert found == [1, 2, 2, 2, 2, 6, 7, 8, 9, 10, 11, 12]
    saves[:] = [1, 1]
    with pytest.raises(OSError, match="No space left"):                     # where nothing was ever written it is told at once
        list(quick(tmp_path / "other", save_seconds=0))
    *_, whole = quick()
    assert all(torch.equal(a, b) for a, b in zip(whole.network.parameters(), step.network.parameters()))


@pytest.mark.filterwarnings("ignore")
def test_what_could_not_be_written_is_not_the_best(tmp_path, monkeypatch):
    """The loss of step 5 is a tenth of the others', but there is no room for it."""
    real = checkpoint.save_file

    def full(tensors, path, metadata):
        if index == 5:
            raise OSError(28, "No space left on device")
        real(tensors, path, metadata)
    monkeypatch.setattr("easy_diffusion.training.checkpoint.save_file", full)
    index = 0
    for step in quick(tmp_path / "c", save_seconds=0, window=1, diffusion=Ill([5], lambda loss: loss / 10)):
        index = step.index + 1
    saved, best = load_checkpoint(tmp_path / "c"), load_checkpoint(tmp_path / "c.best")
    assert saved["lowest_loss"] == best["lowest_loss"] == best["losses"][-1] > min(saved["losses"]) == saved["losses"][5]


def test_importance_goes_on_where_it_was(tmp_path):
    diffusion = GaussianDiffusion(NoiseSchedule.cosine(5), "v", "learned_range", vlb_weight=1.0)

    def weighed(checkpoint=None):
        return run(checkpoint, diffusion, steps=12, timesteps=ImportanceTimesteps(5, history=2), save_seconds=0)
    *_, whole = weighed()
    for step in weighed(tmp_path / "c"):
        if step.index == 8:
            break
    *_, resumed = weighed(tmp_path / "c")
    assert load_checkpoint(tmp_path / "c")["timesteps"]["counts"].sum() == 60
    assert all(torch.equal(a, b) for a, b in zip(whole.network.parameters(), resumed.network.parameters()))
