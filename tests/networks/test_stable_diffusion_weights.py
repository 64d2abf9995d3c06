"""Stable Diffusion's weights in and out, against diffusers with the same weights.

The networks are narrow but have the layout of Stable Diffusion.
"""

import collections
import json
import pickle

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.guidance import guided
from easy_diffusion.diffusion.samplers import ddim
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.networks.autoencoder import Autoencoder
from easy_diffusion.networks.fast_unet import FastUNet
from easy_diffusion.networks.stable_diffusion_weights import (
    load_stable_diffusion,
    map_tensor_names,
    read_stable_diffusion,
    save_stable_diffusion,
)
from easy_diffusion.networks.unet import UNet

NETWORKS = ["unet", "inpainting unet", "autoencoder"]


def build_unet(in_channels=4):
    attention = (True, True, True, False)
    return UNet(in_channels, 4, (32, 64, 64, 64), context_dim=24, attention=attention, heads=4)


def build_ours(name):
    """One of NETWORKS with random weights, also where training begins at zero."""
    torch.manual_seed(0)
    if name == "autoencoder":
        module = Autoencoder(channels=(32, 64, 64), scale=0.18215)
    else:
        module = build_unet(9 if "inpainting" in name else 4)
    for parameter in module.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.1)
    return module.eval()


def build_peer(name):
    """The same network of diffusers, with different weights."""
    torch.manual_seed(1)
    if name == "autoencoder":
        peer = AutoencoderKL(
            block_out_channels=(32, 64, 64),
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=32,
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
        )
    else:
        peer = UNet2DConditionModel(
            in_channels=9 if "inpainting" in name else 4,
            block_out_channels=(32, 64, 64, 64),
            cross_attention_dim=24,
            attention_head_dim=4,
        )
    return peer.eval()


def peer_class(name):
    return AutoencoderKL if name == "autoencoder" else UNet2DConditionModel


def compute_outputs(module, name):
    """The outputs for a fixed input, and the gradient of a fixed sum at the first convolution."""
    generator = torch.Generator().manual_seed(2)
    if name == "autoencoder":
        x = torch.randn(2, 3, 32, 48, generator=generator)
        z = torch.randn(2, 4, 8, 12, generator=generator)
        if isinstance(module, Autoencoder):
            posterior = module.encode(x)
            outputs = [posterior.mean, posterior.log_variance, module.decode(z)]
        else:
            posterior = module.encode(x).latent_dist
            outputs = [posterior.mean, posterior.logvar, module.decode(z).sample]
        first_convolution = module.encoder.conv_in
    else:
        x = torch.randn(2, module.conv_in.in_channels, 16, 24, generator=generator)
        context = torch.randn(2, 7, 24, generator=generator)
        t = torch.tensor([3, 901])
        output = module(x, t, context)
        outputs = [output if isinstance(module, UNet) else output.sample]
        first_convolution = module.conv_in
    module.zero_grad()
    weights = [torch.randn(output.shape, generator=generator) for output in outputs]
    sum((output * weight).sum() for output, weight in zip(outputs, weights)).backward()
    return [*(output.detach() for output in outputs), first_convolution.weight.grad]


def assert_same_outputs(module, peer, name):
    for x, y in zip(compute_outputs(module, name), compute_outputs(peer, name), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))


# ---------------------------------------------------------------- folders of diffusers


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("folder", ["part", "pipeline"])
def test_diffusers_weights_give_diffusers_outputs(name, folder, tmp_path):
    peer, module = build_peer(name), build_ours(name)
    subfolder = "vae" if name == "autoencoder" else "unet"
    peer.save_pretrained(tmp_path if folder == "part" else tmp_path / subfolder)
    module.load_stable_diffusion(tmp_path)
    assert_same_outputs(module, peer, name)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_we_save_diffusers_loads(name, tmp_path):
    module = build_ours(name)
    save_stable_diffusion(module, tmp_path)
    peer, report = peer_class(name).from_pretrained(tmp_path, output_loading_info=True)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[key]
    assert_same_outputs(module, peer.eval(), name)


@pytest.mark.parametrize("ending", ["fp16.safetensors", "bin", "fp16.bin"])
def test_half_precision_and_pickled_folders_are_read(ending, tmp_path):
    network = build_ours("unet").half().float()
    tensors = network.state_dict()
    state = {
        diffusers_name: tensors[name].half()
        for name, (diffusers_name, _) in map_tensor_names(network).items()
    }
    (tmp_path / "unet").mkdir()
    save = save_file if ending.endswith("safetensors") else torch.save
    save(state, tmp_path / "unet" / f"diffusion_pytorch_model.{ending}")
    loaded = build_unet().load_stable_diffusion(tmp_path)
    for parameter, expected in zip(loaded.parameters(), network.parameters()):
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, expected)


