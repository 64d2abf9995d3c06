import json
import pickle

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionInpaintPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

from easy_diffusion.autoencoder import Autoencoder
from easy_diffusion.diffusion import GaussianDiffusion
from easy_diffusion.samplers import ddim, guided
from easy_diffusion.schedule import NoiseSchedule
from easy_diffusion.stable_diffusion import load, read, save, tensor_names
from easy_diffusion.unet import UNet

KINDS = ["unet", "inpainting unet", "autoencoder"]


def ours(kind):
    """Narrow networks of Stable Diffusion's layout; weights random everywhere, also where training begins at zero."""
    torch.manual_seed(0)
    if kind == "autoencoder":
        module = Autoencoder(channels=(32, 64, 64), scale=0.18215)
    else:
        module = UNet(9 if "inpainting" in kind else 4, 4, (32, 64, 64, 64), context_dim=24, attention=(True, True, True, False), heads=4)
    for parameter in module.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.1)
    return module.eval()


def theirs(kind):
    """The same of diffusers, of other weights."""
    torch.manual_seed(1)
    if kind == "autoencoder":
        return AutoencoderKL(block_out_channels=(32, 64, 64), layers_per_block=2, latent_channels=4, norm_num_groups=32,
                             down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3).eval()
    return UNet2DConditionModel(block_out_channels=(32, 64, 64, 64), cross_attention_dim=24, attention_head_dim=4,
                                in_channels=9 if "inpainting" in kind else 4).eval()


def answers(module, kind):
    """What a module says to a fixed input, and the gradient of a fixed sum at its first convolution."""
    g = torch.Generator().manual_seed(2)
    if kind == "autoencoder":
        x, z = torch.randn(2, 3, 32, 48, generator=g), torch.randn(2, 4, 8, 12, generator=g)
        if isinstance(module, Autoencoder):
            posterior = module.encode(x)
            out = [posterior.mean, posterior.log_variance, module.decode(z)]
        else:
            posterior = module.encode(x).latent_dist
            out = [posterior.mean, posterior.logvar, module.decode(z).sample]
        first = module.encoder.conv_in.weight
    else:
        x, words = torch.randn(2, module.conv_in.in_channels, 16, 24, generator=g), torch.randn(2, 7, 24, generator=g)
        t = torch.tensor([3, 901])
        out = [module(x, t, words) if isinstance(module, UNet) else module(x, t, words).sample]
        first = module.conv_in.weight
    module.zero_grad()
    sum((o * torch.randn(o.shape, generator=g)).sum() for o in out).backward()
    return [*(o.detach() for o in out), first.grad]


def assert_the_same(a, b, kind):
    for x, y in zip(answers(a, kind), answers(b, kind), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["part", "pipeline"])
