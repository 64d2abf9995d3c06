"""Change a dish by its caption: python -m easy_diffusion.edit 番茄炒鸡蛋 --to 番茄炒豆腐

The first argument is the name of a dish, which is generated, or an image file. There are three
methods:

    attention    Prompt-to-Prompt: the layout of the source is kept by keeping its attention. For an
                 image file, DDIM inversion finds the noise from which the model generates it; this
                 needs its caption, --from.
    sdedit       the image is noised by --strength, and denoised with the new caption
    regional     the left half keeps the caption of the source, the right half gets the new one

The files in --out are

    <source>_to_<target>.png        source and result side by side

>>> options = parse_options(["番茄炒鸡蛋", "--to", "番茄炒豆腐", "--size", "64"])
>>> options.source, options.to, options.method
('番茄炒鸡蛋', '番茄炒豆腐', 'attention')
"""

import argparse
import sys
import warnings
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .command_line import check_ranges, check_writable, run_command
from .diffusion.guidance import clipped, guided
from .diffusion.prediction import normal_noise
from .diffusion.samplers import ddim
from .editing import ddim_inversion, prompt_to_prompt, regional, sdedit
from .files import write_atomically
from .generate import load_x0, to_images
from .images import contact_sheet, encode_png, load_chinese_font
from .pretrained import WEIGHTS, Model, find_sizes, load_model
from .training.distributed import check_gpu

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
    options.image = Path(options.source) if Path(options.source).is_file() else None
    if not hasattr(options, "size"):
        options.size = max(find_sizes(options.weights), default=None)
    if not hasattr(options, "caption"):
        if options.image and options.method != "sdedit":
            parser.error(f"--method {options.method} needs the caption of the image: --from")
        options.caption = "" if options.image else options.source
    if options.method == "regional" and options.image:
        parser.error("--method regional generates an image; it does not take one")
    check_ranges(parser, options, {
        "cross": (0, 1),
        "self_attention": (0, 1),
        "strength": (0.02, 1),
        "steps": (2, 1000),
        "guidance": (1, 1000),
        "seed": (0, 2**63 - 1),
    })
    return options


def main(arguments=None) -> int:
    """Edit; see the module's docstring. Returns the exit status."""
    options = parse_options(arguments)
    check_gpu()
    check_writable(options.out)
    load_chinese_font(12)       # raises here, rather than at the end, if there is no font
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


@torch.no_grad()
def edit(options, model: Model) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (source, result), images [1, 3, H, W] in [-1, 1], or latents [1, Z, h, w]."""
    network, encoder, diffusion, autoencoder = model
    device = network.conv_in.weight.device
    schedule = diffusion.schedule

    def make_denoiser(caption):
        return diffusion.denoiser(network, *encoder([caption]))

    def guide(denoise, uncond):
        denoise = guided(denoise, uncond, options.guidance)
        return denoise if autoencoder is not None else clipped(denoise, schedule)

    def run(sampling):
        *_, last = tqdm(sampling, desc=options.to, unit="step", leave=False)
        return last.x

    if options.image:
        source = load_x0(options.image, options.size, autoencoder)[None].to(device)
        shape = source.shape
    else:
        channels, side = network.settings["in_channels"], options.size
        if autoencoder is not None:
            side = options.size // autoencoder.factor
        shape = (1, channels, side, side)
    noise = normal_noise(shape, torch.Generator().manual_seed(options.seed), device)
    plain = guide(make_denoiser(options.caption), make_denoiser(""))
    if not options.image:
        source = run(ddim(plain, schedule, steps=options.steps, x_T=noise))

    if options.method == "sdedit":
        denoise = guide(make_denoiser(options.to), make_denoiser(""))
        generator = torch.Generator().manual_seed(options.seed)
        return source, run(
            sdedit(denoise, schedule, source, options.strength, options.steps, generator=generator)
        )
    if options.method == "regional":
        masks = torch.zeros(2, 1, *shape[2:], device=device)
        masks[0, ..., :shape[3] // 2] = masks[1, ..., shape[3] // 2:] = 1
        denoise = regional([plain, guide(make_denoiser(options.to), make_denoiser(""))], masks)
        return source, run(ddim(denoise, schedule, steps=options.steps, x_T=noise))

    both = prompt_to_prompt(
        network, diffusion, encoder, options.caption, options.to, options.cross,
        options.self_attention,
    )
    if not options.image:
        denoise = guide(both, make_denoiser(""))
        x = run(ddim(denoise, schedule, steps=options.steps, x_T=noise.expand(2, -1, -1, -1)))
        return x[:1], x[1:]
    # From the inverted noise the source's caption alone leads back to the image. It therefore takes
    # the place of the unconditional caption.
    inversion = ddim_inversion(
        make_denoiser(options.caption), schedule, source, options.steps, INVERSION_ITERATIONS
    )
    x_T = run(inversion).expand(2, -1, -1, -1)
    denoise = guide(both, make_denoiser(options.caption))
    x = run(ddim(denoise, schedule, steps=options.steps, spacing="uniform", x_T=x_T))
    return source, x[1:]


if __name__ == "__main__":
    sys.exit(run_command(main))
