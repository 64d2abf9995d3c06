"""Change a dish by its caption: python -m easy_diffusion.edit 番茄炒鸡蛋 --to 番茄炒豆腐

The first argument is the name of a dish, which is generated, or an image file. There are three
methods:

    attention    Prompt-to-Prompt: the layout of the source is kept by keeping its attention. For an
                 image file, DDIM inversion finds the noise from which the model generates it; this
                 needs its caption, --from.
    sdedit       the image is noised by --strength, and denoised with the new caption
    regional     the left half keeps the caption of the source, the right half gets the new one

The files in --out are

    <source>_to_<target>.png        source and result side by side; another method or seed
                                    overwrites it

>>> options = parse_options(["番茄炒鸡蛋", "--to", "番茄炒豆腐", "--size", "64"])
>>> options.source, options.to, options.method
('番茄炒鸡蛋', '番茄炒豆腐', 'attention')
"""

import argparse
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .command_line import check_ranges, run_command
from .command_setup import prepare_command
from .diffusion.guidance import clipped, guided
from .diffusion.prediction import normal_noise
from .diffusion.samplers import ddim
from .editing import ddim_inversion, prompt_to_prompt, regional, sdedit
from .files import write_atomically
from .generate import load_x0, sample_shape, to_images
from .images import contact_sheet, encode_png
from .pretrained import WEIGHTS, Model, find_sizes, load_model
from .training.data_loader import derive_seed

METHODS = ("attention", "sdedit", "regional")
INVERSION_ITERATIONS = 3
SHOWN = 256                     # side of an image on the sheet, in pixels


