"""Stable Diffusion's weights, in and out: the same tensors go by three names.

    ours                    diffusers                              the original file
    down.0.0.conv1.weight   down_blocks.0.resnets.0.conv1.weight   model.diffusion_model.input_blocks.1.0.in_layers.2.weight

Published weights come as a folder of diffusers (safetensors) or as one file of the original (`.ckpt`, which is a pickle, or
`.safetensors`), in which the UNet's names begin with `model.diffusion_model.`, the autoencoder's with `first_stage_model.` and the text
encoder's with `cond_stage_model.transformer.`. `load` takes any of these, `save` writes a folder that diffusers loads, or a single file.
The tables below are the whole difference; no tensor is changed but for the autoencoder's attention, which older files keep as 1×1
convolutions. A pickle is read without calling anything that it names. The file needs torch and safetensors and, beside it, checkpoint.py;
its example also unet.py, blocks.py and autoencoder.py.

>>> import tempfile
>>> from .unet import UNet
>>> network, folder = UNet(channels=(32, 64), context_dim=16), tempfile.mkdtemp()
>>> save(network, folder)
>>> load(UNet(channels=(32, 64), context_dim=16), folder)
"""

import json
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from .weights_io import load_weights, open_tensors, replacing

PARTS = {"UNet": ("unet", "model.diffusion_model."), "Autoencoder": ("vae", "first_stage_model."),
         "text encoder": ("text_encoder", "cond_stage_model.transformer.text_model.")}

# ---------------------------------------------------------------- names inside a block: ours, diffusers', the original's
RESIDUAL = [("norm1", "norm1", "in_layers.0"), ("conv1", "conv1", "in_layers.2"), ("time", "time_emb_proj", "emb_layers.1"),
            ("norm2", "norm2", "out_layers.0"), ("conv2", "conv2", "out_layers.3"), ("shortcut", "conv_shortcut", "skip_connection")]
TRANSFORMER = [("norm", "norm", "norm"), ("proj_in", "proj_in", "proj_in"), ("proj_out", "proj_out", "proj_out")] + [
    (f"block.{ours}", *2 * (f"transformer_blocks.0.{theirs}",)) for ours, theirs in [
        ("norm1", "norm1"), ("norm2", "norm2"), ("norm3", "norm3"),
        ("feed_forward.into", "ff.net.0.proj"), ("feed_forward.out", "ff.net.2")] + [
        (f"{ours}.{part}", f"{theirs}.{part}{'.0' if part == 'to_out' else ''}")
        for ours, theirs in (("self_attention", "attn1"), ("cross_attention", "attn2")) for part in ("to_q", "to_k", "to_v", "to_out")]]
AUTOENCODER_RESIDUAL = [(name, name, name) for name in ("norm1", "conv1", "norm2", "conv2")] + [
    ("shortcut", "conv_shortcut", "nin_shortcut")]
AUTOENCODER_ATTENTION = [("norm", "group_norm", "norm"), ("attention.to_q", "to_q", "q"), ("attention.to_k", "to_k", "k"),
                            ("attention.to_v", "to_v", "v"), ("attention.to_out", "to_out.0", "proj_out")]
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}      # diffusers' of before 2023


def map_unet_names(network) -> list[tuple[str, str, str]]:
    """(ours, diffusers', the original's) of each module of a UNet that holds tensors."""
    a_level, names = network.blocks + 1, [
        ("conv_in", "conv_in", "input_blocks.0.0"), ("time.0", "time_embedding.linear_1", "time_embed.0"),
        ("time.2", "time_embedding.linear_2", "time_embed.2"), ("norm_out", "conv_norm_out", "out.0"), ("conv_out", "conv_out", "out.2")]

    def add(ours, theirs, original, table):
        names.extend((f"{ours}.{a}", f"{theirs}.{b}", f"{original}.{c}") for a, b, c in table)

    for n, parts in enumerate(network.down):
        level, j = divmod(n, a_level)
        if j == network.blocks:
            add(f"down.{n}.0", f"down_blocks.{level}.downsamplers.0", f"input_blocks.{n + 1}.0", [("conv", "conv", "op")])
            continue
        add(f"down.{n}.0", f"down_blocks.{level}.resnets.{j}", f"input_blocks.{n + 1}.0", RESIDUAL)
        if len(parts) > 1:
            add(f"down.{n}.1", f"down_blocks.{level}.attentions.{j}", f"input_blocks.{n + 1}.1", TRANSFORMER)
    for m, (theirs, table) in enumerate((("resnets.0", RESIDUAL), ("attentions.0", TRANSFORMER), ("resnets.1", RESIDUAL))):
        add(f"middle.{m}", f"mid_block.{theirs}", f"middle_block.{m}", table)
    for n, parts in enumerate(network.up):
        level, j = divmod(n, a_level)
        add(f"up.{n}.0", f"up_blocks.{level}.resnets.{j}", f"output_blocks.{n}.0", RESIDUAL)
        for m, part in list(enumerate(parts))[1:]:
            if type(part).__name__ == "Upsample":
                add(f"up.{n}.{m}", f"up_blocks.{level}.upsamplers.0", f"output_blocks.{n}.{m}", [("conv", "conv", "conv")])
            else:
                add(f"up.{n}.{m}", f"up_blocks.{level}.attentions.{j}", f"output_blocks.{n}.{m}", TRANSFORMER)
    return names


