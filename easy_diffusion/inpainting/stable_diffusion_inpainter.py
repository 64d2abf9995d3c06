"""Repainting a part of a picture with Stable Diffusion's inpainting model: by diffusers' pipeline, and by our own networks.

RePaint (inpaint.py) pastes what is known into every step of a model that knows of no mask. This model was trained with one: its UNet
reads nine channels, the noisy latent, the mask m (1 = repaint) and the latent of the picture without what is hidden,

    input = [z_t, m, E((1 - m) x)]        4 + 1 + 4 channels, at each step;  z_t goes down by DDIM or DPM-Solver++ as ever

so one walk down is enough (Rombach et al., "Latent Diffusion", 2022, section 4.5). A painter is a function (picture uint8 [H, W, 3],
mask bool [H, W], True = repaint) → picture, and the pixels outside the mask come back to the byte. Two things stand between it and
the model, and both painters share them:

    size      the model learned at 512×512: the picture is scaled to as many pixels, its painted part back, and the hidden part is
              rounded up to the squares of f×f pixels that a latent stands for, else it would keep latents of the grey under the mask
    colour    D(E(x)) has slightly other colours than x; `inpaint.blended` takes off what it can measure beside the mask

The file needs torch, numpy, Pillow and safetensors and, beside it, inpaint.py, samplers.py, schedule.py, diffusion.py,
stable_diffusion.py and checkpoint.py; `stable_diffusion_painter` also diffusers and transformers; its example also unet.py, autoencoder.py
and blocks.py.

>>> from .autoencoder import Autoencoder
>>> from .unet import UNet
>>> network, autoencoder = UNet(9, 4, (32, 64), context_dim=16), Autoencoder((32, 32), scale=0.18215)
>>> paint = our_inpainting_painter(network, autoencoder, torch.randn(1, 5, 16), torch.zeros(1, 5, 16), size=32, steps=2)
>>> picture, mask = np.full((20, 37, 3), 200, np.uint8), np.zeros((20, 37), bool)
>>> mask[:, 30:] = True
>>> painted = paint(picture, mask)
>>> painted.shape, bool((painted[~mask] == 200).all())
((20, 37, 3), True)
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from ..diffusion.gaussian import GaussianDiffusion
from ..diffusion.guidance import guided
from ..diffusion.prediction import normal_noise
from ..diffusion.samplers import Step, ddim, dpm_solver, spaced_timesteps
from ..diffusion.schedule import NoiseSchedule
from ..files import atomic_path
from ..networks.stable_diffusion_weights import PARTS, read_stable_diffusion
from .blending import blend, check_mask, to_pixel_values

SAMPLERS = {"ddim": ddim, "dpm_solver": dpm_solver}
Inpainter = Callable[[np.ndarray, np.ndarray], np.ndarray]

# ---------------------------------------------------------------- by diffusers' pipeline


def make_stable_diffusion_inpainter(path, prompt: str, negative: str = "", size: int = 512, steps: int = 50, guidance: float = 7.5,
                             strength: float = 1.0, sampler: str = "ddim", config=None, device=None, dtype=None, offload: bool = False,
                             generator=None, progress: Callable = iter) -> Inpainter:
    """A painter by diffusers' StableDiffusionInpaintPipeline.

    path, config, device, dtype, offload: as for `load_pipeline`; or path is what that returned, for several prompts with one model.
    size: the model works on size² pixels, whatever the picture's shape; it is a multiple of 64 for Stable Diffusion. guidance: 1 is none.
    strength: 1 begins from noise alone; with less, the first steps are left out and it begins from what the picture shows under the
    mask. sampler: "ddim" or "dpm_solver", which needs fewer steps.
    watch wraps each walk's Steps, of latents, and hands them on one by one, as tqdm does; x0 is None, because diffusers does not tell it.
    generator: from the same state the painter below paints the same.
    Raises ValueError for other numbers, and the painter does for a picture or a mask of another form.
    """
    _check_options(steps, guidance, strength, sampler)
    pipe = load_pipeline(path, config, device, dtype, offload) if isinstance(path, (str, Path)) else path
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
    kind, own = {
        "ddim": (DDIMScheduler, dict(set_alpha_to_one=True, clip_sample=False)),
        "dpm_solver": (DPMSolverMultistepScheduler, dict(algorithm_type="dpmsolver++", solver_order=2, use_karras_sigmas=False)),
    }[sampler]
    scheduler = kind.from_config(pipe.scheduler.config, timestep_spacing="trailing", **own)            # its betas, our way of walking

    def repainted(picture, hidden):
        new = []

        def news():
            while new:
                yield new.pop()

        walk = iter(progress(news()))

        def after_a_step(_, index, t, tensors):                             # the pipeline calls, watch wants to be asked: one step each
            new.append(Step(index, int(t), tensors["latents"], None))
            next(walk, None)
            return tensors

        pipe.scheduler = scheduler
        image, white = Image.fromarray(picture), Image.fromarray(hidden.astype(np.uint8) * 255)
        painted = pipe(prompt=prompt, negative_prompt=negative, image=image, mask_image=white, height=image.height, width=image.width,
                       strength=strength, num_inference_steps=steps, guidance_scale=guidance, generator=generator, output_type="np",
                       callback_on_step_end=after_a_step).images[0]
        next(walk, None)                                                    # there is no more: progress bars close
        return painted * 255

    halvings = len(pipe.unet.config.block_out_channels) - 1
    return _make_resizing_inpainter(repainted, size, pipe.vae_scale_factor, halvings)


def load_pipeline(path, config=None, device=None, dtype=None, offload: bool = False):
    """diffusers' StableDiffusionInpaintPipeline from a folder of safetensors, or from one `.safetensors` file of the original. Nothing is
    downloaded and nothing unpickled; there is no safety checker.

    config: for a file, which holds weights alone, a folder with the rest: the JSON files and the tokenizer of the same model.
    device: default the GPU, if there is one. dtype: default float16 on a GPU, float32 on a CPU. offload: of the pipeline's networks only
    the one at work is on the GPU, which needs less of its memory and more time; on a CPU it changes nothing.
    Raises FileNotFoundError, naming all that is missing; ValueError for pickles, naming the way out.
    """
    path, device = Path(path), torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.float16)
    _check_files(path, config)
    from diffusers import StableDiffusionInpaintPipeline
    same = dict(dtype=dtype, local_files_only=True, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    if path.is_dir():
        variant = None if _find_weights(path / "unet", ".safetensors", but=".fp16.") else "fp16"
        pipe = StableDiffusionInpaintPipeline.from_pretrained(path, use_safetensors=True, variant=variant, **same)
    else:
        pipe = StableDiffusionInpaintPipeline.from_single_file(str(path), config=str(config), **same)
    pipe.set_progress_bar_config(disable=True)
    if offload and device.type != "cpu":
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


def convert_to_safetensors(path, to=None) -> Path:
    """Write the weights of a `.ckpt` as one `.safetensors` file, or those of a folder of `.bin` beside each of them, and return where.

    Both are pickles: they are read without calling anything that they name (stable_diffusion.py). to: default the file's own name with
    the other ending. Raises FileNotFoundError, or ValueError for a damaged file or one without UNet, autoencoder and text encoder.
    """
    path, state = Path(path), {}
    for part, (folder, prefix) in PARTS.items():
        tensors = {name: tensor.contiguous() for name, tensor in read_stable_diffusion(path, part).items()}
        if path.is_dir():
            file = "model.safetensors" if part == "text encoder" else "diffusion_pytorch_model.safetensors"
            _save_safetensors(tensors, path / folder / file)
        state |= {prefix + name: tensor for name, tensor in tensors.items()}
    if path.is_dir():
        return path
    to = Path(to or path.with_suffix(".safetensors"))
    _save_safetensors(state, to)
    return to


def _save_safetensors(tensors, path):
    with atomic_path(path) as beside:
        save_file(tensors, beside, {"format": "pt"})


def _check_files(path, config):
    """Before diffusers looks for anything: it would ask the hub, open a pickle, or speak of something else."""
    if not path.exists():
        raise FileNotFoundError(f"no Stable Diffusion at {path}: give a folder as diffusers saves it, or a .safetensors file")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is a pickle, whose opening may run any code: write it once as safetensors, by "
                             f"sd_painter.to_safetensors({str(path)!r}), which runs none")
        if config is None or not Path(config).is_dir():
            raise FileNotFoundError(f"{path} holds weights alone, and config={config!r} is no folder: give config=FOLDER, with the JSON "
                                    "files and the tokenizer of the same model (its folder at diffusers' without the weights)")
    folder, parts = (path, ("unet", "vae", "text_encoder")) if path.is_dir() else (Path(config), ())
    wanted = ["model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"]
    missing = [name for name in wanted if not (folder / name).is_file()]
    missing += ["tokenizer/"] if not (folder / "tokenizer").is_dir() else []
    pickles = [part for part in parts if not _find_weights(folder / part, ".safetensors") and _find_weights(folder / part, ".bin")]
    missing += [f"{part}/*.safetensors" for part in parts if not _find_weights(folder / part, ".safetensors") and part not in pickles]
    if missing:
        raise FileNotFoundError(f"{folder} is no whole folder of Stable Diffusion: it lacks {', '.join(missing)}")
    if pickles:
        raise ValueError(f"the weights of {', '.join(pickles)} in {folder} are pickles, whose opening may run any code: write them once "
                         f"as safetensors, by sd_painter.to_safetensors({str(folder)!r}), which runs none")


def _find_weights(folder, ending, but=None):
    """The weights in a folder that end so."""
    return [file for file in folder.glob(f"*{ending}") if but is None or but not in file.name]


# ---------------------------------------------------------------- by our own networks


def make_inpainter_from_networks(network, autoencoder, states: torch.Tensor, nothing: torch.Tensor, size: int = 512, steps: int = 50,
                           guidance: float = 7.5, strength: float = 1.0, sampler: str = "ddim", diffusion=None, generator=None,
                           progress: Callable = iter) -> Inpainter:
    """The same by a UNet and an Autoencoder of ours, such as `UNet.stable_diffusion_15(9)` and `Autoencoder.stable_diffusion()`, which
    load its weights; it works where they are, in their precision, while the sampler keeps its float32.

    states, nothing [1, L, D]: the text encoder's of the prompt and of the empty or negative one; Stable Diffusion's are [1, 77, 768], by
    transformers' CLIPTextModel (`load_pipeline(path).encode_prompt(prompt, device, 1, True, negative)` gives both).
    diffusion: of the network, default Stable Diffusion 1's, `GaussianDiffusion(NoiseSchedule.scaled_linear(1000), prediction_type="eps")`.
    watch wraps each walk's Steps, of latents. All else as for `stable_diffusion_painter`, with whose weights it paints the same
    (by DDIM if steps divides 1000: of other numbers diffusers rounds where a step begins, but not where it ends).
    """
    _check_options(steps, guidance, strength, sampler)
    latent_channels = autoencoder.settings["latent_channels"]
    if network.conv_in.in_channels != 2 * latent_channels + 1:
        raise ValueError(f"for latents of {latent_channels} channels an inpainting UNet reads {2 * latent_channels + 1}: latent, mask and "
                         f"latent of the masked picture; this one reads {network.conv_in.in_channels}, so RePaint would be its painter")
    diffusion = diffusion or GaussianDiffusion(NoiseSchedule.scaled_linear(1000), prediction_type="eps")
    schedule, device = diffusion.schedule, network.conv_in.weight.device
    timesteps = spaced_timesteps(len(schedule), steps)[steps - int(steps * strength):]

    def encode(x):
        z = autoencoder.eval().encode(x).sample(generator).float()
        return (z - autoencoder.shift) * autoencoder.scale                  # [1, Z, h, w]

    @torch.no_grad()
    def repainted(picture, hidden):
        x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float().to(device) / 127.5 - 1      # [1, 3, H, W]
        m = torch.from_numpy(hidden)[None, None].float().to(device)                                        # [1, 1, H, W]
        z = encode(x) if strength < 1 else None
        shape = (1, latent_channels, *(side // autoencoder.factor for side in hidden.shape))
        z_T = normal_noise(shape, generator, device)
        if strength < 1:
            z_T = diffusion.add_noise(z, torch.tensor(timesteps[:1], device=device), z_T)
        squares = F.max_pool2d(m, autoencoder.factor)                                                      # [1, 1, h, w]
        knows = _ConcatConditioning(network, torch.cat([squares, encode(x * (1 - m))], dim=1))
        denoise = guided(diffusion.denoiser(knows, states.to(device)), diffusion.denoiser(knows, nothing.to(device)), guidance)
        *_, last = progress(SAMPLERS[sampler](denoise, schedule, spacing=timesteps, x_T=z_T))
        return to_pixel_values(autoencoder.decode(last.x / autoencoder.scale + autoencoder.shift))

    return _make_resizing_inpainter(repainted, size, autoencoder.factor, len(network.channels) - 1)


class _ConcatConditioning:
    """A UNet that reads, beside z_t [B, Z, h, w], what is known [1, 1 + Z, h, w]: for diffusion and sampler a network like any other."""

    def __init__(self, network, known):
        self.network, self.known, self.cache_context = network, known, network.cache_context

    def __call__(self, z_t, t, context=None, mask=None):
        return self.network(torch.cat([z_t, self.known.expand(len(z_t), -1, -1, -1)], dim=1), t, context, mask)


# ---------------------------------------------------------------- what both share: numbers, sizes, colours


def _check_options(steps, guidance, strength, sampler):
    if guidance < 1:
        raise ValueError(f"guidance is 1 (none) or more, not {guidance}")
    if not 0 < strength <= 1 or int(steps * strength) < 1:
        raise ValueError(f"strength is more than 0 and at most 1, and steps · strength 1 or more, not {strength} with {steps} steps")
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is one of {', '.join(SAMPLERS)}, not {sampler!r}")


def _make_resizing_inpainter(repainted, size, factor, halvings) -> Inpainter:
    """A painter for pictures of any size from a function (picture uint8 [h, w, 3], hidden bool [h, w]) → floats [h, w, 3] in 0 … 255,
    h and w multiples of factor · 2^halvings, hidden made of squares of factor × factor."""
    multiple = factor * 2 ** halvings
    if size < multiple or size % multiple:
        raise ValueError(f"size is a multiple of {multiple} for this network, not {size}")

    def paint(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if not check_mask(picture, mask).any():
            return picture.copy()
        h, w = compute_working_size(*mask.shape, size, multiple)
        small = resize(picture, h, w, Image.Resampling.BILINEAR).round().astype(np.uint8)
        # Bilinear weights are never negative, so this is 0 exactly where no pixel under the mask has gone into the small picture.
        hidden = resize(mask[..., None], h, w, Image.Resampling.BILINEAR)[..., 0] > 1e-4
        hidden = hidden.reshape(h // factor, factor, w // factor, factor).any(axis=(1, 3)).repeat(factor, 0).repeat(factor, 1)
        painted = resize(repainted(small, hidden), *mask.shape, Image.Resampling.LANCZOS)
        if not np.isfinite(painted).all():
            raise ValueError("the painted picture is not finite: the networks have left the range of their precision, try "
                             "dtype=torch.float32")
        return blend(painted, picture, mask, width=max(8, max(mask.shape) // 16))

    return paint


def compute_working_size(height: int, width: int, size: int, multiple: int) -> tuple[int, int]:
    """(h, w): of the picture's shape, size² pixels in all, both rounded to a multiple, neither less than one."""
    zoom = size / (height * width) ** 0.5
    return tuple(max(1, round(side * zoom / multiple)) * multiple for side in (height, width))


def resize(x: np.ndarray, height: int, width: int, resampling) -> np.ndarray:
    """x [H, W, C], any numbers → float32 [height, width, C] by Pillow, without rounding; x itself where it has that size."""
    x = x.astype(np.float32)
    if x.shape[:2] == (height, width):
        return x
    return np.stack([Image.fromarray(x[..., c]).resize((width, height), resampling) for c in range(x.shape[2])], axis=-1)
