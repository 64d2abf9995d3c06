"""What a sample is worth: does a reader see in the picture what its name promises, and do many samples look like real pictures?

The reader is a small convolutional network that is trained on real drawings and says which ingredients are in a picture
and how it was cooked. A picture is *fully right* if it reads all of its ingredients, no others, and the way. Fidelity is
the share of sampled pictures that are fully right. A yardstick must be better than what it measures: first the reader reads
real pictures that it never saw, and if fewer than 98% of them are fully right, the fidelity means nothing.

Fidelity looks at one picture at a time. Two distances compare a set of samples with a set of real pictures, both as
features f of the reader, [N, D]:

    Fréchet:  |mean_a - mean_b|² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½)              as if both were Gaussians (Heusel et al. 2017)
    kernel:   E k(a, a') + E k(b, b') - 2 E k(a, b),   k(x, y) = (x·y / D + 1)³  no such assumption (Bińkowski et al. 2018)

The first is biased, and the more so the fewer pictures; the second is not, and comes with its standard error. Of pictures that
an autoencoder gives back, `psnr` and `ssim` say how near they are to what they were, and `sharpness`, whether they are as sharp. The file
needs nothing but torch.

>>> reader = Reader(ingredients=["番茄", "鸡蛋"], ways=["炒", "汤"])
>>> names = reader.classify(torch.zeros(3, 3, 64, 64, dtype=torch.uint8))
>>> len(names), type(names[0])
(3, <class 'tuple'>)
"""


import torch
import torch.nn.functional as F


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Squared Fréchet distance of the Gaussians with the means and covariances of a [N, D] and b [M, D]; 0 for equal ones.

    tr (Σ_a Σ_b)^½ is computed as tr (Σ_a^½ Σ_b Σ_a^½)^½, which has the same eigenvalues and is symmetric.
    """
    _check_features(a, b)
    a, b = a.double(), b.double()
    values, vectors = torch.linalg.eigh(torch.cov(a.T).reshape(a.shape[1], -1))
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T                 # Σ_a^½ [D, D]
    covariance = torch.cov(b.T).reshape(b.shape[1], -1)
    mixed = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + values.sum() + covariance.trace() - 2 * mixed)


def kernel_distance(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """(squared kernel distance, its standard error) of as many samples a [N, D] as real pictures b [N, D], N ≥ 4.

    With h_ij = k(a_i, a_j) + k(b_i, b_j) - k(a_i, b_j) - k(a_j, b_i) it is the mean of h over i ≠ j, unbiased, so that it may be
    below 0 (Gretton et al. 2012, lemma 6). Its variance is 4 ζ1 / N + 2 ζ2 / N² to leading order: ζ1 the variance of h's mean
    over j, ζ2 that of h (Hoeffding 1948). Where a and b are alike ζ1 is 0, and the second part is all.
    """
    _check_features(a, b)
    n = len(a)
    if len(b) != n or n < 4:
        raise ValueError(f"as many samples as real pictures, 4 or more of each: not {n} and {len(b)}")
    a, b = a.double(), b.double()

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3                              # [N, N]

    cross = kernel(a, b)
    h = (kernel(a, a) + kernel(b, b) - cross - cross.T).fill_diagonal_(0)
    distance = h.sum() / (n * (n - 1))
    means = h.sum(dim=1) / (n - 1)                                          # [N], over j ≠ i
    zeta2 = h.square().sum() / (n * (n - 1)) - distance ** 2
    zeta1 = (means.var() - zeta2 / n).clamp(min=0)                          # the means' own noise taken off
    return float(distance), float((4 * zeta1 / n + 2 * zeta2 / n ** 2).sqrt())


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal to noise of pictures uint8 [B, C, H, W], in decibel, [B]: 10 log10(255² / mean (a - b)²); infinite for equal ones."""
    return 10 * torch.log10(255 ** 2 / (a.float() - b.float()).square().flatten(1).mean(dim=1))


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity of pictures uint8 [B, C, H, W], [B], at most 1:

    (2 μ_a μ_b + c) (2 σ_ab + d) / ((μ_a² + μ_b² + c) (σ_a² + σ_b² + d)) with c = (0.01 · 255)², d = (0.03 · 255)², in a Gaussian window of
    11×11, σ = 1.5, and its mean over windows and colours (Wang et al. 2004, equation 13)."""
    channels = a.shape[1]
    line = torch.exp(-torch.arange(-5, 6, dtype=torch.float64).square() / (2 * 1.5 ** 2))
    line = line / line.sum()                                                # [11]; the window is its product with itself
    a, b = (x.double().flatten(0, 1)[:, None] for x in (a, b))              # [B·C, 1, H, W]; small differences of large squares follow

    def mean(x):
        return F.conv2d(F.conv2d(x, line.to(x).view(1, 1, -1, 1)), line.to(x).view(1, 1, 1, -1))           # [B·C, 1, H - 10, W - 10]

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b, covariance = mean(a * a) - mean_a ** 2, mean(b * b) - mean_b ** 2, mean(a * b) - mean_a * mean_b
    c, d = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similar = (2 * mean_a * mean_b + c) * (2 * covariance + d) / ((mean_a ** 2 + mean_b ** 2 + c) * (var_a + var_b + d))
    return similar.flatten(1).mean(dim=1).view(-1, channels).mean(dim=1)


def sharpness(pictures: torch.Tensor) -> torch.Tensor:
    """How much pictures uint8 [B, C, H, W] change from pixel to pixel, [B]: the deviation of their Laplacian (Pech-Pacheco et al. 2000), in
    grey levels. Blur lowers it; of a picture that came back it is to be what it was."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], device=pictures.device)
    edges = F.conv2d(pictures.float().flatten(0, 1)[:, None], kernel[None, None])
    return edges.unflatten(0, pictures.shape[:2]).flatten(1).std(dim=1)


def _check_features(a, b):
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features are [N, D] and [M, D] with N, M ≥ 2, not {tuple(a.shape)} and {tuple(b.shape)}")
