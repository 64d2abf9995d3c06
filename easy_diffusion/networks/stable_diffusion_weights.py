"""Loading and saving Stable Diffusion's weights: the same tensors under three sets of names.

    ours         down.0.0.conv1.weight
    diffusers    down_blocks.0.resnets.0.conv1.weight
    original     model.diffusion_model.input_blocks.1.0.in_layers.2.weight

Published weights come as a folder of diffusers (safetensors) or as one original file (`.ckpt`,
which is a pickle, or `.safetensors`). In an original file the names of the UNet begin with
`model.diffusion_model.`, those of a ControlNet with `control_model.`, those of the autoencoder with
`first_stage_model.` and those of the text encoder with `cond_stage_model.transformer.`.
`load_stable_diffusion` accepts all of these. `save_stable_diffusion` writes a folder that diffusers
loads, or one file with the original names.

The tables below map the names. The tensors are the same, except for the attention of the
autoencoder, which original files store as 1×1 convolutions. A pickle is read without calling
anything that it names.

The file needs torch, safetensors and, beside it, weights_io.py; its example also needs unet.py,
blocks.py and attention_kernels.py.

>>> import tempfile
>>> from .unet import UNet
>>> network, folder = UNet(channels=(32, 64), context_dim=16), tempfile.mkdtemp()
>>> save_stable_diffusion(network, folder)
>>> load_stable_diffusion(UNet(channels=(32, 64), context_dim=16), folder)
"""

import json
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError

from .weights_io import atomic_path, load_weights, open_tensors, save_tensors

# What reading a tensor of a damaged file raises
READ_ERRORS = (
    SafetensorError, zipfile.BadZipFile, EOFError, LookupError, RuntimeError, ValueError
)

# Part → (subfolder of a diffusers folder, prefix of its names in an original file)
PARTS = {
    "UNet": ("unet", "model.diffusion_model."),
    "ControlNet": ("controlnet", "control_model."),
    "Autoencoder": ("vae", "first_stage_model."),
    "text encoder": ("text_encoder", "cond_stage_model.transformer.text_model."),
}
PIPELINE_PARTS = ("UNet", "Autoencoder", "text encoder")  # a ControlNet has files of its own

# ---------------------------------------------------------------- names inside a block
# Each row: ours, diffusers', original

RESIDUAL = [
    ("norm1", "norm1", "in_layers.0"),
    ("conv1", "conv1", "in_layers.2"),
    ("time", "time_emb_proj", "emb_layers.1"),
    ("norm2", "norm2", "out_layers.0"),
    ("conv2", "conv2", "out_layers.3"),
    ("shortcut", "conv_shortcut", "skip_connection"),
]

# Of a transformer block, which has the same names in diffusers and in the original
TRANSFORMER_BLOCK = [
    ("norm1", "norm1"),
    ("self_attention.to_q", "attn1.to_q"),
    ("self_attention.to_k", "attn1.to_k"),
    ("self_attention.to_v", "attn1.to_v"),
    ("self_attention.to_out", "attn1.to_out.0"),
    ("norm2", "norm2"),
    ("cross_attention.to_q", "attn2.to_q"),
    ("cross_attention.to_k", "attn2.to_k"),
    ("cross_attention.to_v", "attn2.to_v"),
    ("cross_attention.to_out", "attn2.to_out.0"),
    ("norm3", "norm3"),
    ("feed_forward.into", "ff.net.0.proj"),
    ("feed_forward.out", "ff.net.2"),
]

TRANSFORMER = [
    ("norm", "norm", "norm"),
    ("proj_in", "proj_in", "proj_in"),
    ("proj_out", "proj_out", "proj_out"),
] + [
    (f"block.{ours}", f"transformer_blocks.0.{theirs}", f"transformer_blocks.0.{theirs}")
    for ours, theirs in TRANSFORMER_BLOCK
]