def parse_options(arguments) -> argparse.Namespace:
    """Parse and check the command line; an invalid option ends the program with a message."""
    parser = argparse.ArgumentParser(
        prog="python -m easy_diffusion.edit",
        description="Change a generated dish, or an image, by its caption.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("source", help="the name of a dish to generate, or an image file")
    parser.add_argument("--to", required=True, metavar="CAPTION", help="caption of the result")
    parser.add_argument(
        "--from", dest="caption", default=argparse.SUPPRESS, metavar="CAPTION",
        help="caption of the source (default: its name)",
    )
    parser.add_argument("--method", choices=METHODS, default=METHODS[0], help="see above")
    parser.add_argument(
        "--cross", type=float, default=0.8,
        help="for attention: fraction of the timesteps that keep the cross-attention, 0 to 1",
    )
    parser.add_argument(
        "--self-attention", type=float, default=0.4,
        help="for attention: fraction of the timesteps that keep the self-attention, 0 to 1",
    )
    parser.add_argument(
        "--strength", type=float, default=0.7,
        help="for sdedit: 0.1 hardly changes the source, 1 leaves nothing of it",
    )
    parser.add_argument("--steps", type=int, default=50, help="number of DDIM steps")
    parser.add_argument(
        "--guidance", type=float, default=2.0, help="scale of classifier-free guidance"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument(
        "--size", type=int, default=argparse.SUPPRESS,
        help="size of the model's images in pixels (default: the largest in --weights)",
    )
    parser.add_argument(
        "--weights", type=Path, default=WEIGHTS, metavar="FOLDER",
        help="folder with the trained networks",
    )
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="FOLDER", help="folder")
    options = parser.parse_args(arguments)
    path = Path(options.source)
    options.image = path if path.is_file() else None
    if options.image is None and (path.suffix or path.exists() or path.name != options.source):
        parser.error(f"there is no image file {options.source}")
    for caption in (options.to, getattr(options, "caption", options.to)):
        if not caption or "/" in caption:
            parser.error(f"a caption has characters and no slash, not {caption!r}")
    if options.method == "regional" and options.image:
        parser.error("--method regional generates an image; it does not take one")
    if hasattr(options, "caption") and not options.image:
        parser.error("--from is for an image file; a generated dish has the caption of its name")
    if not hasattr(options, "size"):
        options.size = max(find_sizes(options.weights), default=None)
    if not hasattr(options, "caption"):
        if options.image and options.method != "sdedit":
            parser.error(f"--method {options.method} needs the caption of the image: --from")
        options.caption = "" if options.image else options.source
    check_ranges(parser, options, {
        "cross": (0, 1),
        "self_attention": (0, 1),
        "strength": (0.02, 1),
        "steps": (2, 1000),
        "guidance": (1, 1000),
        "seed": (0, 2**63 - 1),
    })
    if options.method == "sdedit" and options.strength * options.steps < 1:
        parser.error(
            f"with --steps {options.steps}, --strength must be at least {1 / options.steps:g}"
        )
    return options


def main(arguments=None) -> int:
    """Edit; see the module's docstring. Returns the exit status."""
    options = parse_options(arguments)
    prepare_command(options.out)
    warnings.formatwarning = lambda message, *_: f"note: {message}\n"
    model = load_model(options.weights, options.size)
    source, result = edit(options, model)
    name = options.image.stem if options.image else options.source
    path = options.out / f"{name}_to_{options.to}.png"
    images = to_images(torch.cat([source, result]), model.autoencoder)
    captions = [options.caption or name, options.to]
    sheet = contact_sheet([[image] for image in images], captions, columns=2, side=SHOWN)
    write_atomically(path, encode_png(sheet))
    print(f"wrote {path}")
    return 0


class Editor:
    """The methods with one model; x are images [B, 3, H, W] in [-1, 1], or latents [B, Z, h, w].

    steps: of DDIM. guidance: scale of classifier-free guidance.
    progress: wraps the steps of a sampler, for example tqdm.
    """

    def __init__(self, model: Model, steps: int, guidance: float, progress=iter):
        self.network, self.encoder, self.diffusion, self.autoencoder = model
        self.schedule = self.diffusion.schedule
        self.steps = steps
        self.guidance = guidance
        self.progress = progress

    def denoiser(self, captions: list[str]):
        return self.diffusion.denoiser(self.network, *self.encoder(captions))

    def guide(self, denoise, uncond=None):
        """Guidance against the denoiser `uncond`, by default that of the empty caption."""
        uncond = self.denoiser([""]) if uncond is None else uncond
        return self.clip(guided(denoise, uncond, self.guidance))

    def clip(self, denoise):
        """Clip the predictions of images, not those of latents."""
        return denoise if self.autoencoder is not None else clipped(denoise, self.schedule)

    @torch.no_grad()
    def run(self, sampling):
        *_, last = self.progress(sampling)
        return last.x

    def sample(self, denoise, x_T, spacing="trailing"):
        return self.run(
            ddim(denoise, self.schedule, steps=self.steps, spacing=spacing, x_T=x_T)
        )

    def sdedit(self, x0, captions: list[str], strength: float, seed: int = 0):
        """seed: of the first image; the next ones have seed + 1, seed + 2, …"""
        generator = [torch.Generator().manual_seed(seed + i) for i in range(len(x0))]
        denoise = self.guide(self.denoiser(captions))
        return self.run(
            sdedit(denoise, self.schedule, x0, strength, self.steps, generator=generator)
        )

    def left_and_right(self, left: str, right: str, x_T):
        """Sample the left half of the image with one caption, the right half with another."""
        width = x_T.shape[3]
        masks = torch.zeros(2, 1, *x_T.shape[2:], device=x_T.device)
        masks[0, ..., :width // 2] = masks[1, ..., width // 2:] = 1
        both = regional([self.denoiser([left]), self.denoiser([right])], masks)
        return self.sample(self.guide(both), x_T)

    def invert(self, x0, caption: str, iterations: int = INVERSION_ITERATIONS):
        """The noise x_T of x0, for `reconstruct` and `swap_inverted`."""
        return self.run(ddim_inversion(
            self.clip(self.denoiser([caption])), self.schedule, x0, self.steps, iterations
        ))

    def reconstruct(self, x_T, caption: str):
        """Sample the image whose inverted noise is x_T again, without guidance."""
        return self.sample(self.clip(self.denoiser([caption])), x_T, "uniform")

    def keep_attention(self, source: str, target: str, cross: float, self_attention: float):
        return prompt_to_prompt(
            self.network, self.diffusion, self.encoder, source, target, cross, self_attention
        )

    def swap(self, x_T, source: str, target: str, kept: tuple[float, float]):
        """Sample the source and, with its layout, the target from x_T [1, C, H, W]: [2, C, H, W].

        kept: fractions of the timesteps that keep cross-attention and self-attention.
        """
        denoise = self.guide(self.keep_attention(source, target, *kept))
        return self.sample(denoise, x_T.expand(2, -1, -1, -1))

    def swap_inverted(self, x_T, source: str, target: str, kept: tuple[float, float] | None):
        """Sample the target from the inverted noise of the source; kept: see `swap`, or None.

        From this noise the source's caption alone leads back to the image. It therefore takes the
        place of the unconditional caption.
        """
        as_source = self.denoiser([source])
        if kept is None:
            denoise = self.guide(self.denoiser([target]), as_source)
            return self.sample(denoise, x_T, "uniform")
        denoise = self.guide(self.keep_attention(source, target, *kept), as_source)
        return self.sample(denoise, x_T.expand(2, -1, -1, -1), "uniform")[1:]


@torch.no_grad()
def edit(options, model: Model) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (source, result), x of `Editor` with B = 1."""
    bar = partial(tqdm, desc=options.to, unit="step", leave=False)
    editor = Editor(model, options.steps, options.guidance, bar)
    device = model.network.conv_in.weight.device
    shape = (1, *sample_shape(options.size, model.autoencoder))
    noise = normal_noise(shape, torch.Generator().manual_seed(options.seed), device)
    kept = options.cross, options.self_attention

    if options.method == "attention" and not options.image:
        return editor.swap(noise, options.caption, options.to, kept).split(1)
    if options.image:
        source = load_x0(options.image, options.size, model.autoencoder)[None].to(device)
    else:
        source = editor.sample(editor.guide(editor.denoiser([options.caption])), noise)
    if options.method == "sdedit":
        # Another seed than that of the source, which its own noise would lead back to
        seed = derive_seed(options.seed, "sdedit")
        return source, editor.sdedit(source, [options.to], options.strength, seed)
    if options.method == "regional":
        return source, editor.left_and_right(options.caption, options.to, noise)
    x_T = editor.invert(source, options.caption)
    return source, editor.swap_inverted(x_T, options.caption, options.to, kept)


if __name__ == "__main__":
    sys.exit(run_command(main))