def map_autoencoder_names(autoencoder) -> list[tuple[str, str, str]]:
    """(ours, diffusers', the original's) of each module of an Autoencoder that holds tensors."""
    names = [(name, name, name) for name in ("quant_conv", "post_quant_conv")]
    for half in ("encoder", "decoder"):
        names += [(f"{half}.{a}", f"{half}.{b}", f"{half}.{c}") for a, b, c in (
            ("conv_in", "conv_in", "conv_in"), ("norm_out", "conv_norm_out", "norm_out"), ("conv_out", "conv_out", "conv_out"))]
        for m, (theirs, original, table) in enumerate((
                ("resnets.0", "block_1", AUTOENCODER_RESIDUAL), ("attentions.0", "attn_1", AUTOENCODER_ATTENTION),
                ("resnets.1", "block_2", AUTOENCODER_RESIDUAL))):
            names += [(f"{half}.middle.{m}.{a}", f"{half}.mid_block.{theirs}.{b}", f"{half}.mid.{original}.{c}") for a, b, c in table]
        way, sampler, word = ("down", "downsamplers", "downsample") if half == "encoder" else ("up", "upsamplers", "upsample")
        levels = getattr(getattr(autoencoder, half), way)
        for level, parts in enumerate(levels):
            numbered = level if half == "encoder" else len(levels) - 1 - level      # the original counts from the finest in both halves
            for j, part in enumerate(parts):
                ours, theirs, original = f"{half}.{way}.{level}.{j}", f"{half}.{way}_blocks.{level}", f"{half}.{way}.{numbered}"
                if type(part).__name__ == "ResidualBlock":
                    names += [(f"{ours}.{a}", f"{theirs}.resnets.{j}.{b}", f"{original}.block.{j}.{c}")
                              for a, b, c in AUTOENCODER_RESIDUAL]
                else:
                    names.append((f"{ours}.conv", f"{theirs}.{sampler}.0.conv", f"{original}.{word}.conv"))
    return names


def get_part(module) -> str:
    """"UNet" or "Autoencoder", by what a module is made of. Raises ValueError for another."""
    for kind, part in (("UNet", "middle"), ("Autoencoder", "post_quant_conv")):
        if hasattr(module, part):
            return kind
    raise ValueError(f"Stable Diffusion's weights go into a UNet or an Autoencoder of ours, not into a {type(module).__name__}")


def map_tensor_names(module) -> dict[str, tuple[str, str]]:
    """Our name of each tensor → (diffusers', the original's without its prefix). ValueError for a network that cannot be told in those."""
    if get_part(module) == "UNet" and (module.patch != 1 or module.pool is not None or module.context_dim is None):
        raise ValueError("Stable Diffusion's layout has patch = 1, pooled = False and a context_dim; this UNet has "
                         f"patch = {module.patch}, pooled = {module.pool is not None} and context_dim = {module.context_dim}")
    if get_part(module) == "Autoencoder" and module.patch != 1:
        raise ValueError(f"Stable Diffusion's layout has patch = 1; this Autoencoder has patch = {module.patch}")
    table = {ours: theirs for ours, *theirs in (map_unet_names if get_part(module) == "UNet" else map_autoencoder_names)(module)}
    names = {}
    for name in module.state_dict():
        place, _, kind = name.rpartition(".")
        names[name] = tuple(f"{theirs}.{kind}" for theirs in table[place])
    return names


# ---------------------------------------------------------------- files