def test_folders_of_older_diffusers_with_other_attention_names_are_read(tmp_path):
    peer, module = build_peer("autoencoder"), build_ours("autoencoder")
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in peer.state_dict().items():
        for new, old in old_names.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        state[name] = tensor.contiguous()
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    assert_same_outputs(module.load_stable_diffusion(tmp_path), peer, "autoencoder")


def test_the_configuration_is_that_of_stable_diffusion(tmp_path):
    save_stable_diffusion(build_ours("unet"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["down_block_types"] == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert config["up_block_types"] == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3


def test_an_autoencoder_in_half_precision_takes_inputs_of_any_dtype():
    autoencoder = build_ours("autoencoder").bfloat16()
    z = autoencoder.encode(torch.randn(1, 3, 16, 16)).mean
    assert z.dtype == torch.bfloat16
    assert autoencoder.decode(z.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["unet", "inpainting unet"])
def test_a_unet_in_half_precision_takes_inputs_of_any_dtype(name):
    network = build_ours(name).bfloat16()
    x = torch.randn(1, network.conv_in.in_channels, 16, 16)
    t = torch.tensor([5])
    context = torch.randn(1, 3, 24)
    with torch.no_grad():
        fast = FastUNet(network)
        cached = fast.cache_context(context)
        torch.testing.assert_close(network(x, t, context), fast(x, t, *cached))


# ---------------------------------------------------------------- original files


class OtherObject:
    """An object that a training framework pickled beside the tensors."""


class OtherList(list):
    pass


class OtherDict(dict):
    pass


def save_training_checkpoint(path, state, text_state):
    """Write a `.ckpt` with all that the checkpoint of a training holds beside the weights."""
    text_prefix = "cond_stage_model.transformer.text_model"
    text_state = {f"{text_prefix}.{name}": tensor for name, tensor in text_state.items()}
    unused = {
        "model_ema.decay": torch.tensor(0.9),
        "betas": torch.ones(3),
        "empty": torch.empty(0),
        f"{text_prefix}.embeddings.position_ids": torch.arange(77)[None],
    }
    checkpoint = {
        "state_dict": collections.OrderedDict(state | text_state | unused),
        "global_step": 7,
        "callbacks": {
            OtherObject: OtherObject(),
            "list": OtherList([OtherObject()]),
            "dict": OtherDict(a=OtherObject()),
        },
    }
    torch.save(checkpoint, path)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_an_original_file_is_written_and_read(name, suffix, tmp_path):
    """diffusers' own converter makes the same network of our file, and we load it ourselves."""
    module, path = build_ours(name), tmp_path / "model.safetensors"
    save_stable_diffusion(module, path)
    is_autoencoder = name == "autoencoder"
    prefix = "first_stage_model." if is_autoencoder else "model.diffusion_model."
    tensors = read_stable_diffusion(path, "Autoencoder" if is_autoencoder else "UNet")
    state = {prefix + key: tensor for key, tensor in tensors.items()}
    for key, tensor in state.items():
        if ".attn_1." in key and key.endswith((".q.weight", "proj_out.weight")):
            assert tensor.ndim == 4

    # diffusers reads it
    peer = build_peer(name)
    convert = convert_ldm_vae_checkpoint if is_autoencoder else convert_ldm_unet_checkpoint
    peer.load_state_dict(convert(dict(state), dict(peer.config)), strict=True)
    assert_same_outputs(module, peer, name)

    # We read it, also beside a text encoder and what else the checkpoint of a training holds
    if suffix == "ckpt":
        path = tmp_path / "model.ckpt"
        config = CLIPTextConfig(
            vocab_size=9,
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=0,
            eos_token_id=1,
        )
        text_model = CLIPTextModel(config)
        save_training_checkpoint(path, state, text_model.state_dict())
    loaded = build_ours(name)
    for parameter in loaded.parameters():
        torch.nn.init.zeros_(parameter)
    load_stable_diffusion(loaded, path)
    assert_same_outputs(loaded, module, name)
    if suffix == "ckpt":
        text_model.load_state_dict(read_stable_diffusion(path, "text encoder"), strict=True)


def test_the_checkpoint_of_an_autoencoders_training_is_read(tmp_path):
    module = build_ours("autoencoder")
    tensors = module.state_dict()
    state = {original: tensors[name] for name, (_, original) in map_tensor_names(module).items()}
    unused = {"loss.logvar": torch.ones(1), "model_ema.decay": torch.ones(1)}
    torch.save({"state_dict": state | unused}, tmp_path / "vae.ckpt")
    loaded = Autoencoder(channels=(32, 64, 64)).load_stable_diffusion(tmp_path / "vae.ckpt")
    for parameter, expected in zip(loaded.parameters(), module.parameters()):
        assert torch.equal(parameter, expected)


class RunsCode:
    """An object whose pickle runs code when it is loaded."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code from the file was run')",))


def test_no_code_in_a_pickle_is_run(tmp_path):
    network = build_ours("unet")
    tensors = network.state_dict()
    state = {
        f"model.diffusion_model.{original}": tensors[name]
        for name, (_, original) in map_tensor_names(network).items()
    }

    # Beside the tensors, it is skipped
    checkpoint = {"state_dict": state, "code": RunsCode(), "list": [RunsCode(), {1: RunsCode()}]}
    torch.save(checkpoint, tmp_path / "model.ckpt")
    load_stable_diffusion(build_ours("unet"), tmp_path / "model.ckpt")

    # Files of other formats are refused
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps({"state_dict": RunsCode()}))
    (tmp_path / "empty.ckpt").write_bytes(b"")
    torch.save({"state_dict": RunsCode()}, tmp_path / "no_tensors.ckpt")
    torch.save({"state_dict": state}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "program.ckpt")
    for name in ("bare", "empty", "no_tensors", "old", "program"):
        with pytest.raises(ValueError, match=name):
            load_stable_diffusion(build_ours("unet"), tmp_path / f"{name}.ckpt")


def test_tensors_of_all_dtypes_and_layouts_are_read_as_torch_reads_them(tmp_path):
    dtypes = (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    )
    whole = torch.randn(5, 7)
    tensors = {str(dtype): (torch.randn(4, 6) * 9).to(dtype) for dtype in dtypes}
    tensors |= {
        "transposed": whole.t(),
        "part": whole[1:3, ::2],
        "shared": whole,
        "scalar": torch.tensor(3.0),
        "parameter": torch.nn.Parameter(whole),
    }
    torch.save(tensors, tmp_path / "model.ckpt")
    found = read_stable_diffusion(tmp_path / "model.ckpt", "UNet")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor.detach()), name


# ---------------------------------------------------------------- errors


def test_a_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"conv_in.weight": torch.zeros(1000)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(bytes(2000)) + 1000] = 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        read_stable_diffusion(path, "UNet")


def test_all_mismatches_are_named_at_once(tmp_path):
    network = build_ours("unet")
    save_stable_diffusion(network, tmp_path)
    state = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    del state["conv_in.bias"]
    del state["mid_block.attentions.0.norm.weight"]
    state["conv_out.bias"] = torch.zeros(9)
    state["extra.weight"] = torch.zeros(2, 2)
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError) as error:
        load_stable_diffusion(network, tmp_path)
    for message in (
        "missing: conv_in.bias (32,)",
        "missing: middle.1.norm.weight (64,)",
        "shape of conv_out.bias: (9,)",
        "unexpected: extra.weight",
    ):
        assert message in str(error.value)


def test_wrong_paths_networks_and_damaged_files_are_named(tmp_path):
    # Folders and files
    with pytest.raises(FileNotFoundError, match="unet"):
        load_stable_diffusion(build_ours("unet"), tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 20)
    (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04 and no more")
    for name in ("cut.safetensors", "cut.ckpt"):
        with pytest.raises(ValueError, match=name):
            load_stable_diffusion(build_ours("unet"), tmp_path / name)
    save_stable_diffusion(build_ours("autoencoder"), tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="holds no UNet"):
        load_stable_diffusion(build_ours("unet"), tmp_path / "vae.safetensors")

    # Networks
    for options, message in (
        (dict(context_dim=16, pooled=True), "pooled = True"),
        (dict(context_dim=16, patch=2), "patch = 2"),
        ({}, "None"),
    ):
        with pytest.raises(ValueError, match=f"this UNet has .*{message}"):
            save_stable_diffusion(UNet(channels=(32, 64), **options), tmp_path)
    with pytest.raises(ValueError, match="not into a Linear"):
        load_stable_diffusion(torch.nn.Linear(1, 1), tmp_path)


def test_the_published_sizes():
    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    with torch.device("meta"):
        unet = UNet.stable_diffusion_15()
        inpainting_unet = UNet.stable_diffusion_15(in_channels=9)
        autoencoder = Autoencoder.stable_diffusion()
    assert count(unet) == 859_520_964
    assert count(inpainting_unet) == 859_535_364
    assert count(autoencoder) == 83_653_863
    assert len(unet.state_dict()) == 686
    assert len(autoencoder.state_dict()) == 248


# ---------------------------------------------------------------- whole pipelines


def make_guided_denoiser(network, context, uncond_context, scale, conditioning=None):
    """(denoiser with guidance, its schedule); `conditioning` is concatenated to x_t."""
    diffusion = GaussianDiffusion(NoiseSchedule.scaled_linear(1000), prediction_type="eps")

    def predict(x, t, context, mask):
        if conditioning is not None:
            x = torch.cat([x, conditioning.expand(len(x), -1, -1, -1)], dim=1)
        return network(x, t, context, mask)

    cond = diffusion.denoiser(predict, context)
    uncond = diffusion.denoiser(predict, uncond_context)
    return guided(cond, uncond, scale), diffusion.schedule


def make_scheduler(steps):
    """diffusers' DDIM scheduler and its timesteps."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )
    scheduler.set_timesteps(steps)
    return scheduler, scheduler.timesteps.tolist()


# A pipeline without text encoder: the context is passed as a tensor.
NO_TEXT_ENCODER = dict(
    text_encoder=None,
    tokenizer=None,
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
)


def draw_inputs(generator):
    """Context and unconditional context [1, 7, 24], initial noise [1, 4, 16, 16]."""
    context = torch.randn(1, 7, 24, generator=generator)
    uncond_context = torch.randn(1, 7, 24, generator=generator)
    x_T = torch.randn(1, 4, 16, 16, generator=generator)
    return context, uncond_context, x_T


def test_a_whole_text_to_image_run_equals_diffusers_pipeline(tmp_path):
    """Ten steps of DDIM with guidance 7.5: our network, sampler and guidance against diffusers'."""
    network = build_ours("unet")
    save_stable_diffusion(network, tmp_path)
    context, uncond_context, x_T = draw_inputs(torch.Generator().manual_seed(0))

    # diffusers
    scheduler, timesteps = make_scheduler(10)
    pipeline = StableDiffusionPipeline(
        vae=build_peer("autoencoder"),
        unet=UNet2DConditionModel.from_pretrained(tmp_path),
        scheduler=scheduler,
        **NO_TEXT_ENCODER,
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt_embeds=context,
        negative_prompt_embeds=uncond_context,
        latents=x_T,
        num_inference_steps=10,
        guidance_scale=7.5,
        height=64,
        width=64,
        output_type="latent",
    ).images

    # ours
    denoise, schedule = make_guided_denoiser(network, context, uncond_context, 7.5)
    *_, last = ddim(denoise, schedule, spacing=timesteps, x_T=x_T)
    atol = 1e-4 * float(expected.abs().max())
    torch.testing.assert_close(last.x, expected, rtol=0, atol=atol)


def test_a_whole_inpainting_run_equals_diffusers_pipeline(tmp_path):
    """The same with nine channels: latent, mask (1 = inpaint), latent of the masked image."""
    network, autoencoder = build_ours("inpainting unet"), build_ours("autoencoder")
    save_stable_diffusion(network, tmp_path / "unet")
    save_stable_diffusion(autoencoder, tmp_path / "vae")
    generator = torch.Generator().manual_seed(0)
    context, uncond_context, x_T = draw_inputs(generator)
    image = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 24:] = 1

    # diffusers
    scheduler, timesteps = make_scheduler(10)
    pipeline = StableDiffusionInpaintPipeline(
        vae=AutoencoderKL.from_pretrained(tmp_path / "vae"),
        unet=UNet2DConditionModel.from_pretrained(tmp_path / "unet"),
        scheduler=scheduler,
        **NO_TEXT_ENCODER,
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt_embeds=context,
        negative_prompt_embeds=uncond_context,
        latents=x_T,
        image=image,
        mask_image=mask,
        strength=1.0,
        num_inference_steps=10,
        guidance_scale=7.5,
        height=64,
        width=64,
        output_type="latent",
        generator=torch.Generator().manual_seed(5),
    ).images

    # ours
    with torch.no_grad():
        posterior = autoencoder.encode(image * (mask < 0.5))
        masked_latent = posterior.sample(torch.Generator().manual_seed(5)) * autoencoder.scale
    small_mask = torch.nn.functional.interpolate(mask, (16, 16))
    conditioning = torch.cat([small_mask, masked_latent], dim=1)  # [1, 5, 16, 16]
    denoise, schedule = make_guided_denoiser(network, context, uncond_context, 7.5, conditioning)
    *_, last = ddim(denoise, schedule, spacing=timesteps, x_T=x_T)
    atol = 1e-4 * float(expected.abs().max())
    torch.testing.assert_close(last.x, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "tensors, model",
    [
        ({"add_embedding.linear_1.weight": (4, 4)}, "Stable Diffusion XL"),
        ({"label_emb.0.0.weight": (4, 4)}, "Stable Diffusion XL"),
        (
            {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (4, 1024)},
            "Stable Diffusion 2",
        ),
        (
            {"time_embed.0.weight": (4, 4), "input_blocks.1.1.qkv.weight": (12, 4, 1)},
            "guided-diffusion",
        ),
    ],
)
def test_weights_of_another_model_are_named(tmp_path, tensors, model):
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, path)
    with pytest.raises(ValueError, match=f"model.safetensors holds weights of {model}"):
        build_ours("UNet").load_stable_diffusion(path)