AUTOENCODER_RESIDUAL = [
    ("norm1", "norm1", "norm1"),
    ("conv1", "conv1", "conv1"),
    ("norm2", "norm2", "norm2"),
    ("conv2", "conv2", "conv2"),
    ("shortcut", "conv_shortcut", "nin_shortcut"),
]

AUTOENCODER_ATTENTION = [
    ("norm", "group_norm", "norm"),
    ("attention.to_q", "to_q", "q"),
    ("attention.to_k", "to_k", "k"),
    ("attention.to_v", "to_v", "v"),
    ("attention.to_out", "to_out.0", "proj_out"),
]

# Names of the autoencoder's attention in diffusers before 2023 → now
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


# ---------------------------------------------------------------- names of whole networks


def add_prefix(table, ours, theirs, original):
    """The rows of a table, each of its three names behind the prefix of its column."""
    return [(f"{ours}.{a}", f"{theirs}.{b}", f"{original}.{c}") for a, b, c in table]


def map_encoder_names(network) -> list[tuple[str, str, str]]:
    """(our name, diffusers' name, original name) of each module of the way down and the middle.

    network: a UNet or a ControlNet.
    """
    rows = [
        ("conv_in", "conv_in", "input_blocks.0.0"),
        ("time.0", "time_embedding.linear_1", "time_embed.0"),
        ("time.2", "time_embedding.linear_2", "time_embed.2"),
    ]
    # A level has network.blocks blocks and a downsampling on the way down, one more block instead
    # on the way up. We and the original number them all in one list, diffusers level by level.
    entries_per_level = network.blocks + 1

    for n, layers in enumerate(network.down):
        level, i = divmod(n, entries_per_level)
        ours = f"down.{n}"
        theirs = f"down_blocks.{level}"
        original = f"input_blocks.{n + 1}"
        if i == network.blocks:
            rows.append((f"{ours}.0.conv", f"{theirs}.downsamplers.0.conv", f"{original}.0.op"))
            continue
        rows += add_prefix(RESIDUAL, f"{ours}.0", f"{theirs}.resnets.{i}", f"{original}.0")
        if len(layers) > 1:
            rows += add_prefix(
                TRANSFORMER, f"{ours}.1", f"{theirs}.attentions.{i}", f"{original}.1"
            )

    rows += add_prefix(RESIDUAL, "middle.0", "mid_block.resnets.0", "middle_block.0")
    rows += add_prefix(TRANSFORMER, "middle.1", "mid_block.attentions.0", "middle_block.1")
    rows += add_prefix(RESIDUAL, "middle.2", "mid_block.resnets.1", "middle_block.2")
    return rows


def map_unet_names(network) -> list[tuple[str, str, str]]:
    """(our name, diffusers' name, original name) of each module of a UNet that holds tensors."""
    rows = map_encoder_names(network)
    rows += [("norm_out", "conv_norm_out", "out.0"), ("conv_out", "conv_out", "out.2")]
    for n, layers in enumerate(network.up):
        level, i = divmod(n, network.blocks + 1)
        theirs = f"up_blocks.{level}"
        for j, layer in enumerate(layers):
            ours = f"up.{n}.{j}"
            original = f"output_blocks.{n}.{j}"
            if j == 0:
                rows += add_prefix(RESIDUAL, ours, f"{theirs}.resnets.{i}", original)
            elif type(layer).__name__ == "Upsample":
                rows.append((f"{ours}.conv", f"{theirs}.upsamplers.0.conv", f"{original}.conv"))
            else:
                rows += add_prefix(TRANSFORMER, ours, f"{theirs}.attentions.{i}", original)
    return rows


def map_controlnet_names(network) -> list[tuple[str, str, str]]:
    """(our name, diffusers' name, original name) of each module of a ControlNet with tensors."""
    rows = map_encoder_names(network)
    # The hint encoder: a convolution, pairs of convolutions, a convolution, with SiLU between them
    last = len(network.hint) - 1
    for n in range(0, len(network.hint), 2):
        theirs = "conv_in" if n == 0 else "conv_out" if n == last else f"blocks.{n // 2 - 1}"
        rows.append((f"hint.{n}", f"controlnet_cond_embedding.{theirs}", f"input_hint_block.{n}"))
    for n in range(len(network.zero_convs)):
        rows.append((f"zero_convs.{n}", f"controlnet_down_blocks.{n}", f"zero_convs.{n}.0"))
    rows.append(("zero_middle", "controlnet_mid_block", "middle_block_out.0"))
    return rows


