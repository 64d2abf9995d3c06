import functools
import math

import pytest
import torch
from diffusers import DDPMScheduler

from easy_diffusion.diffusion.gaussian import GaussianDiffusion, discretised_log_likelihood, gaussian_kl, min_snr_weight, velocity_weight
from easy_diffusion.diffusion.prediction import Prediction
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.diffusion.timesteps import ImportanceTimesteps, logit_normal_timesteps, uniform_timesteps

SCHEDULES = [NoiseSchedule.linear(1000), NoiseSchedule.cosine(1000)]


def pictures(seed, b=6):
    return torch.randn(b, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["linear", "cosine"])
def test_noising_and_the_velocity_equal_diffusers(schedule):
    scheduler, t = DDPMScheduler(num_train_timesteps=1000), torch.tensor([0, 1, 200, 500, 900, 999])
    scheduler.alphas_cumprod = schedule.alpha_bar
    x0, noise = pictures(0), pictures(1)
    torch.testing.assert_close(GaussianDiffusion(schedule).add_noise(x0, t, noise), scheduler.add_noise(x0, noise, t), rtol=0, atol=1e-12)
    v = GaussianDiffusion(schedule, "v").target(x0, t, noise)
    torch.testing.assert_close(v, scheduler.get_velocity(x0, noise, t), rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["linear", "cosine"])
@pytest.mark.parametrize("prediction_type", ["eps", "x0", "v"])
def test_the_right_answer_gives_back_picture_and_noise(schedule, prediction_type):
    diffusion, t = GaussianDiffusion(schedule, prediction_type), torch.tensor([0, 1, 200, 500, 900, 998])
    x0, noise = pictures(0), pictures(1)
    prediction = diffusion.to_prediction(diffusion.target(x0, t, noise), diffusion.add_noise(x0, t, noise), t)
    torch.testing.assert_close(prediction.x0, x0, rtol=0, atol=1e-9)       # 1e-16 of rounding over a signal of 1e-4 … 1
    torch.testing.assert_close(prediction.eps, noise, rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["linear", "cosine"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_variances_equal_diffusers(schedule, variance):
    scheduler = DDPMScheduler(num_train_timesteps=1000, variance_type=variance)
    scheduler.betas, scheduler.alphas_cumprod = schedule.betas, schedule.alpha_bar
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    diffusion, x, t = GaussianDiffusion(schedule, "v", variance), pictures(0), torch.tensor([1, 2, 200, 500, 900, 999])
    expected = torch.stack([scheduler._get_variance(i) for i in t])
    torch.testing.assert_close(diffusion.to_prediction(x, x, t).log_variance.exp().flatten(), expected, rtol=1e-9, atol=0)


def test_the_loss_of_each_picture_is_its_own_mean_squared_error():
    diffusion, x0, t = GaussianDiffusion(SCHEDULES[1], "x0"), pictures(0), torch.arange(6) * 150
    loss = diffusion.loss(lambda x, t, c, m: torch.zeros_like(x), x0, t)
    torch.testing.assert_close(loss, x0.float().square().mean(dim=(1, 2, 3)))


def test_the_best_answer_without_looking_has_the_loss_that_theory_gives():
    """For data N(0, I) E[v | x_t] = 0, so L_simple is the variance of v: signal² + noise² = 1."""
    diffusion, g = GaussianDiffusion(SCHEDULES[1], "v"), torch.Generator().manual_seed(0)
    x0 = torch.randn(4000, 3, 4, 4, generator=g)
    loss = diffusion.loss(lambda x, t, c, m: torch.zeros_like(x), x0, uniform_timesteps(4000, 1000, g), generator=g)
    assert loss.mean().item() == pytest.approx(1.0, abs=0.02)              # 192,000 numbers: standard error 0.0033


def test_the_velocity_weight_turns_an_error_of_x0_into_the_same_error_of_v():
    schedule, x0, t = SCHEDULES[1], pictures(0), torch.tensor([300, 400, 500, 600, 900, 998])
    def guess(x):
        return torch.tanh(x)
    def the_same_as_v(x, t, c, m):
        signal, noise = schedule.alpha_sigma(t, x)
        return (signal * x - guess(x)) / noise
    asked_x0 = GaussianDiffusion(schedule, "x0", loss_weight=lambda snr, prediction_type: velocity_weight(snr, prediction_type, most=1e9))
    losses = [diffusion.loss(network, x0, t, generator=torch.Generator().manual_seed(1)) for diffusion, network in (
        (asked_x0, lambda x, t, c, m: guess(x)), (GaussianDiffusion(schedule, "v"), the_same_as_v))]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)                 # the error is taken in float32
    assert velocity_weight(torch.tensor([0.0, 1.0, 100.0]), "x0").tolist() == [1.0, 2.0, 5.0]
    assert velocity_weight(torch.tensor([0.0, 1.0, 4.0]), "v").tolist() == [1.0, 1.0, 1.0]


def test_one_caption_serves_many_pictures():
    seen = {}
    def network(x, t, context, mask):
        seen.update(context=context.shape, mask=mask.shape)
        return x
    GaussianDiffusion(SCHEDULES[0]).denoiser(network, torch.zeros(1, 5, 16), torch.ones(1, 5, dtype=torch.bool))(
        torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64))
    assert seen == {"context": (4, 5, 16), "mask": (4, 5)}


