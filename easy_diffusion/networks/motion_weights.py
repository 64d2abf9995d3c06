"""Motion modules of AnimateDiff: loading and saving them as diffusers' `MotionAdapter`.

Published motion modules were trained for Stable Diffusion 1.5 and contain no image network. Where
they differ from the defaults of motion.py, its options give their form, ANIMATE_DIFF: two attention
layers, sinusoidal positions, a feed-forward layer four times as wide, a normalisation over all
frames as in diffusers (the authors' code normalises each frame alone), and no time embedding. In
new modules of diffusers the last layer does not begin at zero.

    ours        motion_down.0.attentions.1.to_q.weight
    diffusers   down_blocks.0.motion_modules.0.transformer_blocks.0.attn2.to_q.weight

The file needs torch, safetensors and, beside it, attention_kernels.py, blocks.py, motion.py,
stable_diffusion_weights.py, unet.py and weights_io.py.

>>> import tempfile
>>> from .unet import UNet
>>> unet = UNet(channels=(32, 64), context_dim=16)
>>> video, folder = VideoUNet.from_unet(unet, **ANIMATE_DIFF), tempfile.mkdtemp()
>>> save_motion_adapter(video, folder)
>>> load_motion_adapter(VideoUNet.from_unet(unet, **ANIMATE_DIFF), folder)
"""

import json
from pathlib import Path

from .motion import VideoUNet, embed_frames
from .weights_io import atomic_path, load_weights, read_tensors, save_tensors

ANIMATE_DIFF = dict(
    timed=False, heads=8, positions="sinusoidal", attentions=2, expansion=4, norm_over_frames=True
)
MAX_FRAMES = 32                         # of published modules
FILE = "diffusion_pytorch_model.safetensors"

# Inside a motion module: ours, diffusers'
MODULE = [
    ("norm", "norm"),
    ("proj_in", "proj_in"),
    ("norms.0", "transformer_blocks.0.norm1"),
    ("norms.1", "transformer_blocks.0.norm2"),
    ("norm_out", "transformer_blocks.0.norm3"),
    ("feed_forward.into", "transformer_blocks.0.ff.net.0.proj"),
    ("feed_forward.out", "transformer_blocks.0.ff.net.2"),
    ("proj_out", "proj_out"),
]
MODULE += [
    (f"attentions.{i}.{ours}", f"transformer_blocks.0.attn{i + 1}.{theirs}")
    for i in (0, 1)
    for ours, theirs in (
        ("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out", "to_out.0")
    )
]


def map_motion_names(video: VideoUNet) -> dict[str, str]:
    """Our name → diffusers' name of each tensor of the motion modules.

    Raises ValueError unless the modules have the form of ANIMATE_DIFF.
    """
    wanted = {name: value for name, value in ANIMATE_DIFF.items() if name != "heads"}
    own = video.settings["motion"] | {"timed": video.settings["timed"]}
    different = {name for name, value in wanted.items() if own.get(name) != value}
    if different:
        raise ValueError(
            f"the motion modules differ from AnimateDiff's in {', '.join(sorted(different))}: "
            "build the network with VideoUNet.from_unet(unet, **ANIMATE_DIFF)"
        )
    per_level = video.blocks + 1            # stages of a level, its Downsample included
    places = [("motion_middle", "mid_block.motion_modules.0")]
    for way in ("down", "up"):
        for n, module in enumerate(getattr(video, f"motion_{way}")):
            if module is not None:
                level, i = divmod(n, per_level)
                places.append((f"motion_{way}.{n}", f"{way}_blocks.{level}.motion_modules.{i}"))
    modules = {
        f"{place}.{ours}": f"{their_place}.{theirs}"
        for place, their_place in places for ours, theirs in MODULE
    }
    names = {}
    for name in video.state_dict():
        if name.startswith("motion_"):
            module, _, tensor = name.rpartition(".")
            names[name] = f"{modules[module]}.{tensor}"
    return names


def save_motion_adapter(video: VideoUNet, path) -> None:
    """Save the motion modules as a folder that `MotionAdapter.from_pretrained` loads."""
    path = Path(path)
    state = video.state_dict()
    tensors = {
        theirs: state[ours].detach().cpu().contiguous()
        for ours, theirs in map_motion_names(video).items()
    }
    for name, norm in list(tensors.items()):
        if name.endswith("norm1.weight"):       # diffusers also stores the embedding of the frames
            embedding = embed_frames(MAX_FRAMES, len(norm))[None]
            tensors[name.replace("norm1.weight", "pos_embed.pe")] = embedding
    config = {
        "_class_name": "MotionAdapter",
        "block_out_channels": list(video.channels),
        "motion_layers_per_block": video.blocks,
        "motion_num_attention_heads": video.motion_middle.attentions[0].heads,
        "motion_max_seq_length": MAX_FRAMES,
    }
    path.mkdir(parents=True, exist_ok=True)
    with atomic_path(path / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=1))
    save_tensors(path / FILE, tensors)


def load_motion_adapter(video: VideoUNet, path) -> None:
    """Load motion modules into a network, which keeps its image network.

    path: a folder of diffusers' `MotionAdapter`, or a file with its names.

    Raises FileNotFoundError, or ValueError for modules of another form or for another network.
    """
    path = Path(path)
    tensors = read_tensors(path / FILE if path.is_dir() else path)
    state = video.state_dict()
    for ours, theirs in map_motion_names(video).items():
        if theirs not in tensors:
            raise ValueError(f"{path} has no tensor {theirs}: it is not a MotionAdapter for "
                             f"a network of the channels {video.channels}")
        state[ours] = tensors[theirs]
    load_weights(video, state)