def map_autoencoder_names(autoencoder) -> list[tuple[str, str, str]]:
    """(our name, diffusers' name, original name) of each module of an Autoencoder with tensors."""
    rows = [
        ("quant_conv", "quant_conv", "quant_conv"),
        ("post_quant_conv", "post_quant_conv", "post_quant_conv"),
    ]
    for half in ("encoder", "decoder"):
        rows += [
            (f"{half}.conv_in", f"{half}.conv_in", f"{half}.conv_in"),
            (f"{half}.norm_out", f"{half}.conv_norm_out", f"{half}.norm_out"),
            (f"{half}.conv_out", f"{half}.conv_out", f"{half}.conv_out"),
        ]
        for ours, theirs, original, table in (
            ("middle.0", "mid_block.resnets.0", "mid.block_1", AUTOENCODER_RESIDUAL),
            ("middle.1", "mid_block.attentions.0", "mid.attn_1", AUTOENCODER_ATTENTION),
            ("middle.2", "mid_block.resnets.1", "mid.block_2", AUTOENCODER_RESIDUAL),
        ):
            rows += add_prefix(table, f"{half}.{ours}", f"{half}.{theirs}", f"{half}.{original}")

    for level, layers in enumerate(autoencoder.encoder.down):
        ours = f"encoder.down.{level}"
        theirs = f"encoder.down_blocks.{level}"
        rows += map_autoencoder_level(layers, ours, theirs, ours, "downsample")
    levels = len(autoencoder.decoder.up)
    for level, layers in enumerate(autoencoder.decoder.up):
        # We and diffusers count the levels from the coarsest, the original from the finest.
        ours = f"decoder.up.{level}"
        theirs = f"decoder.up_blocks.{level}"
        original = f"decoder.up.{levels - 1 - level}"
        rows += map_autoencoder_level(layers, ours, theirs, original, "upsample")
    return rows


def map_autoencoder_level(layers, ours, theirs, original, resampling):
    """The rows of one level: residual blocks, then `resampling`, "downsample" or "upsample"."""
    rows = []
    for i, layer in enumerate(layers):
        name = f"{ours}.{i}"
        if type(layer).__name__ == "ResidualBlock":
            names = (name, f"{theirs}.resnets.{i}", f"{original}.block.{i}")
            rows += add_prefix(AUTOENCODER_RESIDUAL, *names)
        else:
            theirs = f"{theirs}.{resampling}rs.0"  # "downsamplers" or "upsamplers"
            rows.append((f"{name}.conv", f"{theirs}.conv", f"{original}.{resampling}.conv"))
    return rows


def get_part(module) -> str:
    """Which part a module is, "UNet", "ControlNet" or "Autoencoder"; ValueError for any other."""
    if hasattr(module, "zero_convs"):
        return "ControlNet"
    if hasattr(module, "middle"):
        return "UNet"
    if hasattr(module, "post_quant_conv"):
        return "Autoencoder"
    raise ValueError(
        "Stable Diffusion's weights go into a UNet, a ControlNet or an Autoencoder of ours, "
        f"not into a {type(module).__name__}"
    )


