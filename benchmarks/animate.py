"""From a name to a film, and what can be read in it: python -m benchmarks.animate [--quick]

Seconds and network calls for 24 frames, at 64×64 pixels and, by the network of the demo with --latent, at 128×128; beside it the
way of the predecessor of 2023, which repainted at every frame. Then the camera goes from held-out dishes to the right, and a reader reads
what is in view when it has gone half the width, and at the end of its way. In between there are two half dishes to be seen, so
this reader was trained on frames: windows over two drawings of one dish, side by side; new ones of those it must read right in 98 of 100.
"""

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch

from datasets.dishes import attributes, dish_names, draw_dish
from easy_diffusion import generate, presets
from easy_diffusion.animation.camera import uncover
from easy_diffusion.animation.film import animate, default_pixels
from easy_diffusion.evaluation.attribute_classifier import AttributeClassifier, prompt_accuracy
from easy_diffusion.inpainting.blending import blend, to_pixel_values
from easy_diffusion.inpainting.repaint import repaint_sampling
from easy_diffusion.networks.weights_io import load_autoencoder

from .fidelity import LEAST_READER_ACCURACY, all_of, kept_reader
from .report import finish

FRAMES, STEP = 24, default_pixels("right", (64, 64))
WAYS_OF_FILMING = ("painted once", "a repaint a frame")


class Frames(torch.utils.data.Dataset):
    """Windows over two drawings of one dish, as a camera sees them on its way from one to the other: (uint8 [3, 64, 64], name).
    at: how far it has gone, or None for anywhere on its way."""

    def __init__(self, length, seed, names, at=None):
        self.length, self.seed, self.names, self.at = length, seed, names, at

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        seed = self.seed * 1_000_003 + index
        chance = random.Random(seed)
        name = chance.choice(self.names)
        both = np.concatenate([draw_dish(name, 64, seed), draw_dish(name, 64, seed + 500_000)[..., 64 - STEP:]], axis=2)
        x = chance.randint(0, STEP) if self.at is None else self.at
        return torch.from_numpy(both[..., x:x + 64].copy()), name


def reader_of_frames(out: Path, count: int, steps: int) -> AttributeClassifier:
    """Trained on `count` windows over dishes of all names, and kept in `out`."""
    return kept_reader(out / f"reader_of_frames_{steps}.safetensors", steps,
                       lambda: all_of(Frames(count, 300, dish_names("train") + dish_names("held_out"))))


def painted_beside(model, dishes: np.ndarray, names: list[str], pixels: int, steps: int) -> np.ndarray:
    """What lies `pixels` to the right of each dish uint8 [B, 64, 64, 3] and before, painted as the demo does, in so many steps, where it
    takes 25, but for all at once: [B, 64, 64 + pixels, 3]."""
    network, encoder, diffusion = model
    moved, masks = zip(*[uncover(dish, "right", pixels) for dish in dishes])
    device = next(network.parameters()).device
    x0 = torch.from_numpy(np.stack(moved)).permute(0, 3, 1, 2).float().to(device) / 127.5 - 1
    denoise = generate.guided_denoiser(network, encoder, diffusion, names, 2.0)
    *_, last = repaint_sampling(denoise, diffusion.schedule, x0, torch.from_numpy(masks[0])[None, None].to(device), steps, **generate.REPAINT,
                       generator=torch.Generator().manual_seed(1))
    seen = [blend(to_pixel_values(x0), picture, mask) for x0, picture, mask in zip(last.x0[:, None], moved, masks)]
    return np.concatenate([dishes, np.stack(seen)[:, :, -pixels:]], axis=2)