def load_stable_diffusion(module, path) -> None:
    """Fill a UNet or an Autoencoder from a diffusers folder (of this part, or of the whole pipeline), or from a file of diffusers or of the
    original. Raises FileNotFoundError, or ValueError: a damaged file, or tensors that are missing, unknown or misshapen, all named.

    Of a file with both the last weights and their average (`model_ema.`) the last ones are taken."""
    module = getattr(module, "_orig_mod", module)                           # what torch.compile has wrapped
    state, own, ours = read_stable_diffusion(path, get_part(module)), module.state_dict(), {}
    for name, theirs in map_tensor_names(module).items():
        found = next((other for other in theirs if other in state), None)
        if found is not None:
            tensor = state.pop(found)
            if tensor.ndim == 4 and own[name].ndim == 2 and tensor.shape[2:] == (1, 1):     # attention as 1×1 convolutions
                tensor = tensor[:, :, 0, 0]
            ours[name] = tensor
    load_weights(module, ours | state)


def read_stable_diffusion(path, part: str) -> dict[str, torch.Tensor]:
    """The tensors of one part, "UNet", "Autoencoder" or "text encoder", by the file's own names without the prefix of the part."""
    folder, prefix = PARTS[part]
    file = _find_file(Path(path), folder)
    readers = open_tensors(file)
    if any(name.startswith(other) for name in readers for _, other in PARTS.values()):
        readers = {                                                         # several parts in one file
            name.removeprefix(prefix): reader
            for name, reader in readers.items()
            if name.startswith(prefix)
        }
        if not readers:
            raise ValueError(f"{file} holds no {part}: no tensor's name begins with {prefix}")
    # An autoencoder's training leaves its loss and its EMA beside it; old text encoders keep a buffer.
    unused = ("loss.", "model_ema.")
    try:
        state = {
            name: reader() for name, reader in readers.items()
            if not name.startswith(unused) and not name.endswith(".position_ids")
        }
    except (SafetensorError, zipfile.BadZipFile, EOFError, LookupError, RuntimeError, ValueError) as error:
        raise ValueError(f"{file} is damaged or no checkpoint: {error}") from error
    if part == "Autoencoder":
        state = {".".join(OLD_ATTENTION.get(word, word) for word in name.split(".")): tensor for name, tensor in state.items()}
    return state


def _find_file(path, folder):
    """The file that holds a part: the path itself, or a folder's, safetensors before pickles."""
    if path.is_file():
        return path
    stem = "model" if folder == "text_encoder" else "diffusion_pytorch_model"
    old = "pytorch_model" if folder == "text_encoder" else stem
    names = [f"{stem}.safetensors", f"{stem}.fp16.safetensors", f"{old}.bin", f"{old}.fp16.bin"]
    for candidate in (place / name for name in names for place in (path, path / folder)):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"{path} is neither a file nor a folder with one of {', '.join(names)} in it or in its {folder}/")


def save_stable_diffusion(module, path) -> None:
    """A folder that diffusers' `from_pretrained` loads; or, if path ends in .safetensors, one file with the original's names."""
    module = getattr(module, "_orig_mod", module)
    path, names, prefix = Path(path), map_tensor_names(module), PARTS[get_part(module)][1]
    single, state = path.suffix == ".safetensors", {}
    for name, tensor in module.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        if single and ".attn_1." in names[name][1] and tensor.ndim == 2:    # the original has its attention as 1×1 convolutions
            tensor = tensor[:, :, None, None]
        state[prefix + names[name][1] if single else names[name][0]] = tensor
    if not single:
        with replacing(path / "config.json") as beside:
            beside.write_text(json.dumps(make_config(module), indent=1))
    with replacing(path if single else path / "diffusion_pytorch_model.safetensors") as beside:
        save_file(state, beside, {"format": "pt"})


def make_config(module) -> dict:
    """What diffusers wants to know to build the same network."""
    if get_part(module) == "Autoencoder":
        levels, channels = len(module.encoder.down), [level[0].conv1.out_channels for level in module.encoder.down]
        return {"_class_name": "AutoencoderKL", "in_channels": module.encoder.conv_in.in_channels,
                "out_channels": module.decoder.conv_out.out_channels, "latent_channels": module.post_quant_conv.in_channels,
                "block_out_channels": channels, "layers_per_block": len(module.encoder.down[-1]), "scaling_factor": module.scale,
                "shift_factor": module.shift or None,
                "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    kinds = ["CrossAttn" if attends else "" for attends in module.attention]
    return {"_class_name": "UNet2DConditionModel", "sample_size": 64, "in_channels": module.conv_in.in_channels,
            "out_channels": module.conv_out.out_channels, "block_out_channels": list(module.channels), "layers_per_block": module.blocks,
            "cross_attention_dim": module.context_dim,
            "attention_head_dim": module.heads,             # by a historical mistake diffusers calls the number of heads so
            "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
            "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)]}
