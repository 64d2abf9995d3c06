"""Inpainting: regenerating a region of an image.

An inpainter is a function (image uint8 [H, W, 3], mask bool [H, W], True = inpaint) → image, which
returns the pixels outside the mask unchanged. The files, in reading order:

    repaint.py                      RePaint: inpaint with a model that was trained on whole images
    latent_repaint.py               the same in the latent space of an autoencoder
    control_inpainter.py            a ControlNet that was trained to inpaint, in a handful of steps
    blending.py                     place an inpainted region into an image without a seam
    stable_diffusion_inpainter.py   Stable Diffusion's inpainting model
    stable_diffusion_pipeline.py    load it with diffusers; convert pickled weights

When the folder is copied into another project, it needs diffusion/, networks/, images.py and
latent_space.py beside it; repaint.py and blending.py alone need only diffusion/. The packages are
torch, numpy, Pillow and safetensors; `make_stable_diffusion_inpainter` and `load_pipeline` also
need diffusers and transformers.
"""

from .blending import blend, check_mask, fill_from_neighbours
from .control_inpainter import inpainting_control, make_control_inpainter
from .latent_repaint import latent_mask, make_latent_inpainter
from .repaint import count_denoiser_calls, make_inpainter, repaint_levels, repaint_sampling
from .stable_diffusion_inpainter import (
    Inpainter,
    make_inpainter_from_networks,
    make_stable_diffusion_inpainter,
)
from .stable_diffusion_pipeline import convert_to_safetensors, load_pipeline

__all__ = [
    "Inpainter",
    "blend",
    "check_mask",
    "convert_to_safetensors",
    "count_denoiser_calls",
    "fill_from_neighbours",
    "inpainting_control",
    "latent_mask",
    "load_pipeline",
    "make_control_inpainter",
    "make_inpainter",
    "make_inpainter_from_networks",
    "make_latent_inpainter",
    "make_stable_diffusion_inpainter",
    "repaint_levels",
    "repaint_sampling",
]
