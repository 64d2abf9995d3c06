"""Load diffusers' inpainting pipeline from disk, and convert pickled weights to safetensors.

Stable Diffusion is published as a folder in diffusers' layout, or as a single file. The weights are
safetensors or pickles; a pickle can run code when it is opened.

    load_pipeline             safetensors → StableDiffusionInpaintPipeline; refuses pickles
    convert_to_safetensors    pickles → safetensors, without running their code

Nothing is downloaded. The file needs torch, safetensors and networks/; `load_pipeline` also needs
diffusers and transformers.

>>> load_pipeline("nowhere")  # doctest: +ELLIPSIS
Traceback (most recent call last):
FileNotFoundError: no Stable Diffusion at nowhere: give a folder in diffusers' layout...
"""

from pathlib import Path

import torch

from ..networks.stable_diffusion_weights import (
    PARTS,
    PIPELINE_PARTS,
    read_stable_diffusion,
)
from ..networks.weights_io import save_tensors


def load_pipeline(path, config=None, device=None, dtype=None, offload: bool = False):
    """Load diffusers' StableDiffusionInpaintPipeline from disk, without the safety checker.

    Nothing is downloaded, and no pickle is opened.

    path: a folder in diffusers' layout with safetensors, or one `.safetensors` file in the layout
        of the original Stable Diffusion.
    config: for a single file, which holds only weights: a folder with the JSON files and the
        tokenizer of the same model.
    device: default the GPU if there is one, else the CPU.
    dtype: default float16 on a GPU, float32 on a CPU.
    offload: keep only the network that is running on the GPU. It needs less GPU memory and more
        time, and has no effect on a CPU.

    Raises FileNotFoundError with a list of what is missing, and ValueError for pickles.
    """
    path = Path(path)
    if device is None and torch.cuda.is_available():
        device = "cuda"
    elif device is None:
        device = "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.float16)
    _check_files(path, config)

    from diffusers import StableDiffusionInpaintPipeline

    options = dict(
        dtype=dtype,
        local_files_only=True,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    if path.is_dir():
        has_full_precision = _find_weights(path / "unet", ".safetensors", exclude=".fp16.")
        pipe = StableDiffusionInpaintPipeline.from_pretrained(
            path,
            use_safetensors=True,
            variant=None if has_full_precision else "fp16",
            **options,
        )
    else:
        pipe = StableDiffusionInpaintPipeline.from_single_file(
            str(path), config=str(config), **options
        )
    pipe.set_progress_bar_config(disable=True)
    if offload and device.type != "cpu":
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


def convert_to_safetensors(path, to=None) -> Path:
    """Convert pickled Stable Diffusion weights to safetensors; no code of the pickles is run.

    path: a `.ckpt` file, which becomes one `.safetensors` file; or a folder in diffusers' layout,
        where each `.bin` file gets a `.safetensors` file beside it.
    to: output file for a `.ckpt`, by default the same name with the ending `.safetensors`.

    Returns the path of the file or folder. Raises FileNotFoundError, or ValueError for a damaged
    file or one without UNet, autoencoder or text encoder.
    """
    path = Path(path)
    state_dict = {}
    for part in PIPELINE_PARTS:
        folder, prefix = PARTS[part]
        tensors = {
            name: tensor.contiguous()
            for name, tensor in read_stable_diffusion(path, part).items()
        }
        if path.is_dir():
            if part == "text encoder":
                file = "model.safetensors"
            else:
                file = "diffusion_pytorch_model.safetensors"
            save_tensors(path / folder / file, tensors)
        state_dict |= {prefix + name: tensor for name, tensor in tensors.items()}
    if path.is_dir():
        return path
    to = Path(to or path.with_suffix(".safetensors"))
    save_tensors(to, state_dict)
    return to


def _check_files(path, config):
    """Raise an error that names what is missing or pickled.

    Without this check diffusers would try to download missing files, or open the pickles.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"no Stable Diffusion at {path}: give a folder in diffusers' layout, "
            "or a .safetensors file"
        )
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(
                f"{path} is a pickle, which can run code when it is opened: convert it once with "
                f"stable_diffusion_pipeline.convert_to_safetensors({str(path)!r}), "
                "which runs none of it"
            )
        if config is None or not Path(config).is_dir():
            raise FileNotFoundError(
                f"{path} holds only weights, and config={config!r} is not a folder: "
                "give config=FOLDER with the JSON files and the tokenizer of the same model "
                "(a folder in diffusers' layout without the weights)"
            )

    # A single file holds all weights; a folder must have those of each part.
    if path.is_dir():
        folder = path
        parts = ("unet", "vae", "text_encoder")
    else:
        folder = Path(config)
        parts = ()
    required = [
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
    ]
    missing = [name for name in required if not (folder / name).is_file()]
    if not (folder / "tokenizer").is_dir():
        missing.append("tokenizer/")
    pickled = []
    for part in parts:
        if _find_weights(folder / part, ".safetensors"):
            continue
        if _find_weights(folder / part, ".bin"):
            pickled.append(part)
        else:
            missing.append(f"{part}/*.safetensors")
    if missing:
        raise FileNotFoundError(
            f"{folder} is not a complete Stable Diffusion: it lacks {', '.join(missing)}"
        )
    if pickled:
        raise ValueError(
            f"the weights of {', '.join(pickled)} in {folder} are pickles, which can run code when "
            "they are opened: convert them once with "
            f"stable_diffusion_pipeline.convert_to_safetensors({str(folder)!r}), "
            "which runs none of it"
        )


def _find_weights(folder, ending, exclude=None):
    """The files in a folder with this ending, without those that have `exclude` in their name."""
    return [
        file
        for file in folder.glob(f"*{ending}")
        if exclude is None or exclude not in file.name
    ]
