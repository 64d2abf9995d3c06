"""Metrics of images: Fréchet and kernel distance, PSNR, SSIM, sharpness and seams.

Two distances compare a set of samples with a set of real images. Each image is given by its
features, a vector of D values, such as those of `classifier_features`. With means μ, covariances Σ,
samples a, real images b and k(x, y) = (x · y / D + 1)³,

    Fréchet distance   |μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½)      (Heusel et al. 2017)
    kernel distance    E k(a, a') + E k(b, b') - 2 E k(a, b)             (Bińkowski et al. 2018)

The Fréchet distance treats both sets as Gaussians. Its estimate is too large, the more so the fewer
the images. The estimate of the kernel distance is unbiased and comes with its standard error.

Three metrics judge the reconstructions of an autoencoder, image by image: PSNR and SSIM compare a
reconstruction with its image, and sharpness, measured on both, shows how much was blurred. A fourth
one says how visible the border of an inpainted region is.

The file needs nothing but torch.

>>> features = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
>>> round(frechet_distance(features, features + 1), 3)          # 8 features, each shifted by 1
8.0
>>> distance, standard_error = kernel_distance(features, features)
>>> distance
0.0
>>> images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
>>> psnr(images, images), ssim(images, images), sharpness(images).shape
(tensor([inf, inf]), tensor([1., 1.], dtype=torch.float64), torch.Size([2]))
"""

import torch
import torch.nn.functional as F