def map_tensor_names(module) -> dict[str, tuple[str, str]]:
    """Our name of each tensor → (diffusers' name, original name without the prefix of its part).

    Raises ValueError for a network whose layout Stable Diffusion does not have.
    """
    part = get_part(module)
    if part != "Autoencoder":
        pooled = module.pool is not None
        if module.patch != 1 or pooled or module.context_dim is None:
            raise ValueError(
                "Stable Diffusion's layout has patch = 1, pooled = False and a context_dim; "
                f"this {part} has patch = {module.patch}, pooled = {pooled} "
                f"and context_dim = {module.context_dim}"
            )
        if part == "ControlNet" and module.hint_channels is None:
            raise ValueError(
                "Stable Diffusion's layout has hint_channels; this ControlNet has the hint encoder "
                "of squares"
            )
        rows = map_unet_names(module) if part == "UNet" else map_controlnet_names(module)
    else:
        if module.patch != 1:
            raise ValueError(
                "Stable Diffusion's layout has patch = 1; "
                f"this Autoencoder has patch = {module.patch}"
            )
        rows = map_autoencoder_names(module)

    other_names = {ours: (theirs, original) for ours, theirs, original in rows}
    tensor_names = {}
    for name in module.state_dict():
        module_name, _, suffix = name.rpartition(".")  # the suffix is "weight" or "bias"
        theirs, original = other_names[module_name]
        tensor_names[name] = (f"{theirs}.{suffix}", f"{original}.{suffix}")
    return tensor_names


# ---------------------------------------------------------------- files


def load_stable_diffusion(module, path) -> None:
    """Load the weights of a UNet, a ControlNet or an Autoencoder from published files.

    path: one of
        a diffusers folder of this part or of the whole pipeline;
        a single file with diffusers' names or with the original names.

    If a file holds both the last weights and their moving average (`model_ema.`), the last weights
    are loaded. Raises FileNotFoundError, or ValueError for a damaged file or for tensors that are
    missing, unexpected or of a different shape; the error names all of them.
    """
    module = getattr(module, "_orig_mod", module)  # the module that torch.compile has wrapped
    state = read_stable_diffusion(path, get_part(module))
    other_model = name_other_model(state)
    if other_model:
        raise ValueError(f"{path} holds weights of {other_model}, not of Stable Diffusion 1.x")
    expected = module.state_dict()
    weights = {}
    for name, other_names in map_tensor_names(module).items():
        for other_name in other_names:
            if other_name in state:
                weights[name] = from_convolution(state.pop(other_name), expected[name])
                break
    load_weights(module, weights | state)  # what is left in `state` is unexpected


def name_other_model(state: dict[str, torch.Tensor]) -> str:
    """The model whose UNet has these tensors, if its layout is known to be another; else ""."""
    if any(name.startswith(("add_embedding.", "label_emb.")) for name in state):
        return "Stable Diffusion XL"
    widths = {
        tensor.shape[1] for name, tensor in state.items() if name.endswith("attn2.to_k.weight")
    }
    if widths == {1024}:
        return "Stable Diffusion 2"
    has_transformers = any(".transformer_blocks." in name for name in state)
    if "time_embed.0.weight" in state and not has_transformers:
        return "guided-diffusion (ADM)"
    return ""


def from_convolution(tensor, like):
    """The weight of a 1×1 convolution as that of a linear layer, if `like` is one."""
    if tensor.ndim == 4 and like.ndim == 2 and tensor.shape[2:] == (1, 1):
        return tensor[:, :, 0, 0]
    return tensor


def read_stable_diffusion(path, part: str) -> dict[str, torch.Tensor]:
    """All tensors of one part, by the names in the file without the prefix of the part.

    part: a key of PARTS, such as "UNet" or "text encoder".

    Raises FileNotFoundError, or ValueError for a damaged file or one without that part.
    """
    folder, prefix = PARTS[part]
    file = _find_file(Path(path), folder)
    readers = open_tensors(file)  # name → function that reads the tensor

    # Original files hold several parts
    prefixes = tuple(part_prefix for _, part_prefix in PARTS.values())
    if any(name.startswith(prefixes) for name in readers):
        readers = {
            name.removeprefix(prefix): read
            for name, read in readers.items()
            if name.startswith(prefix)
        }
        if not readers:
            raise ValueError(f"{file} holds no {part}: no tensor's name begins with {prefix}")

    # The training of an autoencoder also saves its loss and its moving average, and old text
    # encoders a buffer of position ids
    unused = ("loss.", "model_ema.")
    try:
        state = {
            name: read()
            for name, read in readers.items()
            if not name.startswith(unused) and not name.endswith(".position_ids")
        }
    except READ_ERRORS as error:
        raise ValueError(f"{file} is damaged or no checkpoint: {error}") from error
    if part == "Autoencoder":
        state = {rename_old_attention(name): tensor for name, tensor in state.items()}
    return state


