import collections
import json
import pickle

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionInpaintPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.guidance import guided
from easy_diffusion.diffusion.samplers import ddim
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.networks.autoencoder import Autoencoder
from easy_diffusion.networks.stable_diffusion_weights import (
    load_stable_diffusion,
    map_tensor_names,
    read_stable_diffusion,
    save_stable_diffusion,
)
from easy_diffusion.networks.unet import UNet

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
    save_stable_diffusion(module, tmp_path)
    peer, report = (AutoencoderKL if kind == "autoencoder" else UNet2DConditionModel).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_the_same(module, peer.eval(), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_the_originals_file_there_and_back(kind, suffix, tmp_path):
    """Ours to the original's names; diffusers' own converter reads the same network from them; and we read our own file."""
    module, path = ours(kind), tmp_path / "model.safetensors"
    save_stable_diffusion(module, path)
    prefix = "first_stage_model." if kind == "autoencoder" else "model.diffusion_model."
    part = "Autoencoder" if kind == "autoencoder" else "UNet"
    state = {prefix + name: tensor for name, tensor in read_stable_diffusion(path, part).items()}
    assert all(tensor.ndim == 4 for name, tensor in state.items() if ".attn_1." in name and name.endswith((".q.weight", "proj_out.weight")))
    peer = theirs(kind)
    converted = (convert_ldm_vae_checkpoint if kind == "autoencoder" else convert_ldm_unet_checkpoint)(dict(state), dict(peer.config))
    peer.load_state_dict(converted, strict=True)
    assert_the_same(module, peer, kind)
    if suffix == "ckpt":
        path = tmp_path / "model.ckpt"
        text = CLIPTextModel(CLIPTextConfig(vocab_size=9, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                                            bos_token_id=0, eos_token_id=1))
        inside = {f"cond_stage_model.transformer.text_model.{name}": tensor for name, tensor in text.state_dict().items()}
        extra = {"model_ema.decay": torch.tensor(0.9), "betas": torch.ones(3), "empty": torch.empty(0),
                 "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
        others = {"global_step": 7, "callbacks": {Foreign: Foreign(), "list": ForeignList([Foreign()]), "dict": ForeignDict(a=Foreign())}}
        torch.save({"state_dict": collections.OrderedDict(state | inside | extra)} | others, path)
    again = ours(kind)
    for parameter in again.parameters():
        torch.nn.init.zeros_(parameter)
    load_stable_diffusion(again, path)
    assert_the_same(again, module, kind)
    if suffix == "ckpt":
        text.load_state_dict(read_stable_diffusion(path, "text encoder"), strict=True)


class Foreign:
    """Some object that a training framework pickled beside the tensors."""


class ForeignList(list):
    pass


class ForeignDict(dict):
    pass


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from the file was run')",))


def test_nothing_but_tensors_is_built_from_a_pickle(tmp_path):
    network = ours("unet")
    state = {f"model.diffusion_model.{names[1]}": network.state_dict()[name] for name, names in map_tensor_names(network).items()}
    torch.save({"state_dict": state, "evil": Evil(), "list": [Evil(), {1: Evil()}]}, tmp_path / "model.ckpt")
    load_stable_diffusion(ours("unet"), tmp_path / "model.ckpt")
    for name, content in (("bare", pickle.dumps({"state_dict": Evil()})), ("legacy", b"")):
        (tmp_path / f"{name}.ckpt").write_bytes(content)
    torch.save({"state_dict": Evil()}, tmp_path / "shell.ckpt")
    torch.save({"state_dict": state}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "program.ckpt")
    for name in ("bare", "legacy", "shell", "old", "program"):
        with pytest.raises(ValueError, match=name):
            load_stable_diffusion(ours("unet"), tmp_path / f"{name}.ckpt")


def test_tensors_of_all_kinds_are_read_as_torch_reads_them(tmp_path):
    tensors = {str(dtype): (torch.randn(4, 6) * 9).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64,
                                                                         torch.int64, torch.int32, torch.uint8, torch.bool)}
    whole = torch.randn(5, 7)
    tensors |= {"turned": whole.t(), "part": whole[1:3, ::2], "shared": whole, "one": torch.tensor(3.0),
                "parameter": torch.nn.Parameter(whole)}
    torch.save(tensors, tmp_path / "model.ckpt")
    found = read_stable_diffusion(tmp_path / "model.ckpt", "UNet")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor.detach()), name