def test_diffusers_weights_give_diffusers_answers(kind, where, tmp_path):
    peer, module = theirs(kind), ours(kind)
    peer.save_pretrained(tmp_path if where == "part" else tmp_path / ("vae" if kind == "autoencoder" else "unet"))
    module.load_stable_diffusion(tmp_path)
    assert_the_same(module, peer, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_what_we_save_diffusers_loads(kind, tmp_path):
    module = ours(kind)
    save(module, tmp_path)
    peer, report = (AutoencoderKL if kind == "autoencoder" else UNet2DConditionModel).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_the_same(module, peer.eval(), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_the_originals_file_there_and_back(kind, suffix, tmp_path):
    """Ours to the original's names; diffusers' own converter reads the same network from them; and we read our own file."""
    module, path = ours(kind), tmp_path / "model.safetensors"
    save(module, path)
    prefix = "first_stage_model." if kind == "autoencoder" else "model.diffusion_model."
    part = "Autoencoder" if kind == "autoencoder" else "UNet"
    state = {prefix + name: tensor for name, tensor in read(path, part).items()}
    if kind == "autoencoder":           # as the original has them: attention of 1×1 convolutions
        state = {name: tensor[:, :, None, None] if ".attn_1." in name and tensor.ndim == 2 else tensor for name, tensor in state.items()}
    peer = theirs(kind)
    converted = (convert_ldm_vae_checkpoint if kind == "autoencoder" else convert_ldm_unet_checkpoint)(dict(state), dict(peer.config))
    peer.load_state_dict(converted, strict=True)
    assert_the_same(module, peer, kind)
    if suffix == "ckpt":
        path = tmp_path / "model.ckpt"
        extra = {"model_ema.decay": torch.tensor(0.9), "cond_stage_model.transformer.text_model.x": torch.ones(2), "betas": torch.ones(3)}
        torch.save({"state_dict": state | extra, "global_step": 7, "callbacks": {Foreign: Foreign()}}, path)
    again = ours(kind)
    for parameter in again.parameters():
        torch.nn.init.zeros_(parameter)
    load(again, path)
    assert_the_same(again, module, kind)
    if suffix == "ckpt":
        assert list(read(path, "text encoder")) == ["text_model.x"]


class Foreign:
    """Some object that a training framework pickled beside the tensors."""


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from the file was run')",))


def test_nothing_but_tensors_is_built_from_a_pickle(tmp_path):
    network = ours("unet")
    state = {f"model.diffusion_model.{names[1]}": network.state_dict()[name] for name, names in tensor_names(network).items()}
    torch.save({"state_dict": state, "evil": Evil(), "list": [Evil(), {1: Evil()}]}, tmp_path / "model.ckpt")
    load(ours("unet"), tmp_path / "model.ckpt")
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps({"state_dict": Evil()}))
    with pytest.raises(ValueError, match="bare.ckpt is damaged"):
        load(ours("unet"), tmp_path / "bare.ckpt")


def test_older_folders_of_diffusers_name_the_attention_otherwise(tmp_path):
    peer, module = theirs("autoencoder"), ours("autoencoder")
    old = {}
    for name, tensor in peer.state_dict().items():
        for new, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        old[name] = tensor.contiguous()
    from safetensors.torch import save_file
    save_file(old, tmp_path / "diffusion_pytorch_model.safetensors")
    assert_the_same(module.load_stable_diffusion(tmp_path), peer, "autoencoder")


def test_all_that_does_not_fit_is_named_at_once(tmp_path):
    network = ours("unet")
    save(network, tmp_path)
    from safetensors.torch import load_file, save_file
    state = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    del state["conv_in.bias"], state["mid_block.attentions.0.norm.weight"]
    state["conv_out.bias"], state["stranger.weight"] = torch.zeros(9), torch.zeros(2, 2)
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError) as error:
        load(network, tmp_path)
    for words in ("missing: conv_in.bias (32,)", "missing: middle.1.norm.weight (64,)", "shape of conv_out.bias: (9,)",
                  "unknown: stranger.weight"):
        assert words in str(error.value)


def test_wrong_places_and_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="unet"):
        load(ours("unet"), tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 20)
    (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04 and no more")
    for name in ("cut.safetensors", "cut.ckpt"):
        with pytest.raises(ValueError, match=name):
            load(ours("unet"), tmp_path / name)
    save(ours("autoencoder"), tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="holds no UNet"):
        load(ours("unet"), tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="patch = 1"):
        save(UNet(channels=(32, 64), context_dim=16, pooled=True), tmp_path)


def test_the_published_sizes():
    def count(build):
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in build().parameters())
    assert count(UNet.stable_diffusion_15) == 859_520_964
    assert count(lambda: UNet.stable_diffusion_15(in_channels=9)) == 859_535_364
    assert count(Autoencoder.stable_diffusion) == 83_653_863
    with torch.device("meta"):
        assert len(UNet.stable_diffusion_15().state_dict()) == 686 and len(Autoencoder.stable_diffusion().state_dict()) == 248


