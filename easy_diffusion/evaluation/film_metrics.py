"""Metrics of films: which motion do they show, how far does a plate turn, do they loop?

    motion classifier    a small convolutional network that sees each frame beside the change to the
                         next one, and names the motion
    rotation             the angle between two frames by polar correlation: both are resampled on
                         circles around the centre, where a rotation is a shift, and the shift with
                         the largest correlation is the angle
    loop seam ratio      |x_0 - x_{F-1}| / mean_f |x_{f+1} - x_f|: the change from the last frame to
                         the first one, beside that between neighbours. It is about 1 for a loop
                         whose motion is even, such as that of a turning plate.
    tosses               the frames that differ much from the median frame of their film
    F1                   2 TP / (2 TP + FP + FN) of the frames with a toss, from the counts of true
                         positives, false positives and false negatives

Films are uint8 [B, F, 3, H, W]. The file needs torch and, beside it,
attribute_classifier.py.

>>> films = torch.randint(256, (2, 8, 3, 32, 32), dtype=torch.uint8)
>>> classifier = MotionClassifier(["turn", "still"])
>>> tuple(classifier(films).shape), len(classifier.classify(films)), loop_seam_ratio(films).shape
((2, 2), 2, torch.Size([2]))
"""

import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from .attribute_classifier import train_with_loss

BATCH_SIZE = 32                         # films that are classified at once
ANGLES = 360                            # samples of a circle, one for each degree
RADII = 20
TOSSED = 12                             # mean difference, of 255, from the median frame
CENTRES = 3                             # candidates for the centre in each direction, to each side


class MotionClassifier(nn.Module):
    """Films uint8 [B, F, 3, H, W] → logits [B, M] of the motions.

    motions: their M names.
    width: channels of the first layer, a multiple of 8.
    """

    def __init__(self, motions: Iterable[str], width: int = 16):
        super().__init__()
        self.motions = list(motions)
        layers = []
        in_channels = 6                                 # a frame, and its change to the next one
        for level in range(3):                          # H → H/2 → H/4 → H/8
            channels = width * 2 ** level
            layers += [nn.Conv2d(in_channels, channels, 3, stride=2, padding=1)]
            layers += [nn.GroupNorm(8, channels), nn.SiLU()]
            in_channels = channels
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(2 * in_channels, len(self.motions))

    def forward(self, films: torch.Tensor) -> torch.Tensor:
        frames = films.float() / 127.5 - 1
        changes = frames.roll(-1, dims=1) - frames                      # the last one to the first
        h = torch.cat([frames, 4 * changes], dim=2).flatten(0, 1)       # [B·F, 6, H, W]
        h = self.body(h)
        h = torch.cat([h.mean(dim=(2, 3)), h.amax(dim=(2, 3))], dim=1)  # [B·F, 2C]
        return self.head(h.unflatten(0, films.shape[:2]).mean(dim=1))

    @torch.no_grad()
    def classify(self, films: torch.Tensor) -> list[str]:
        """Return the motion of each film. The module is set to eval mode."""
        self.eval()
        device = self.head.weight.device
        indices = [self(batch.to(device)).argmax(dim=1) for batch in films.split(BATCH_SIZE)]
        return [self.motions[i] for i in torch.cat(indices).tolist()]


def train_motion_classifier(
    classifier: MotionClassifier, loader, steps: int = 600, learning_rate: float = 2e-3
) -> Iterator[float]:
    """Train a motion classifier and yield the cross-entropy of each step.

    AdamW trains with a one-cycle learning rate. Half of the films get noise of up to 10 grey
    levels, another one in each frame, as samples have.

    loader: (films uint8 [B, F, 3, H, W], motions) batches; it is iterated over repeatedly.
    learning_rate: the peak rate.

    Raises ValueError if the loader yields no batch.
    """
    device = classifier.head.weight.device

    def compute_loss(films, motions):
        labels = torch.tensor([classifier.motions.index(motion) for motion in motions])
        films = films.to(device).float()
        std = 10 * torch.rand(len(films), 1, 1, 1, 1, device=device)
        std = std * (torch.rand_like(std) < 0.5)
        return F.cross_entropy(classifier(films + std * torch.randn_like(films)), labels.to(device))

    return train_with_loss(classifier, loader, compute_loss, steps, learning_rate)