def test_a_flipped_byte_is_noticed(tmp_path):
    torch.save({"conv_in.weight": torch.zeros(1000)}, tmp_path / "model.ckpt")
    content = bytearray((tmp_path / "model.ckpt").read_bytes())
    content[content.index(bytes(2000)) + 1000] = 1
    (tmp_path / "model.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        read_stable_diffusion(tmp_path / "model.ckpt", "UNet")


@pytest.mark.parametrize("ending", ["fp16.safetensors", "bin", "fp16.bin"])
def test_half_precision_and_pickled_folders_are_read(ending, tmp_path):
    name = f"diffusion_pytorch_model.{ending}"
    network = ours("unet").half().float()
    state = {names[0]: network.state_dict()[ours].half() for ours, names in map_tensor_names(network).items()}
    (tmp_path / "unet").mkdir()
    (save_file if name.endswith("safetensors") else torch.save)(state, tmp_path / "unet" / name)
    again = UNet(4, 4, (32, 64, 64, 64), context_dim=24, attention=(True, True, True, False), heads=4).load_stable_diffusion(tmp_path)
    assert all(p.dtype == torch.float32 and torch.equal(p, q) for p, q in zip(again.parameters(), network.parameters()))


def test_an_autoencoder_of_its_own_training_is_read(tmp_path):
    module = ours("autoencoder")
    state = {names[1]: module.state_dict()[name] for name, names in map_tensor_names(module).items()}
    torch.save({"state_dict": state | {"loss.logvar": torch.ones(1), "model_ema.decay": torch.ones(1)}}, tmp_path / "vae.ckpt")
    again = Autoencoder(channels=(32, 64, 64)).load_stable_diffusion(tmp_path / "vae.ckpt")
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), module.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_takes_pictures_of_any(kind):
    module = ours(kind).bfloat16()
    if kind == "autoencoder":
        z = module.encode(torch.randn(1, 3, 16, 16)).mean
        assert z.dtype == module.decode(z.float()).dtype == torch.bfloat16
    else:
        x, t, words = torch.randn(1, module.conv_in.in_channels, 16, 16), torch.tensor([5]), torch.randn(1, 3, 24)
        with torch.no_grad():
            torch.testing.assert_close(module(x, t, words), module(x, t, *module.cache_context(words)))


def test_older_folders_of_diffusers_name_the_attention_otherwise(tmp_path):
    peer, module = theirs("autoencoder"), ours("autoencoder")
    old = {}
    for name, tensor in peer.state_dict().items():
        for new, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        old[name] = tensor.contiguous()
    save_file(old, tmp_path / "diffusion_pytorch_model.safetensors")
    assert_the_same(module.load_stable_diffusion(tmp_path), peer, "autoencoder")


def test_all_that_does_not_fit_is_named_at_once(tmp_path):
    network = ours("unet")
    save_stable_diffusion(network, tmp_path)
    state = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    del state["conv_in.bias"], state["mid_block.attentions.0.norm.weight"]
    state["conv_out.bias"], state["stranger.weight"] = torch.zeros(9), torch.zeros(2, 2)
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError) as error:
        load_stable_diffusion(network, tmp_path)
    for words in ("missing: conv_in.bias (32,)", "missing: middle.1.norm.weight (64,)", "shape of conv_out.bias: (9,)",
                  "unexpected: stranger.weight"):
        assert words in str(error.value)


def test_wrong_places_and_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="unet"):
        load_stable_diffusion(ours("unet"), tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 20)
    (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04 and no more")
    for name in ("cut.safetensors", "cut.ckpt"):
        with pytest.raises(ValueError, match=name):
            load_stable_diffusion(ours("unet"), tmp_path / name)
    save_stable_diffusion(ours("autoencoder"), tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="holds no UNet"):
        load_stable_diffusion(ours("unet"), tmp_path / "vae.safetensors")
    for options, says in ((dict(context_dim=16, pooled=True), "pooled = True"), (dict(context_dim=16, patch=2), "patch = 2"), ({}, "None")):
        with pytest.raises(ValueError, match=f"this UNet has .*{says}"):
            save_stable_diffusion(UNet(channels=(32, 64), **options), tmp_path)
    with pytest.raises(ValueError, match="not into a Linear"):
        load_stable_diffusion(torch.nn.Linear(1, 1), tmp_path)


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
    save_stable_diffusion(ours("unet"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["down_block_types"] == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert config["up_block_types"] == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3


def guidance_of(network, words, nothing, scale, extra=None):
    diffusion = GaussianDiffusion(NoiseSchedule.scaled_linear(1000), prediction_type="eps")
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
    save_stable_diffusion(network, tmp_path)
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
    save_stable_diffusion(network, tmp_path / "unet")
    save_stable_diffusion(autoencoder, tmp_path / "vae")
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