def test_timesteps_lie_in_range_and_where_they_should():
    g = torch.Generator().manual_seed(0)
    uniform, middle = uniform_timesteps(100_000, 1000, g), logit_normal_timesteps(100_000, 1000, g)
    for t in (uniform, middle):
        assert t.dtype == torch.int64 and t.min() >= 0 and t.max() <= 999
    assert uniform.float().mean().item() == pytest.approx(499.5, abs=4)
    # P(1/4 < sigmoid(1.2 z) < 3/4) = P(|z| < ln 3 / 1.2) = 0.640
    assert ((middle >= 250) & (middle < 750)).float().mean().item() == pytest.approx(0.640, abs=0.006)


@pytest.mark.parametrize("wrong", [dict(prediction_type="epsilon"), dict(variance="learned")])
def test_unknown_meanings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"not '{list(wrong.values())[0]}'"):
        GaussianDiffusion(SCHEDULES[0], **wrong)


@pytest.mark.parametrize("prediction_type", ["eps", "x0", "v"])
def test_only_the_noise_that_is_really_in_x_t_has_no_loss(prediction_type):
    schedule, x0, t = SCHEDULES[1], pictures(0), torch.tensor([5, 100, 300, 600, 900, 998])
    diffusion = GaussianDiffusion(schedule, prediction_type)
    def knows_x0(x_t, t, context, mask):
        signal, noise = schedule.alpha_sigma(t, x_t)
        return diffusion.target(x0, t, (x_t - signal * x0) / noise)
    assert diffusion.loss(knows_x0, x0, t, generator=torch.Generator().manual_seed(3)).max() < 1e-12
    assert diffusion.loss(lambda *a: knows_x0(*a) + 0.5, x0, t).allclose(torch.tensor(0.25, dtype=torch.float32))


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weighs_every_prediction_as_the_same_error_of_x0(gamma):
    schedule, x0, t = SCHEDULES[1], pictures(0), torch.tensor([100, 300, 400, 500, 600, 900])
    def answer(prediction_type):
        def network(x_t, t, context, mask):
            guess = torch.tanh(x_t)
            signal, noise = schedule.alpha_sigma(t, x_t)
            return GaussianDiffusion(schedule, prediction_type).target(guess, t, (x_t - signal * guess) / noise)
        return network
    def loss(prediction_type, weight):
        diffusion = GaussianDiffusion(schedule, prediction_type, loss_weight=weight)
        return diffusion.loss(answer(prediction_type), x0, t, generator=torch.Generator().manual_seed(1))
    snr = (schedule.alpha_bar / (1 - schedule.alpha_bar))[t]
    expected = snr.clamp(max=gamma).float() * loss("x0", None)
    for prediction_type in ("eps", "x0", "v"):
        weight = functools.partial(min_snr_weight, gamma=gamma)
        torch.testing.assert_close(loss(prediction_type, weight), expected, rtol=1e-5, atol=0)