# ---------------------------------------------------------------- sets of features


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the squared Fréchet distance |μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½).

    tr (Σ_a Σ_b)^½ is computed as tr (Σ_a^½ Σ_b Σ_a^½)^½. The two matrices have the same
    eigenvalues, and the second one is symmetric. Source: Heusel et al. 2017.

    a, b: features [N, D] and [M, D], N and M at least 2; else ValueError.
    """
    _check_features(a, b)
    a = a.cpu().double()
    b = b.cpu().double()
    dim = a.shape[1]
    covariance_a = torch.cov(a.T).reshape(dim, dim)
    covariance_b = torch.cov(b.T).reshape(dim, dim)
    values, vectors = torch.linalg.eigh(covariance_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T               # Σ_a^½ [D, D]
    product = root_a @ covariance_b @ root_a                                # Σ_a^½ Σ_b Σ_a^½
    root_trace = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()
    mean_term = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    return float(mean_term + covariance_a.trace() + covariance_b.trace() - 2 * root_trace)


def kernel_distance(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """Return the squared kernel distance and its standard error.

    With h_ij = k(a_i, a_j) + k(b_i, b_j) - k(a_i, b_j) - k(a_j, b_i) the distance is the mean of
    h over i ≠ j. It is unbiased, so it may be below 0 (Gretton et al. 2012, lemma 6). To leading
    order its variance is 4 ζ1 / N + 2 ζ2 / N², where ζ1 is the variance of h's mean over j and ζ2
    that of h (Hoeffding 1948). If a and b have the same distribution, ζ1 is 0.

    a, b: features of samples and of real images, both [N, D] with N at least 4; else ValueError.
    """
    _check_features(a, b)
    n = len(a)
    if len(b) != n or n < 4:
        raise ValueError(
            "the kernel distance needs as many samples as real images, at least 4 of each, "
            f"not {n} and {len(b)}"
        )
    a = a.cpu().double()
    b = b.cpu().double()

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3                              # [N, N]

    cross = kernel(a, b)
    h = (kernel(a, a) + kernel(b, b) - cross - cross.T).fill_diagonal_(0)
    distance = h.sum() / (n * (n - 1))
    means = h.sum(dim=1) / (n - 1)                                          # [N], over j ≠ i
    zeta2 = h.square().sum() / (n * (n - 1)) - distance ** 2
    zeta1 = (means.var() - zeta2 / n).clamp(min=0)      # without the sampling variance of the means
    return float(distance), float((4 * zeta1 / n + 2 * zeta2 / n ** 2).sqrt())


def _check_features(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            "features must have the shapes [N, D] and [M, D] with N, M ≥ 2, "
            f"not {tuple(a.shape)} and {tuple(b.shape)}"
        )


# ---------------------------------------------------------------- images and reconstructions


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the peak signal-to-noise ratio 10 log10(255² / mean (a - b)²) in dB, [B].

    It is infinite for equal images.

    a, b: images uint8 [B, C, H, W].
    """
    mean_squared_error = (a.float() - b.float()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(255 ** 2 / mean_squared_error)


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the structural similarity, at most 1, [B]: the mean over windows and channels of

        (2 μ_a μ_b + c) (2 σ_ab + d) / ((μ_a² + μ_b² + c) (σ_a² + σ_b² + d))

    with c = (0.01 · 255)² and d = (0.03 · 255)². The moments are those in a Gaussian window of
    11×11 pixels with a standard deviation of 1.5. Source: Wang et al. 2004, equation 13.

    a, b: images uint8 [B, C, H, W], H and W at least 11.
    """
    batch, channels = a.shape[:2]
    # The window is the product of two one-dimensional ones, applied one after the other.
    window = torch.exp(-torch.arange(-5, 6, dtype=torch.float64).square() / (2 * 1.5 ** 2))
    window = (window / window.sum()).to(a.device)                           # [11]
    # float64, because the variances are small differences of large squares.
    a = a.cpu().double().flatten(0, 1)[:, None]                                   # [B·C, 1, H, W]
    b = b.cpu().double().flatten(0, 1)[:, None]

    def mean(x):
        x = F.conv2d(x, window.view(1, 1, -1, 1))
        return F.conv2d(x, window.view(1, 1, 1, -1))                        # [B·C, 1, H-10, W-10]

    mean_a = mean(a)
    mean_b = mean(b)
    var_a = mean(a * a) - mean_a ** 2
    var_b = mean(b * b) - mean_b ** 2
    covariance = mean(a * b) - mean_a * mean_b
    c = (0.01 * 255) ** 2
    d = (0.03 * 255) ** 2
    similarity = (
        (2 * mean_a * mean_b + c) * (2 * covariance + d)
        / ((mean_a ** 2 + mean_b ** 2 + c) * (var_a + var_b + d))
    )
    return similarity.flatten(1).mean(dim=1).view(batch, channels).mean(dim=1)


def sharpness(images: torch.Tensor) -> torch.Tensor:
    """Return the standard deviation of the images' Laplacian in grey levels, [B].

    Blur lowers it. A good reconstruction is as sharp as its image.
    Source: Pech-Pacheco et al. 2000.

    images: uint8 [B, C, H, W].
    """
    laplacian = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], device=images.device)
    edges = F.conv2d(images.float().flatten(0, 1)[:, None], laplacian[None, None])
    return edges.unflatten(0, images.shape[:2]).flatten(1).std(dim=1)


def seam(images: torch.Tensor, mask: torch.Tensor, width: int = 4) -> torch.Tensor:
    """Return how visible the border of an inpainted region is; 1: not at all; [B].

    It is the mean |x_i - x_j| over neighbouring pixels i, j on different sides of the border,
    divided by the same mean over the neighbours on one side of it, both at most about `width`
    pixels away. NaN if the mask has no border, infinite if both sides are constant.

    images: uint8 [B, C, H, W]. mask: bool [H, W], True = inpainted.
    """
    inside = mask[None, None].to(images.device).float()                     # [1, 1, H, W]
    dilate = torch.nn.MaxPool2d(2 * width + 1, stride=1, padding=width)
    near_border = dilate(inside) * dilate(1 - inside)
    across, beside = [], []
    for dim in (2, 3):
        differences = images.float().diff(dim=dim).abs().mean(dim=1)        # [B, H - 1, W] for H
        crosses = inside.diff(dim=dim)[0, 0] != 0
        is_near = near_border.narrow(dim, 1, near_border.shape[dim] - 1)[0, 0] > 0
        across.append(differences[:, crosses])                              # [B, number of pairs]
        beside.append(differences[:, is_near & ~crosses])
    return torch.cat(across, dim=1).mean(dim=1) / torch.cat(beside, dim=1).mean(dim=1)
