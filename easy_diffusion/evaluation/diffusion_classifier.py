"""Classification with a diffusion model: which caption explains an image best?

A text-to-image model knows p(x0 | c), and Bayes' rule turns this into p(c | x0) ∝ p(x0 | c) p(c).
The variational bound on -log p(x0 | c) is an integral over the logarithm of the signal-to-noise
ratio, λ = log(alpha_t² / sigma_t²). Its only part that depends on the caption c is the error of the
predicted noise:

    -log p(x0 | c) ≤ ½ ∫ E_eps |eps - eps_hat(x_t, t, c)|² dλ + constant
    score(c) = ½ (λ_max - λ_min) mean_i w(λ_i) |eps_i - eps_hat(x_t, t_i, c)|²       in nats

(Kingma et al., "Variational Diffusion Models", 2021, eq. 17; Kingma & Gao, "Understanding Diffusion
Objectives as the ELBO with Simple Data Augmentation", 2023.) With w = 1 and the optimal denoiser,
softmax(-score) is Bayes' rule for equally likely captions. The caption with the lowest score wins
(Li et al., "Your Diffusion Model is Secretly a Zero-Shot Classifier", 2023; Clark & Jaini,
"Text-to-Image Diffusion Models are Zero-Shot Classifiers", 2023).

The score of each of K captions needs many network evaluations. Three things reduce their number:

    the same (t, eps) for all captions    their scores differ much less than they vary with (t, eps)
    λ quasi-random, each eps also as -eps the mean converges faster than with independent draws
    successive halving                    after a few evaluations only the best captions go on

The bound integrates over all λ. By default λ is at most 1 here: at less noise the scores depend on
the texture of the image, and differ by thousands of nats. If the image is not quite like the
training images, that outweighs all else. Below -4 the captions hardly differ.

The caption "" stands for "none of these": it is the unconditional model, p(x0).

    *_, last = classify(network, diffusion, encoder, x0, captions)      # x0: [C, H, W]
    captions[last.indices[0]]

The file needs torch only.

>>> levels, eps = draw_noise(4, (3, 8, 8), torch.Generator().manual_seed(0), log_snr=(-4, 1))
>>> [round(float(level), 2) for level in levels], bool((eps[0] == -eps[1]).all())
([-1.5, -1.5, -3.41, -3.41], True)
"""

import math
from collections.abc import Callable, Iterator
from statistics import NormalDist
from typing import NamedTuple

import torch

LOG_SNR = (-4.0, 1.0)                           # λ_min, λ_max
ROUNDS = ((1, 20), (6, 5), (24, 1))             # (evaluations of a caption so far, captions kept)
BATCH_SIZE = 64                                 # noisy images that are evaluated at once
GOLDEN_RATIO = (5 ** 0.5 - 1) / 2


class Round(NamedTuple):
    """The candidates after a round of successive halving.

    evaluations: network evaluations of each of these captions so far.
    ranking: indices of the captions that were evaluated in this round, the likeliest first.
    scores: [len(ranking)], in nats for w = 1, the lowest first. softmax(-scores) are their
        probabilities.
    standard_errors: [len(ranking)], of the difference from the lowest score; NaN after a single
        evaluation.
    indices: the part of the ranking that is evaluated in the next round; after the last round the
        result.
    """

    evaluations: int
    ranking: list[int]
    scores: torch.Tensor
    standard_errors: torch.Tensor
    indices: list[int]


# ---------------------------------------------------------------- noise levels


def timesteps_at(schedule, log_snr: torch.Tensor) -> torch.Tensor:
    """Return the times at which log(alpha_t² / sigma_t²) is nearest to log_snr [N]: [N].

    schedule: a NoiseSchedule, for int64 timesteps, or a RectifiedFlow, for float times.
    """
    if not hasattr(schedule, "alpha_bar"):      # a flow: alpha_t = 1 - t, sigma_t = t
        return torch.sigmoid(-log_snr / 2)
    levels = torch.logit(schedule.alpha_bar)    # [T], decreasing
    return (levels[None] - log_snr[:, None]).abs().argmin(dim=1)