def test_min_snr_by_its_published_numbers():
    snr = torch.tensor([0.1, 1.0, 100.0], dtype=torch.float64)
    for prediction_type, expected in (("x0", [0.1, 1, 5]), ("eps", [1, 1, 0.05]), ("v", [0.1 / 1.1, 0.5, 5 / 101])):
        torch.testing.assert_close(min_snr_weight(snr, prediction_type), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


# ---------------------------------------------------------------- the bound

def test_kl_equals_torch():
    a, b = (torch.distributions.Normal(torch.tensor(m), torch.tensor(s)) for m, s in ((0.3, 0.7), (-0.1, 1.3)))
    ours = gaussian_kl(a.loc, 2 * a.scale.log(), b.loc, 2 * b.scale.log())
    torch.testing.assert_close(ours, torch.distributions.kl_divergence(a, b))


def test_the_grey_levels_share_all_of_the_probability():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, deviation in ((0.0, 0.5), (0.93, 0.1), (-1.4, 0.3), (0.2, 0.004)):
        log_p = discretised_log_likelihood(levels, torch.tensor(mean), torch.tensor(2 * math.log(deviation)).double())
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)
        density = torch.distributions.Normal(mean, deviation).log_prob(levels[100:110]) + math.log(2 / 255)
        if deviation == 0.5:
            torch.testing.assert_close(log_p[100:110], density, rtol=0, atol=1e-4)     # the density over a narrow bin


MEAN, DEVIATION = 0.1, 0.25


def of_a_gaussian(schedule):
    """The exact denoiser for numbers of N(MEAN, DEVIATION²), with the true variance of the step back:
    Var(x_{t-1} | x_t) = beta~ + c0² Var(x0 | x_t)."""
    diffusion = GaussianDiffusion(schedule)
    before = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alpha_bar[:-1]])
    beta_small = schedule.betas * (1 - before) / (1 - schedule.alpha_bar)
    of_x0 = DEVIATION ** 2 * schedule.sigma_t ** 2 / (schedule.alpha_t ** 2 * DEVIATION ** 2 + schedule.sigma_t ** 2)
    variance = beta_small + diffusion.x0_factor ** 2 * of_x0
    def denoise(x_t, t):
        signal, noise = schedule.alpha_sigma(t, x_t)
        x0 = MEAN + signal * DEVIATION ** 2 / (signal ** 2 * DEVIATION ** 2 + noise ** 2) * (x_t - signal * MEAN)
        return Prediction(x0, (x_t - signal * x0) / noise, variance[t].log().view(-1, 1, 1, 1))
    return denoise, variance