def timed(model, autoencoder, size: int, move: str, seconds: float, every_frame: bool) -> dict:
    """One film of FRAMES frames from a name, by our way or by a repaint at every frame; calls: of the network."""
    calls, network = [0], model[0]
    counting = network.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    start = time.perf_counter()
    dish = generate.generate_images(*model, ["番茄炒鸡蛋"], size, autoencoder=autoencoder)[0]
    paint = generate.make_model_inpainter(*model, autoencoder, "番茄炒鸡蛋")
    if every_frame:
        film = [dish]
        while len(film) < FRAMES:
            film.append(paint(*uncover(film[-1], move, max(1, size // FRAMES))))
    else:
        around = generate.make_model_inpainter(*model, autoencoder, "", guidance=1.0)
        film = animate(dish, move, paint, inpaint_around=around, seconds=seconds, fps=round(FRAMES / seconds))
    taken = time.perf_counter() - start
    counting.remove()
    assert len(film) == FRAMES
    return {"side": size, "move": move, "way": WAYS_OF_FILMING[every_frame], "calls": calls[0], "seconds": taken}


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.animate", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds of everything; the figures are not kept")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the demo's trainings and the reader are kept")
    options = parser.parse_args()
    quick, minutes = options.quick, 0.05 if options.quick else 10.0
    count, out = (8, options.out / "quick") if quick else (300, options.out)
    store = presets.prepare_dishes(out / "dishes_64", 300 if quick else presets.DISHES, 64)
    model = presets.build_networks("".join(dish_names("train")))
    presets.train_or_load(*model, store, out / "model_64.safetensors", minutes)
    models, rows = [(64, model, None)], []
    if not quick:
        if not (out / "model_128_latent.safetensors").exists():
            raise SystemExit("run the demo with --latent first: its network is the one for 128×128")
        autoencoder = load_autoencoder(out / "autoencoder_128.safetensors").to(next(model[0].parameters()).device)
        latent_model = presets.build_networks("".join(dish_names("train")), autoencoder)
        presets.train_or_load(*latent_model, None, out / "model_128_latent.safetensors", minutes)
        models.append((128, latent_model, autoencoder))
    for size, some, space in models:
        generate.generate_images(*some, ["番茄炒鸡蛋"], size, steps=2, autoencoder=space)                                 # the first call is slower
        for move in ("right",) if quick else ("right", "circle", "centre", "down-right"):
            rows.append(timed(some, space, size, move, 2.4, every_frame=False))
            print(rows[-1], flush=True)
        rows.append(timed(some, space, size, "right", 2.4, every_frame=True))
        print(rows[-1], flush=True)
    ours, theirs = ([row for row in rows if (row["move"], row["way"]) == ("right", way)][-1] for way in WAYS_OF_FILMING)

    reader = reader_of_frames(out, *((500, 20) if quick else (30_000, 2800)))
    readable = {}
    for at in (0, 32, STEP):
        pictures, names = zip(*[Frames(500, 301, dish_names("held_out"), at)[i] for i in range(50 if quick else 500)])
        readable[at] = prompt_accuracy(reader.exact_matches(torch.stack(pictures), [attributes(name) for name in names]))
    print("the reader reads drawn frames of held-out dishes right:", {at: f"{value:.1%}" for at, value in readable.items()}, flush=True)
    if min(readable.values()) < LEAST_READER_ACCURACY and not quick:
        raise SystemExit(f"below {LEAST_READER_ACCURACY:.0%} it measures nothing")
    names = random.Random(0).sample(dish_names("held_out"), count)
    dishes = generate.generate_images(*model, names, 64, seed=0)
    views = []
    for pixels, steps, stops in ((STEP, 25, (0, 32, STEP)), (32, 25, (32,)), (STEP, 50, (32, STEP))):
        seen = np.concatenate([painted_beside(model, dishes[i:i + 50], names[i:i + 50], pixels, steps) for i in range(0, count, 50)])
        for at in stops:
            view = torch.from_numpy(seen[:, :, at:at + 64].copy()).permute(0, 3, 1, 2)
            right = prompt_accuracy(reader.exact_matches(view, [attributes(name) for name in names]))
            views.append({"painted to (of 64 pixels)": pixels, "steps": steps, "camera gone": at, "drawn frames read right": readable[at],
                          "painted frames read right": right})
            print(views[-1], flush=True)
    finish("animate", {f"seconds_24_frames_{ours['side']}": ours["seconds"], "fewer_calls": theirs["calls"] / ours["calls"],
                       "half_way_fidelity": views[1]["painted frames read right"], "far_fidelity": views[2]["painted frames read right"],
                       "half_a_width_alone_fidelity": views[3]["painted frames read right"],
                       "half_way_fidelity_50_steps": views[4]["painted frames read right"]}, rows, quick, views=views)


if __name__ == "__main__":
    main()