def draw_noise(
    count: int, shape, generator: torch.Generator, log_snr: tuple[float, float] = LOG_SNR
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw λ [count] within log_snr, and eps [count, *shape].

    Draws 2j and 2j + 1 have the same λ, and eps and -eps. The λ of j = 0, 1, … are a quasi-random
    sequence: the first ones, however many, cover the range evenly.
    """
    low, high = log_snr
    pairs = torch.arange(count) // 2
    levels = low + (high - low) * ((0.5 + GOLDEN_RATIO * pairs.double()) % 1)
    eps = torch.randn(-(-count // 2), *shape, generator=generator)
    return levels, torch.stack([eps, -eps], dim=1).flatten(0, 1)[:count]


# ---------------------------------------------------------------- errors and scores


@torch.no_grad()
def errors(
    network, diffusion, context, mask, x0, t, eps, progress: Callable = iter
) -> torch.Tensor:
    """Return |eps - eps_hat(x_t, t, c)|² for every caption c and every (t, eps), [K, N].

    network: (x_t, t, context, mask) → output.
    diffusion: a GaussianDiffusion or a RectifiedFlow.
    context, mask: of the K captions, [K, L, D] and [K, L].
    x0: an image [C, H, W] in [-1, 1], or its latent.
    t, eps: [N] and [N, C, H, W].
    progress: wraps the list of batches, for example in a tqdm bar.
    """
    alpha_t, sigma_t = diffusion.schedule.alpha_sigma(t, eps)
    x_t = alpha_t * x0 + sigma_t * eps                                  # [N, C, H, W]
    captions, draws = torch.cartesian_prod(
        torch.arange(len(context)), torch.arange(len(t))
    ).to(x0.device).T                                                   # [K N] each
    values = []
    for k, n in progress(list(zip(captions.split(BATCH_SIZE), draws.split(BATCH_SIZE)))):
        denoise = diffusion.denoiser(network, context[k], mask[k])
        error = denoise(x_t[n], t[n]).eps - eps[n]
        values.append(error.square().flatten(1).sum(dim=1))
    return torch.cat(values).view(len(context), len(t))


def classify(
    network,
    diffusion,
    encoder,
    x0: torch.Tensor,
    captions: list[str],
    rounds=ROUNDS,
    log_snr: tuple[float, float] = LOG_SNR,
    weight: Callable | None = None,
    confidence: float | None = None,
    generator: torch.Generator | None = None,
    progress: Callable = iter,
) -> Iterator[Round]:
    """Find the caption that explains an image best; yields every Round of successive halving.

    network, diffusion, encoder: a trained text-to-image model, without guidance.
    x0: an image [C, H, W] in [-1, 1], or its latent, on the network's device.
    captions: the candidates; "" for none of the others.
    rounds: (evaluations, kept) of each round: every remaining caption is evaluated until it has
        `evaluations`, and the `kept` best remain.
    log_snr: the range of λ.
    weight: w, a function λ [N] → [N]; None: 1, the variational bound.
    confidence: also keep every caption that is not worse than the best one at this confidence, by a
        one-sided test of the differences in which the level is divided by the number of captions.
        None: keep exactly as many as `rounds` says.
    generator: source of the noise; None: a new one with seed 0.
    progress: wraps the batches of each round, for example in a tqdm bar.

    Raises ValueError for no captions, for rounds that do not increase their evaluations or keep no
    caption, and for a confidence that is not between 0 and 1.
    """
    counts = [evaluations for evaluations, _ in rounds]
    if not captions:
        raise ValueError("there is no caption to choose from")
    if not counts or counts[0] < 1 or counts != sorted(set(counts)):
        raise ValueError(f"the evaluations of the rounds must increase from at least 1: {rounds}")
    if min(kept for _, kept in rounds) < 1:
        raise ValueError(f"each round must keep at least 1 caption: {rounds}")
    if confidence is not None and not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, such as 0.99, not {confidence}")
    generator = generator or torch.Generator().manual_seed(0)
    levels, eps = draw_noise(counts[-1], x0.shape, generator, log_snr)
    eps = eps.to(x0)
    t = timesteps_at(diffusion.schedule, levels).to(x0.device)
    weights = torch.ones_like(levels) if weight is None else weight(levels)
    weights = weights * (log_snr[1] - log_snr[0]) / 2                   # [N]
    with torch.no_grad():
        context, mask = encoder(captions)                               # [K, L, D], [K, L]

    indices = torch.arange(len(captions))
    values = torch.zeros(len(captions), 0, dtype=torch.float64)
    for evaluations, kept in rounds:
        new = slice(values.shape[1], evaluations)
        error = errors(
            network, diffusion, context[indices], mask[indices], x0, t[new], eps[new], progress
        )                                                               # [K, new evaluations]
        values = torch.cat([values, weights[new] * error.cpu().double()], dim=1)
        scores = values.mean(dim=1)
        order = scores.argsort()
        indices, values, scores = indices[order], values[order], scores[order]
        behind = values - values[:1]
        variance = (behind - behind.mean(dim=1, keepdim=True)).square().sum(dim=1)
        variance = variance / (evaluations - 1)     # NaN for a single evaluation
        standard_errors = (variance / evaluations).sqrt()
        remain = torch.arange(len(indices)) < kept
        if confidence is not None:
            limit = t_quantile(1 - (1 - confidence) / len(captions), evaluations - 1)
            remain |= ~(scores - scores[0] > limit * standard_errors)   # NaN: remains
        ranking = indices.tolist()
        indices, values = indices[remain], values[remain]
        yield Round(evaluations, ranking, scores, standard_errors, indices.tolist())


def learn_weight(log_snr: torch.Tensor, noise_errors: torch.Tensor) -> Callable:
    """Return the weight w(λ) with which a few noises tell right captions from wrong ones best.

    Let m be the error of a wrong caption minus that of the right one. If the noises are
    independent, the weighted sum of the m is largest beside its standard deviation for
    w = E m / Var m, at each λ.

    log_snr: λ [N] at which the errors were measured, ascending.
    noise_errors: `errors` of M images, such as those of the training, [M, K, N], with the right
        caption first.

    w is interpolated between the λ, at least 0, and 1 on average over them. Give `classify` the
    same range of λ. Raises ValueError if no w is above 0.
    """
    margins = noise_errors[:, 1:] - noise_errors[:, :1]                     # [M, K - 1, N]
    margins = margins.flatten(0, 1).cpu().double()
    weights = (margins.mean(dim=0) / margins.var(dim=0)).clamp(min=0)
    if not weights.sum() > 0:
        raise ValueError("no noise tells right captions from wrong ones: the errors are the same")
    weights = weights / weights.mean()
    log_snr = log_snr.cpu().double()

    def weight(levels):
        i = torch.searchsorted(log_snr, levels.contiguous()).clamp(1, len(log_snr) - 1)
        fraction = (levels - log_snr[i - 1]) / (log_snr[i] - log_snr[i - 1])
        return torch.lerp(weights[i - 1], weights[i], fraction.clamp(0, 1))

    return weight


def rank(rounds: list[Round]) -> list[int]:
    """Return the indices of all captions, the likeliest first.

    Captions that were dropped come after those that remained, in the order of their last round.
    """
    order = [index for each in reversed(rounds) for index in each.ranking]
    return list(dict.fromkeys(order))


def t_quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t distribution, NaN for no degree of freedom.

    It is exact for 1 and 2 degrees of freedom; else Abramowitz & Stegun 1964, 26.7.5, four terms.
    """
    if freedom < 1:
        return float("nan")
    if freedom == 1:
        return math.tan(math.pi * (probability - 0.5))
    if freedom == 2:
        return (2 * probability - 1) / math.sqrt(2 * probability * (1 - probability))
    z = NormalDist().inv_cdf(probability)
    return (
        z
        + (z ** 3 + z) / (4 * freedom)
        + (5 * z ** 5 + 16 * z ** 3 + 3 * z) / (96 * freedom ** 2)
        + (3 * z ** 7 + 19 * z ** 5 + 17 * z ** 3 - 15 * z) / (384 * freedom ** 3)
    )
