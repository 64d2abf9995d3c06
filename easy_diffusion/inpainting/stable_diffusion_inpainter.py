"""Stable Diffusion's inpainting model: with diffusers' pipeline, and with our own networks.

RePaint (repaint.py) inpaints with a model that was trained on whole images. Stable Diffusion's
inpainting model was trained with masks. Its UNet has nine input channels: the noisy latent z_t, the
mask m (1 = inpaint), and the latent of the image x without the masked pixels,

    input = [z_t, m, E((1 - m) x)]                      4 + 1 + 4 channels, in every step

so that one sampling loop of DDIM or DPM-Solver++ suffices (Rombach et al., "High-Resolution Image
Synthesis with Latent Diffusion Models", 2022, section 4.5). There are two ways to run it:

    make_stable_diffusion_inpainter     diffusers' inpainting pipeline
    make_inpainter_from_networks        a UNet and an Autoencoder of networks/; the same result

Both return an inpainter: a function (image uint8 [H, W, 3], mask bool [H, W], True = inpaint) →
image, which returns the pixels outside the mask unchanged. They share two adjustments:

- Size. The model was trained on 512×512 pixels. The image is resized to about as many pixels, and
  the inpainted region is resized back. The mask is enlarged to whole squares of f×f pixels, one per
  latent; otherwise the model would keep latents at its edge that encode masked, grey pixels.
- Colour. D(E(x)) differs slightly from x; `blend` corrects the difference (blending.py).

The file needs torch, numpy, Pillow and safetensors, blending.py and stable_diffusion_pipeline.py
beside it, and diffusion/ and networks/. `make_stable_diffusion_inpainter` also needs diffusers and
transformers.

>>> from ..networks.autoencoder import Autoencoder
>>> from ..networks.unet import UNet
>>> network = UNet(9, 4, (32, 64), context_dim=16)
>>> autoencoder = Autoencoder((32, 32), scale=0.18215)
>>> context = torch.randn(1, 5, 16)
>>> uncond_context = torch.zeros(1, 5, 16)
>>> inpaint = make_inpainter_from_networks(
...     network, autoencoder, context, uncond_context, size=32, steps=2
... )
>>> image = np.full((20, 37, 3), 200, np.uint8)
>>> mask = np.zeros((20, 37), bool)
>>> mask[:, 30:] = True
>>> result = inpaint(image, mask)
>>> result.shape, bool((result[~mask] == 200).all())
((20, 37, 3), True)
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..diffusion.gaussian import GaussianDiffusion
from ..diffusion.guidance import guided
from ..diffusion.prediction import normal_noise
from ..diffusion.samplers import Step, ddim, dpm_solver, spaced_timesteps
from ..diffusion.schedule import NoiseSchedule
from ..networks.fast_unet import make_fast
from .blending import blend, check_mask, from_pixel_values, to_pixel_values
from .stable_diffusion_pipeline import load_pipeline

SAMPLERS = {"ddim": ddim, "dpm_solver": dpm_solver}
Inpainter = Callable[[np.ndarray, np.ndarray], np.ndarray]

# ---------------------------------------------------------------- with diffusers' pipeline


def make_stable_diffusion_inpainter(
    path,
    prompt: str,
    negative_prompt: str = "",
    size: int = 512,
    steps: int = 50,
    guidance: float = 7.5,
    strength: float = 1.0,
    sampler: str = "ddim",
    config=None,
    device=None,
    dtype=None,
    offload: bool = False,
    generator=None,
    progress: Callable = iter,
) -> Inpainter:
    """Make an inpainter that runs diffusers' StableDiffusionInpaintPipeline.

    path: of the weights, as for `load_pipeline`; or a pipeline that `load_pipeline` returned, to
        use one model with several prompts.
    size: the model works on about size² pixels in the aspect ratio of the image; a multiple of 64
        for Stable Diffusion.
    steps: sampling steps.
    guidance: scale of classifier-free guidance; 1 means no guidance.
    strength: fraction of the steps that are run, above 0 and at most 1. 1 starts from noise alone;
        less starts from the image, including its masked pixels, with noise added.
    sampler: "ddim" or "dpm_solver", which needs fewer steps.
    config, device, dtype, offload: see `load_pipeline`.
    generator: torch.Generator of the noise. From the same state, `make_inpainter_from_networks`
        gives the same result.
    progress: wraps the sampling loop's Steps, for example tqdm, and must pass them on one by one.
        Their x is the latent; their x0 is None, because the pipeline does not return it.

    Raises ValueError for arguments out of range. The inpainter raises ValueError for an image or
    mask of the wrong shape or dtype.
    """
    _check_options(steps, guidance, strength, sampler)
    if isinstance(path, (str, Path)):
        pipe = load_pipeline(path, config, device, dtype, offload)
    else:
        pipe = path

    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    # The pipeline's own betas, with the samplers and the timestep spacing of diffusion/samplers.py.
    scheduler_class, options = {
        "ddim": (
            DDIMScheduler,
            dict(set_alpha_to_one=True, clip_sample=False),
        ),
        "dpm_solver": (
            DPMSolverMultistepScheduler,
            dict(algorithm_type="dpmsolver++", solver_order=2, use_karras_sigmas=False),
        ),
    }[sampler]
    scheduler = scheduler_class.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", **options
    )

    def inpaint_resized(image, mask):
        # The pipeline calls a function after each step, but `progress` wraps an iterable. So each
        # call makes its Step available to the iterable, and takes it out through `progress`.
        available = []

        def available_steps():
            while available:
                yield available.pop()

        observed_steps = iter(progress(available_steps()))

        def report_step(_, index, t, tensors):
            available.append(Step(index, int(t), tensors["latents"], None))
            next(observed_steps, None)
            return tensors

        pipe.scheduler = scheduler
        height, width = mask.shape
        output = pipe(
            prompt=prompt,
            negative_prompt=negative_prompt,
            image=Image.fromarray(image),
            mask_image=Image.fromarray(mask.astype(np.uint8) * 255),
            height=height,
            width=width,
            strength=strength,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generator,
            output_type="np",
            callback_on_step_end=report_step,
        )
        next(observed_steps, None)      # the end of the iterable closes a progress bar
        return output.images[0] * 255

    downsamplings = len(pipe.unet.config.block_out_channels) - 1
    return _make_resizing_inpainter(inpaint_resized, size, pipe.vae_scale_factor, downsamplings)


# ---------------------------------------------------------------- with our own networks


def make_inpainter_from_networks(
    network,
    autoencoder,
    context: torch.Tensor,
    uncond_context: torch.Tensor,
    size: int = 512,
    steps: int = 50,
    guidance: float = 7.5,
    strength: float = 1.0,
    sampler: str = "ddim",
    diffusion=None,
    generator=None,
    progress: Callable = iter,
) -> Inpainter:
    """Make an inpainter from a UNet and an Autoencoder of networks/.

    network: UNet with nine input channels, such as `UNet.stable_diffusion_15(9)` with its weights
        loaded. It runs on the device and in the dtype of its weights; the sampler computes in
        float32.
    autoencoder: such as `Autoencoder.stable_diffusion()`, on the same device.
    context: [1, L, D], token embeddings of the prompt; [1, 77, 768] for Stable Diffusion.
    uncond_context: [1, L, D], token embeddings of the empty or negative prompt. Both are returned
        by `load_pipeline(path).encode_prompt(prompt, device, 1, True, negative_prompt)`.
    diffusion: default Stable Diffusion 1's,
        `GaussianDiffusion(NoiseSchedule.scaled_linear(1000), prediction_type="eps")`.
    progress: wraps the sampling loop's Steps, for example tqdm. Their x is the latent.

    size, steps, guidance, strength, sampler, generator and errors: see
    `make_stable_diffusion_inpainter`. With the same weights, both give the same result. For DDIM
    this needs a number of steps that divides 1000; for others, diffusers rounds the timestep at
    which a step begins, but not that at which it ends.
    """
    _check_options(steps, guidance, strength, sampler)
    latent_channels = autoencoder.settings["latent_channels"]
    in_channels = network.conv_in.in_channels
    if in_channels != 2 * latent_channels + 1:
        raise ValueError(
            f"for latents of {latent_channels} channels an inpainting UNet has "
            f"{2 * latent_channels + 1} input channels (latent, mask, latent of the masked image), "
            f"and this one has {in_channels}. To inpaint with it, use RePaint (repaint.py)"
        )
    if diffusion is None:
        diffusion = GaussianDiffusion(NoiseSchedule.scaled_linear(1000), prediction_type="eps")
    schedule = diffusion.schedule
    device = network.conv_in.weight.device
    first_step = steps - int(steps * strength)          # strength < 1 leaves out the first steps
    timesteps = spaced_timesteps(len(schedule), steps)[first_step:]

    def encode(x):
        z = autoencoder.eval().encode(x).sample(generator).float()
        return (z - autoencoder.shift) * autoencoder.scale                  # [1, Z, h, w]

    @torch.no_grad()
    def inpaint_resized(image, mask):
        x = from_pixel_values(image).to(device)                             # [1, 3, H, W]
        m = torch.from_numpy(mask)[None, None].float().to(device)           # [1, 1, H, W]

        # The latent to start from: noise, or the image with noise added.
        if strength < 1:
            z = encode(x)
        h, w = (side // autoencoder.factor for side in mask.shape)
        z_T = normal_noise((1, latent_channels, h, w), generator, device)
        if strength < 1:
            t = torch.tensor(timesteps[:1], device=device)
            z_T = diffusion.add_noise(z, t, z_T)

        # The UNet's other input channels: [m, E((1 - m) x)].
        latent_mask = F.max_pool2d(m, autoencoder.factor)                   # [1, 1, h, w]
        conditioning = torch.cat([latent_mask, encode(x * (1 - m))], dim=1)     # [1, 1 + Z, h, w]
        inpainting_network = _ConcatConditioning(make_fast(network), conditioning)

        denoise = guided(
            diffusion.denoiser(inpainting_network, context.to(device)),
            diffusion.denoiser(inpainting_network, uncond_context.to(device)),
            guidance,
        )
        sampling = SAMPLERS[sampler](denoise, schedule, spacing=timesteps, x_T=z_T)
        *_, last = progress(sampling)
        decoded = autoencoder.decode(last.x / autoencoder.scale + autoencoder.shift)
        return to_pixel_values(decoded)

    downsamplings = len(network.channels) - 1
    return _make_resizing_inpainter(inpaint_resized, size, autoencoder.factor, downsamplings)


class _ConcatConditioning:
    """A network that appends conditioning channels [1, 1 + Z, h, w] to its input z_t [B, Z, h, w].

    Diffusion and samplers can then treat an inpainting UNet like any other network.
    """

    def __init__(self, network, conditioning):
        self.network = network
        self.conditioning = conditioning
        if hasattr(network, "cache_context"):
            self.cache_context = network.cache_context

    def __call__(self, z_t, t, context=None, mask=None):
        conditioning = self.conditioning.expand(len(z_t), -1, -1, -1)
        return self.network(torch.cat([z_t, conditioning], dim=1), t, context, mask)


# ---------------------------------------------------------------- options and sizes, for both


def _check_options(steps, guidance, strength, sampler):
    if guidance < 1:
        raise ValueError(f"guidance must be at least 1 (no guidance), not {guidance}")
    if not 0 < strength <= 1 or int(steps * strength) < 1:
        raise ValueError(
            "strength must be above 0 and at most 1, and steps · strength at least 1, "
            f"not {strength} with {steps} steps"
        )
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, not {sampler!r}")


def _make_resizing_inpainter(inpaint_resized, size, factor, downsamplings) -> Inpainter:
    """Make an inpainter for images of any size from a function for the model's sizes.

    inpaint_resized: (image uint8 [h, w, 3], mask bool [h, w]) → float [h, w, 3] in 0 … 255, where
        h and w are multiples of factor · 2^downsamplings and the mask consists of whole squares
        of factor × factor pixels.
    size: the model works on about size² pixels.
    factor: pixels per latent in each direction.
    downsamplings: how often the UNet halves the latent.
    """
    multiple = factor * 2**downsamplings
    if size < multiple or size % multiple:
        raise ValueError(f"size must be a multiple of {multiple} for this network, not {size}")

    def inpaint(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if not check_mask(image, mask).any():
            return image.copy()
        height, width = mask.shape

        # Resize to the model's size. A resized pixel is masked if any masked pixel contributes to
        # it: bilinear weights are never negative, so its resized mask is then above 0.
        h, w = compute_working_size(height, width, size, multiple)
        resized_image = resize(image, h, w, Image.Resampling.BILINEAR).round().astype(np.uint8)
        resized_mask = resize(mask[..., None], h, w, Image.Resampling.BILINEAR)[..., 0] > 1e-4

        # Enlarge the mask to whole squares of factor × factor pixels.
        squares = resized_mask.reshape(h // factor, factor, w // factor, factor)
        masked_latents = squares.any(axis=(1, 3))                           # [h / f, w / f]
        resized_mask = masked_latents.repeat(factor, axis=0).repeat(factor, axis=1)

        # Inpaint, resize back and blend.
        inpainted = inpaint_resized(resized_image, resized_mask)
        inpainted = resize(inpainted, height, width, Image.Resampling.LANCZOS)
        if not np.isfinite(inpainted).all():
            raise ValueError(
                "the inpainted image has values that are not finite: the networks overflow "
                "in their precision, try dtype=torch.float32"
            )
        return blend(inpainted, image, mask, width=max(8, max(height, width) // 16))

    return inpaint


def compute_working_size(height: int, width: int, size: int, multiple: int) -> tuple[int, int]:
    """Compute the height and width at which the model works, for an image of any size.

    They have about size² pixels and the aspect ratio of the image, rounded to multiples of
    `multiple` (at least one).
    """
    scale = size / (height * width) ** 0.5
    return tuple(max(1, round(side * scale / multiple)) * multiple for side in (height, width))


def resize(x: np.ndarray, height: int, width: int, resampling) -> np.ndarray:
    """Resize an array [H, W, C] to float32 [height, width, C] with Pillow, without rounding.

    resampling: one of Pillow's `Image.Resampling`. An array that has this size is only converted.
    """
    x = x.astype(np.float32)
    if x.shape[:2] == (height, width):
        return x
    channels = [
        Image.fromarray(x[..., c]).resize((width, height), resampling)
        for c in range(x.shape[2])
    ]
    return np.stack(channels, axis=-1)
