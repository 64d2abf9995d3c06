"""The requests of the local web page: what app.py computes when a button is clicked.

They call the functions of generate.py and animation/ that demo.py calls. The file needs gradio.

>>> check_name("番茄炒鸡蛋"), "番茄炒鸡蛋" in check_name("番茄炒蛋")
('', True)
"""

import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.aipos import load_photo
from datasets.dishes import attributes

from .animation.film import animate, write_film
from .diffusion.samplers import ddim, ddpm, dpm_solver, heun
from .generate import make_model_inpainter, sample_names, to_images
from .images import contact_sheet
from .inpainting.repaint import count_denoiser_calls
from .presets import REPAINT
from .pretrained import Model

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"    # read when gradio is imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
import gradio as gr  # noqa: E402

SAMPLERS = {"DDIM": ddim, "DPM-Solver++": dpm_solver, "DDPM": ddpm, "Heun": heun}
SHOWN = 512             # height and width of the image on the page in pixels; of a film: half of it
NO_IMAGE = "**请先生成一道菜,或上传一张照片。** First generate a dish or upload a photograph."
NO_MASK = "**请先用画笔涂抹要重绘的区域。** First draw on the region to inpaint."
PROGRESS = gr.Progress()    # as a default argument: gradio replaces it with the request's own


def check_name(name: str | None) -> str:
    """Return "" for a dish that the networks know, otherwise a message with similar names."""
    try:
        attributes(name or "")
    except ValueError as error:
        return f"**没有这道菜,请选择相近的菜名。** {error}"
    return ""


def enlarge(image: np.ndarray) -> np.ndarray:
    """Enlarge an image for the page: uint8 [SHOWN, SHOWN, 3]."""
    return np.asarray(Image.fromarray(image).resize((SHOWN, SHOWN), Image.Resampling.BICUBIC))


def read_brush(strokes: dict, size: int) -> np.ndarray:
    """Return the mask of all brush strokes of an ImageEditor's value: bool [size, size]."""
    mask = np.zeros((size, size), bool)
    for layer in strokes["layers"]:
        alpha = Image.fromarray(layer).getchannel("A").resize((size, size))
        mask |= np.asarray(alpha) > 0
    return mask


class Requests:
    """The requests of the page. Each method returns the new contents of the page's components.

    model: for images of `size` pixels. All methods first return a message, "" if all went well.
    An image is uint8 [size, size, 3]; None if there is none yet. A dish is the name of the dish
    that the image shows, "" for a photograph.
    """

    def __init__(self, model: Model, size: int):
        self.model = model
        self.size = size

    def generate(self, name, seed, steps, guidance, sampler, progress=PROGRESS):
        """Generate a dish: (message, image, dish, image in the editor, trajectory)."""
        message = check_name(name)
        if message:
            return message, *[gr.skip()] * 4
        network, encoder, diffusion, autoencoder = self.model
        sampling = sample_names(
            network, encoder, diffusion, [name], self.size, steps, guidance, seed, autoencoder,
            SAMPLERS[sampler],
        )
        path = list(progress.tqdm(sampling, desc=name, total=steps))
        shown = [path[round(i)] for i in np.linspace(0, len(path) - 1, min(8, len(path)))]
        cells = [[to_images(step.x0, autoencoder)[0]] for step in shown]
        strip = contact_sheet(cells, [f"t = {step.t}" for step in shown], columns=8)
        image = to_images(path[-1].x, autoencoder)[0]
        return "", image, name, enlarge(image), strip

    def upload(self, path):
        """Crop and scale a photograph: (message, image, dish, image in the editor)."""
        try:
            image = load_photo(path, self.size)
        except (OSError, ValueError) as error:
            return f"**无法读取这张照片。** {error}", *[gr.skip()] * 3
        return "", image, "", enlarge(image)

    def inpaint(self, image, strokes, name, seed, steps, guidance, progress=PROGRESS):
        """Inpaint what is drawn over: (message, image, image in the editor).

        name: what is inpainted; "" continues the surroundings.
        """
        message = check_name(name) if name else ""
        if not message and image is None:
            message = NO_IMAGE
        elif not message and not read_brush(strokes, self.size).any():
            message = NO_MASK
        if message:
            return message, *[gr.skip()] * 2
        inpaint = self.make_inpainter(name, seed, steps, guidance, progress)
        image = inpaint(image, read_brush(strokes, self.size))
        return "", image, enlarge(image)

    def animate(
        self, image, dish, move, seconds, file_format, seed, steps, guidance, progress=PROGRESS
    ):
        """Make the film of a camera move: (message, GIF or WebP, MP4, file to download)."""
        if image is None:
            return NO_IMAGE, *[gr.skip()] * 3
        frames = animate(
            image,
            move,
            self.make_inpainter(dish, seed, steps, guidance, progress),
            inpaint_around=self.make_inpainter("", seed, steps, guidance, progress),
            seconds=seconds,
            size=(SHOWN // 2, SHOWN // 2),
        )
        path = str(Path(tempfile.mkdtemp()) / f"{dish or 'photograph'}_{move}.{file_format}")
        write_film(path, frames, fps=20)
        is_video = file_format == "mp4"
        animation = gr.update(value=None if is_video else path, visible=not is_video)
        video = gr.update(value=path if is_video else None, visible=is_video)
        return "", animation, video, path

    def make_inpainter(self, name, seed, steps, guidance, progress):
        """Make an inpainter with a progress bar; "" is inpainted without guidance."""
        total = count_denoiser_calls(steps, **REPAINT)
        return make_model_inpainter(
            *self.model,
            name,
            steps,
            guidance if name else 1.0,
            seed + 1,       # not the seed of the dish, see make_model_inpainter
            lambda sampling: progress.tqdm(sampling, desc="重绘 inpainting", total=total),
        )