def rename_old_attention(name):
    """A tensor's name in diffusers before 2023 → its name now."""
    return ".".join(OLD_ATTENTION.get(word, word) for word in name.split("."))


def _find_file(path, folder):
    """The file of a part: `path` itself, or a file in it or in its subfolder; safetensors first."""
    if path.is_file():
        return path
    stem = "model" if folder == "text_encoder" else "diffusion_pytorch_model"
    pickle_stem = "pytorch_model" if folder == "text_encoder" else stem
    names = [
        f"{stem}.safetensors",
        f"{stem}.fp16.safetensors",
        f"{pickle_stem}.bin",
        f"{pickle_stem}.fp16.bin",
    ]
    for name in names:
        for candidate in (path / name, path / folder / name):
            if candidate.is_file():
                return candidate
    raise FileNotFoundError(
        f"{path} is neither a file nor a folder with one of {', '.join(names)} in it "
        f"or in its {folder}/"
    )


def save_stable_diffusion(module, path) -> None:
    """Save a UNet, a ControlNet or an Autoencoder as a folder that `from_pretrained` loads.

    If `path` ends in .safetensors, it becomes a single file with the original names instead.
    """
    module = getattr(module, "_orig_mod", module)
    path = Path(path)
    names = map_tensor_names(module)
    _, prefix = PARTS[get_part(module)]
    is_single_file = path.suffix == ".safetensors"

    state = {}
    for name, tensor in module.state_dict().items():
        diffusers_name, original_name = names[name]
        tensor = tensor.detach().cpu().contiguous()
        if not is_single_file:
            state[diffusers_name] = tensor
            continue
        if ".attn_1." in original_name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # a 1×1 convolution
        state[prefix + original_name] = tensor

    if not is_single_file:
        with atomic_path(path / "config.json") as temporary:
            temporary.write_text(json.dumps(make_config(module), indent=1))
        path = path / "diffusion_pytorch_model.safetensors"
    save_tensors(path, state)


def make_config(module) -> dict:
    """The content of the config.json with which diffusers builds the same network."""
    if get_part(module) == "Autoencoder":
        levels = module.encoder.down
        return {
            "_class_name": "AutoencoderKL",
            "in_channels": module.encoder.conv_in.in_channels,
            "out_channels": module.decoder.conv_out.out_channels,
            "latent_channels": module.post_quant_conv.in_channels,
            "block_out_channels": [level[0].conv1.out_channels for level in levels],
            "layers_per_block": len(levels[-1]),
            "scaling_factor": module.scale,
            "shift_factor": module.shift or None,
            "down_block_types": ["DownEncoderBlock2D"] * len(levels),
            "up_block_types": ["UpDecoderBlock2D"] * len(levels),
        }
    prefixes = ["CrossAttn" if attends else "" for attends in module.attention]
    shared = {
        "in_channels": module.conv_in.in_channels,
        "block_out_channels": list(module.channels),
        "layers_per_block": module.blocks,
        "cross_attention_dim": module.context_dim,
        # By a historical mistake, this is diffusers' name for the number of heads.
        "attention_head_dim": module.heads,
        "down_block_types": [f"{prefix}DownBlock2D" for prefix in prefixes],
    }
    if get_part(module) == "ControlNet":
        return shared | {
            "_class_name": "ControlNetModel",
            "conditioning_channels": module.control_channels,
            "conditioning_embedding_out_channels": list(module.hint_channels),
        }
    return shared | {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "out_channels": module.conv_out.out_channels,
        "up_block_types": [f"{prefix}UpBlock2D" for prefix in reversed(prefixes)],
    }