def test_the_configuration_says_what_stable_diffusions_does(tmp_path):
    save(ours("unet"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["down_block_types"] == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert config["up_block_types"] == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3


def guidance_of(network, words, nothing, scale, extra=None):
    diffusion = GaussianDiffusion(NoiseSchedule.scaled_linear(1000), predicts="noise")
    def answer(x, t, context, mask):
        return network(x if extra is None else torch.cat([x, extra.expand(len(x), -1, -1, -1)], dim=1), t, context, mask)
    return guided(diffusion.denoiser(answer, words), diffusion.denoiser(answer, nothing), scale), diffusion.schedule


def scheduler_and_timesteps(steps):
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True,
                              steps_offset=1)
    scheduler.set_timesteps(steps)
    return scheduler, scheduler.timesteps.tolist()


def the_rest(scheduler):
    """A pipeline's other parts: none, since words come as tensors and latents stay latents."""
    return dict(text_encoder=None, tokenizer=None, scheduler=scheduler, safety_checker=None, feature_extractor=None,
                requires_safety_checker=False)


def test_a_whole_text_to_image_run_equals_diffusers_pipeline(tmp_path):
    """Ten steps of DDIM with guidance 7.5: our network, our sampler, our guidance, against theirs."""
    network, (scheduler, timesteps) = ours("unet"), scheduler_and_timesteps(10)
    save(network, tmp_path)
    pipe = StableDiffusionPipeline(vae=theirs("autoencoder"), unet=UNet2DConditionModel.from_pretrained(tmp_path), **the_rest(scheduler))
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(0)
    words, nothing, x_T = torch.randn(1, 7, 24, generator=g), torch.randn(1, 7, 24, generator=g), torch.randn(1, 4, 16, 16, generator=g)
    expected = pipe(prompt_embeds=words, negative_prompt_embeds=nothing, latents=x_T, num_inference_steps=10, guidance_scale=7.5,
                    height=64, width=64, output_type="latent").images
    denoise, schedule = guidance_of(network, words, nothing, 7.5)
    *_, last = ddim(denoise, schedule, spacing=timesteps, x_T=x_T)
    torch.testing.assert_close(last.x, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_a_whole_inpainting_run_equals_diffusers_pipeline(tmp_path):
    """The same with nine channels: latent, mask (1 = repaint), latent of the masked picture by our autoencoder."""
    network, autoencoder, (scheduler, timesteps) = ours("inpainting unet"), ours("autoencoder"), scheduler_and_timesteps(10)
    save(network, tmp_path / "unet")
    save(autoencoder, tmp_path / "vae")
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    pipe = StableDiffusionInpaintPipeline(vae=vae, unet=UNet2DConditionModel.from_pretrained(tmp_path / "unet"), **the_rest(scheduler))
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(0)
    words, nothing, x_T = torch.randn(1, 7, 24, generator=g), torch.randn(1, 7, 24, generator=g), torch.randn(1, 4, 16, 16, generator=g)
    picture, mask = torch.rand(1, 3, 64, 64, generator=g) * 2 - 1, torch.zeros(1, 1, 64, 64)
    mask[..., 24:] = 1
    expected = pipe(prompt_embeds=words, negative_prompt_embeds=nothing, latents=x_T, image=picture, mask_image=mask, strength=1.0,
                    num_inference_steps=10, guidance_scale=7.5, height=64, width=64, output_type="latent",
                    generator=torch.Generator().manual_seed(5)).images
    with torch.no_grad():
        latent = autoencoder.encode(picture * (mask < 0.5)).sample(torch.Generator().manual_seed(5)) * autoencoder.scale
    extra = torch.cat([torch.nn.functional.interpolate(mask, (16, 16)), latent], dim=1)     # [1, 5, 16, 16]
    denoise, schedule = guidance_of(network, words, nothing, 7.5, extra)
    *_, last = ddim(denoise, schedule, spacing=timesteps, x_T=x_T)
    torch.testing.assert_close(last.x, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