# ------------------------------------------------------------------ rotation


def measure_rotation(film: torch.Tensor, radius: float = 0.75) -> torch.Tensor:
    """Return the angles by which frame f + 1 is turned from frame f, in degrees, int64 [F].

    The last one is that from frame F - 1 to frame 0. Angles are clockwise, in whole degrees from
    -180 to 179. The centre is searched for near the middle of the image: the one with the largest
    correlations of all neighbours.

    film: uint8 [F, 3, H, W] with H = W.
    radius: of the largest circle, as a fraction of half the side.
    """
    best, angles = -math.inf, None
    offsets = torch.arange(-CENTRES, CENTRES + 1) * 0.04            # of half the side
    for dx in offsets.tolist():
        for dy in offsets.tolist():
            circles = sample_circles(film, (dx, dy), radius)        # [F, 3·RADII, ANGLES]
            score, shift = correlate(circles, circles.roll(-1, dims=0)).max(dim=1)
            if float(score.sum()) > best:
                best, angles = float(score.sum()), shift
    return (angles + 180) % 360 - 180


def sample_circles(film: torch.Tensor, centre: tuple[float, float], radius: float) -> torch.Tensor:
    """Sample circles around a centre, each without its mean: float [F, 3·RADII, ANGLES].

    centre: (x, y) in the coordinates -1 … 1 of grid_sample.
    """
    theta = torch.arange(ANGLES, device=film.device) * (2 * math.pi / ANGLES)
    r = torch.linspace(0.15, radius, RADII, device=film.device)
    x = centre[0] + r[:, None] * theta.cos()
    y = centre[1] + r[:, None] * theta.sin()                        # y points down: clockwise
    grid = torch.stack([x, y], dim=-1).expand(len(film), -1, -1, -1)
    circles = F.grid_sample(film.float(), grid, align_corners=False)    # [F, 3, RADII, ANGLES]
    circles = circles - circles.mean(dim=3, keepdim=True)
    circles = circles * r.sqrt()[:, None]       # the sum over circles becomes one over the area
    return circles.flatten(1, 2)


def correlate(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the correlation of a(θ) with b(θ + s) for each shift s, float [F, ANGLES].

    a, b: [F, N, ANGLES].
    """
    spectrum = torch.fft.rfft(a).conj() * torch.fft.rfft(b)
    product = torch.fft.irfft(spectrum, n=a.shape[-1]).sum(dim=1)
    norm = a.square().sum(dim=(1, 2)) * b.square().sum(dim=(1, 2))
    return product / norm.sqrt().clamp(min=1e-6)[:, None]


# ------------------------------------------------------------------ loops


def loop_seam_ratio(films: torch.Tensor) -> torch.Tensor:
    """Return |x_0 - x_{F-1}| over the mean |x_{f+1} - x_f| for each film, float [B].

    films: uint8 [B, F, 3, H, W]. It is NaN for a film that stands still.
    """
    changes = (films.float().roll(-1, dims=1) - films.float()).abs().mean(dim=(2, 3, 4))    # [B, F]
    return changes[:, -1] / changes[:, :-1].mean(dim=1)


# ------------------------------------------------------------------ tosses


def find_tosses(films: torch.Tensor) -> torch.Tensor:
    """Return the frames in which the ingredients are in the air, bool [B, F].

    They are those whose mean difference from the median frame is above TOSSED, so that fewer than
    half of the frames can be tossed.

    films: uint8 [B, F, 3, H, W].
    """
    median = films.float().median(dim=1, keepdim=True).values
    return (films.float() - median).abs().mean(dim=(2, 3, 4)) > TOSSED


def event_f1(found: torch.Tensor, true: torch.Tensor) -> float:
    """Return the F1 of events, bool tensors of one shape; it is 1 if there is none in either."""
    true_positives = int((found & true).sum())
    wrong = int((found ^ true).sum())
    if true_positives + wrong == 0:
        return 1.0
    return 2 * true_positives / (2 * true_positives + wrong)
