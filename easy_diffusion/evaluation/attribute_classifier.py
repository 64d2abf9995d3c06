"""TODO."""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn


class AttributeClassifier(nn.Module):
    """Pictures uint8 [B, 3, H, W] → logits of ingredients [B, I] and of ways [B, W]; height and width of 32 or more."""

    def __init__(self, ingredients: Iterable[str], ways: Iterable[str], width: int = 32):
        super().__init__()
        self.ingredients, self.ways = list(ingredients), list(ways)
        layers, c = [], 3
        for level in range(4):                                              # H → H/2 → H/4 → H/8 → H/16
            out = width * 2 ** level
            layers += [nn.Conv2d(c, out, 3, stride=2, padding=1), nn.GroupNorm(8, out), nn.SiLU()]
            layers += [nn.Conv2d(out, out, 3, padding=1), nn.GroupNorm(8, out), nn.SiLU()] if level else []
            c = out
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(2 * c, len(self.ingredients) + len(self.ways))

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """[B, 16 width]: mean and maximum over the picture of the last layer."""
        h = self.body(pictures.float() / 127.5 - 1)                         # [B, C, H/16, W/16]
        return torch.cat([h.mean(dim=(2, 3)), h.amax(dim=(2, 3))], dim=1)   # [B, 2C]

    def forward(self, pictures):
        return self.head(self.features(pictures)).split([len(self.ingredients), len(self.ways)], dim=1)

    @torch.no_grad()
    def classify(self, pictures: torch.Tensor) -> list[tuple[frozenset[str], str]]:
        """What it sees in each picture: (ingredients, way). An ingredient is seen where its probability is above 1/2."""
        seen = []
        for part in pictures.to(self.head.weight.device).split(256):
            ingredients, ways = self.eval()(part)
            for present, way in zip((ingredients > 0).tolist(), ways.argmax(dim=1).tolist()):
                seen.append((frozenset(i for i, yes in zip(self.ingredients, present) if yes), self.ways[way]))
        return seen

    def exact_matches(self, pictures: torch.Tensor, dishes) -> list[bool]:
        """For each picture whether it reads just what the dish, an (ingredients, way), has."""
        seen = self.classify(pictures)
        if len(seen) != len(dishes):
            raise ValueError(f"{len(seen)} pictures, but {len(dishes)} dishes")
        return [ingredients == frozenset(dish[0]) and way == dish[1] for (ingredients, way), dish in zip(seen, dishes)]


def prompt_accuracy(right: list[bool]) -> float:
    """The share p that is right, in [0, 1]; of n pictures its standard error is sqrt(p (1 - p) / n). ValueError for none."""
    if not right:
        raise ValueError("of no pictures there is no share")
    return sum(right) / len(right)


def train_attribute_classifier(reader: AttributeClassifier, loader, attributes: Callable, steps: int = 2000, learning_rate: float = 2e-3,
                 bf16: bool = False) -> Iterator[float]:
    """Train on (pictures uint8 [B, 3, H, W], names) from the loader, again and again; yields each step's loss.

    attributes(name) → (ingredients, way). The loss is the sum of the cross-entropies of each ingredient and of the way; the
    pictures get a little noise and blur, so that a sample is not misread for its texture. bf16: half the time where the
    machine computes in bfloat16.
    """
    weight = reader.head.weight
    optimizer = torch.optim.AdamW(reader.parameters(), learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.1)
    step = 0
    while step < steps:
        first = step
        for pictures, names in loader:
            dishes = [attributes(name) for name in names]
            present = torch.tensor([[float(i in dish[0]) for i in reader.ingredients] for dish in dishes])
            way = torch.tensor([reader.ways.index(dish[1]) for dish in dishes])
            with torch.autocast(weight.device.type, torch.bfloat16, enabled=bf16):
                ingredients, ways = reader.train()(augment(pictures.to(weight.device)))
            loss = F.binary_cross_entropy_with_logits(ingredients.float(), present.to(weight), reduction="none").sum(dim=1).mean()
            loss = loss + F.cross_entropy(ways.float(), way.to(weight.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            yield loss.item()
            step += 1
            if step == steps:
                return
        if step == first:
            raise ValueError("the loader gives no batch; it must give them again and again")


def augment(pictures: torch.Tensor) -> torch.Tensor:
    """Half of the pictures softened by a 3×3 mean, all with noise of a deviation of up to 10 grey levels; [B, 3, H, W], float, 0 … 255."""
    pictures = pictures.float()
    soft = F.avg_pool2d(pictures, 3, stride=1, padding=1, count_include_pad=False)
    amount = torch.rand(len(pictures), 1, 1, 1, device=pictures.device)
    pictures = torch.where(amount < 0.5, pictures, soft)
    return pictures + torch.randn_like(pictures) * 20 * (amount - 0.5).abs()


def classifier_features(reader: AttributeClassifier, pictures: torch.Tensor) -> torch.Tensor:
    """What the reader knows of pictures uint8 [N, 3, H, W] before it names anything: float64 [N, 16 width]."""
    with torch.no_grad():
        parts = [reader.eval().features(part.to(reader.head.weight.device)) for part in pictures.split(256)]
    return torch.cat(parts).double().cpu()