def grey_levels(count, seed=0):
    x = MEAN + DEVIATION * torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((x + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


@pytest.mark.parametrize("schedule", [*SCHEDULES, NoiseSchedule.cosine(50), NoiseSchedule.linear(100)],
                         ids=["linear", "cosine", "50 steps", "much left at the end"])
def test_bits_per_dim_of_the_best_model_is_the_entropy(schedule):
    """A Gaussian's, of grey levels: log2(sqrt(2πe) deviation 127.5) = 7.04. Where the steps back are the true ones the bound is tight,
    but for the prior: what is left of the picture at the end costs KL(q(x_{T-1}) || N(0, I)) more."""
    denoise, _ = of_a_gaussian(schedule)
    terms = list(GaussianDiffusion(schedule).bits_per_dim(denoise, grey_levels(2000), generator=torch.Generator().manual_seed(1)))
    assert [term.t for term in terms] == list(range(len(schedule), -1, -1)) and terms[0].bits.shape == (2000,)
    entropy = math.log2(math.sqrt(2 * math.pi * math.e) * DEVIATION * 127.5)
    signal, noise = float(schedule.alpha_t[-1]), float(schedule.sigma_t[-1])
    last = torch.distributions.Normal(signal * MEAN, math.sqrt(signal ** 2 * DEVIATION ** 2 + noise ** 2))
    prior = float(torch.distributions.kl_divergence(last, torch.distributions.Normal(0.0, 1.0))) / math.log(2)
    # 32,000 numbers: a standard error of 1 / (sqrt(2 · 32,000) ln 2) = 0.006
    assert float(sum(term.bits.mean() for term in terms)) == pytest.approx(entropy + prior, abs=0.02)
    if len(schedule) == 100:
        assert prior > 0.05


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_no_other_variance_has_a_better_bound(variance):
    schedule = NoiseSchedule.cosine(50)
    denoise, _ = of_a_gaussian(schedule)
    diffusion = GaussianDiffusion(schedule, "x0", variance)
    fixed = diffusion.denoiser(lambda x, t, c, m: denoise(x, t).x0)
    def bits(denoise):
        terms = diffusion.bits_per_dim(denoise, grey_levels(500), generator=torch.Generator().manual_seed(1))
        return float(sum(term.bits.mean() for term in terms))
    assert bits(fixed) > bits(denoise) + 0.02


def test_the_estimate_from_single_terms_has_the_mean_of_the_bound():
    schedule, x0 = NoiseSchedule.cosine(50), grey_levels(20_000)
    denoise, variance = of_a_gaussian(schedule)
    diffusion = GaussianDiffusion(schedule, "x0", "learned_range")
    fraction = (variance.log() - diffusion.log_small) / (diffusion.log_large - diffusion.log_small) * 2 - 1
    def network(x_t, t, context, mask):
        return torch.cat([denoise(x_t, t).x0, fraction[t].view(-1, 1, 1, 1).expand_as(x_t)], dim=1)
    g = torch.Generator().manual_seed(2)
    prior, *terms = diffusion.bits_per_dim(diffusion.denoiser(network), x0[:2000], generator=g)
    whole = float(sum(term.bits.mean() for term in terms))
    estimate = diffusion.vlb(network, x0, torch.randint(50, (20_000,), generator=g), generator=g)
    assert float(estimate.mean()) == pytest.approx(whole, abs=4 * float(estimate.std()) / 20_000 ** 0.5)
    assert float(prior.bits.mean()) < 0.01


def test_the_learned_variance_becomes_the_true_one():
    """One number for each timestep, trained by the hybrid loss beside the best mean, against Var(x_{t-1} | x_t)."""
    schedule = NoiseSchedule.cosine(20)
    denoise, true = of_a_gaussian(schedule)
    diffusion = GaussianDiffusion(schedule, "x0", "learned_range", vlb_weight=1.0)
    fraction = torch.zeros(20, dtype=torch.float64, requires_grad=True)
    def network(x_t, t, context, mask):
        return torch.cat([denoise(x_t, t).x0, fraction[t].view(-1, 1, 1, 1).expand_as(x_t)], dim=1)
    optimizer, g = torch.optim.Adam([fraction], lr=0.05), torch.Generator().manual_seed(0)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for step in range(300):
        x0 = MEAN + DEVIATION * torch.randn(400, 1, 4, 4, generator=g, dtype=torch.float64)
        optimizer.zero_grad()
        diffusion.loss(network, x0, torch.arange(400) % 20, generator=g).mean().backward()
        optimizer.step()
        rates.step()
    w = (fraction.detach() + 1) / 2
    learned = (w * diffusion.log_large + (1 - w) * diffusion.log_small).exp()
    # t = 0 is the decoder, whose best variance is that of a bin of grey levels, too
    torch.testing.assert_close(learned[1:], true[1:], rtol=0.05, atol=0)


def test_the_bound_moves_the_variance_and_never_the_mean():
    x0, t = pictures(0), torch.tensor([0, 1, 200, 500, 900, 999])
    def gradients(vlb_weight):
        output = torch.randn(6, 6, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64, requires_grad=True)
        diffusion = GaussianDiffusion(SCHEDULES[0], "eps", "learned_range", vlb_weight=vlb_weight)
        diffusion.loss(lambda *a: output, x0, t, generator=torch.Generator().manual_seed(5)).sum().backward()
        return output.grad.chunk(2, dim=1)
    (mean_alone, nothing), (mean, variance) = gradients(0.0), gradients(1000.0)
    assert torch.equal(mean, mean_alone) and not nothing.any() and variance.flatten(1).norm(dim=1).min() > 0


def test_the_hybrid_loss_adds_lambda_times_the_bound():
    x0, t = pictures(0), torch.tensor([0, 1, 200, 500, 900, 999])
    def network(x_t, t, context, mask):
        return torch.cat([torch.tanh(x_t), torch.sin(x_t)], dim=1)
    def value(what, weight):
        diffusion = GaussianDiffusion(SCHEDULES[1], "v", "learned_range", vlb_weight=weight)
        return getattr(diffusion, what)(network, x0, t, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(value("loss", 0.5), value("loss", 0.0) + 0.5 * value("vlb", 0.0), rtol=1e-6, atol=1e-6)


def test_importance_sampling_keeps_the_mean_and_lowers_the_variance():
    sizes = torch.cat([torch.full((5,), 40.0), torch.full((95,), 0.1)])        # a few terms are most of the sum, as in the bound
    sampler, g = ImportanceTimesteps(100, history=5), torch.Generator().manual_seed(0)
    def draw(batch):
        t = sampler(batch, 100, g)
        return sampler.reweight(t, sizes[t] * (1 + 0.1 * torch.randn(batch, generator=g)))
    uniform = draw(200)
    assert sampler.probabilities().unique().numel() == 1                       # nothing known yet
    while (sampler.counts < 5).any():
        draw(500)
    weighted = draw(20_000)
    assert float(weighted.mean()) == pytest.approx(float(sizes.mean()), abs=0.03) and weighted.std() < uniform.std() / 5
    torch.testing.assert_close(sampler.probabilities().sum(), torch.tensor(1.0, dtype=torch.float64))
    assert sampler.probabilities()[0] == pytest.approx(40 / sizes.sum().item(), rel=0.15)
    with pytest.raises(ValueError, match="not of 1000"):
        sampler(4, 1000, g)


def test_what_does_not_fit_is_named():
    x = pictures(0)
    for variance, network, says in (("learned_range", lambda x, *a: x, "6 output channels, not 3"),
                                    ("fixed_small", lambda x, *a: x[:, :1], "3 output channels, not 1")):
        with pytest.raises(ValueError, match=says):
            GaussianDiffusion(SCHEDULES[0], variance=variance).loss(network, x, torch.arange(6))
    for t in (torch.tensor([0.5] * 6), torch.tensor([-1] * 6), torch.tensor([1000] * 6)):
        with pytest.raises(ValueError, match="whole numbers from 0 to 999"):
            GaussianDiffusion(SCHEDULES[0]).loss(lambda x, *a: x, x, t)
    with pytest.raises(ValueError, match="pure noise"):
        GaussianDiffusion(NoiseSchedule.jsd(10), "eps")
    GaussianDiffusion(NoiseSchedule.jsd(10), "v")
    assert GaussianDiffusion(NoiseSchedule([0.5])).log_small.isfinite().all()
