import json
import socket
import types

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionInpaintPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from easy_diffusion.demo import main
from easy_diffusion.inpainting.stable_diffusion_inpainter import (
    compute_working_size,
    make_inpainter_from_networks,
    make_stable_diffusion_inpainter,
)
from easy_diffusion.inpainting.stable_diffusion_pipeline import (
    convert_to_safetensors,
    load_pipeline,
)
from easy_diffusion.networks.autoencoder import Autoencoder
from easy_diffusion.networks.stable_diffusion_weights import PARTS, save_stable_diffusion
from easy_diffusion.networks.unet import UNet

# ---------------------------------------------------------------- a tiny Stable Diffusion


def make_networks():
    """A narrow UNet and Autoencoder of Stable Diffusion's layout, f = 4.

    All weights are random, also those that are initialized with zeros for training.
    """
    torch.manual_seed(0)
    network = UNet(
        9,
        4,
        (32, 64, 64, 64),
        context_dim=24,
        attention=(True, True, True, False),
        heads=4,
    ).eval()
    autoencoder = Autoencoder(channels=(32, 32, 32), blocks=1, scale=0.18215).eval()
    for parameter in (*network.parameters(), *autoencoder.parameters()):
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.1)
    return network, autoencoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All parts of a tiny Stable Diffusion in diffusers' layout.

    Like the published one, its model_index.json lists a safety checker.
    """
    folder = tmp_path_factory.mktemp("sd") / "inpainting"
    network, autoencoder = make_networks()
    save_stable_diffusion(network, folder / "unet")
    save_stable_diffusion(autoencoder, folder / "vae")

    text_config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=512,
        eos_token_id=513,
    )
    CLIPTextModel(text_config).save_pretrained(folder / "text_encoder")

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary_file = folder / "tokenizer" / "vocab.json"
    merges_file = folder / "tokenizer" / "merges.txt"
    (folder / "tokenizer").mkdir()
    vocabulary_file.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    merges_file.write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        vocab=str(vocabulary_file), merges=str(merges_file), model_max_length=77
    )
    tokenizer.save_pretrained(folder / "tokenizer")

    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        skip_prk_steps=True,
        set_alpha_to_one=False,
    )
    scheduler.save_pretrained(folder / "scheduler")

    (folder / "model_index.json").write_text(json.dumps({
        "_class_name": "StableDiffusionInpaintPipeline",
        "_diffusers_version": "0.6.0",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }))
    return folder


@pytest.fixture(scope="module")
def single_file(folder, tmp_path_factory):
    """The same weights in one file with the original's names.

    Returns its path, a folder with the configuration but no weights, and the state dict.
    """
    output = tmp_path_factory.mktemp("single")
    state_dict = {}
    for module in make_networks():
        save_stable_diffusion(module, output / "part.safetensors")
        state_dict |= load_file(output / "part.safetensors")
    prefix = PARTS["text encoder"][1]
    text_weights = load_file(folder / "text_encoder" / "model.safetensors")
    for name, tensor in text_weights.items():
        state_dict[prefix + name.removeprefix("text_model.")] = tensor
    save_file(state_dict, output / "model.safetensors")

    for file in folder.rglob("*"):
        if file.suffix in (".json", ".txt"):
            copy = output / "config" / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(file.read_text())
    return output / "model.safetensors", output / "config", state_dict


@pytest.fixture(scope="module")
def pipeline(folder):
    return load_pipeline(folder, device="cpu")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Any network connection fails the test."""

    def refuse(self, address):
        raise AssertionError(f"a network connection was opened: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def make_scene(height, width, seed=0):
    """A smooth random image whose right third is grey and masked.

    The mask begins at a column that is not a multiple of the latents' factor.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(y / rng.uniform(3, 9) + x / rng.uniform(3, 9)) for _ in range(3)]
    image = 120 + 60 * np.stack(waves, axis=-1) + rng.normal(0, 4, (height, width, 3))
    image = image.round().astype(np.uint8)
    mask = np.zeros((height, width), dtype=bool)
    mask[:, width * 2 // 3 + 1:] = True
    image[mask] = 127
    return image, mask


def encode_prompts(pipeline):
    """context and uncond_context of a prompt and a negative prompt, [1, 77, 24] each."""
    embeddings = pipeline.encode_prompt("a bowl", "cpu", 1, True, "blurred")
    return [tensor.detach() for tensor in embeddings]


def make_both_inpainters(pipeline, progress=(iter, iter), **options):
    """diffusers' pipeline and our networks, with the same weights, prompts and noise."""
    theirs = make_stable_diffusion_inpainter(
        pipeline,
        "a bowl",
        "blurred",
        generator=torch.Generator().manual_seed(7),
        progress=progress[0],
        **options,
    )
    ours = make_inpainter_from_networks(
        *make_networks(),
        *encode_prompts(pipeline),
        generator=torch.Generator().manual_seed(7),
        progress=progress[1],
        **options,
    )
    return theirs, ours


# ---------------------------------------------------------------- inpainting


@pytest.mark.parametrize("height, width", [(64, 64), (48, 80), (37, 51), (130, 31)])
def test_pixels_outside_the_mask_stay_unchanged_at_any_size(pipeline, height, width):
    image, mask = make_scene(height, width)
    original_image = image.copy()
    original_mask = mask.copy()
    for inpaint in make_both_inpainters(pipeline, size=64, steps=1, guidance=1):
        inpainted = inpaint(image, mask)
        assert inpainted.dtype == np.uint8
        assert inpainted.shape == image.shape
        assert np.array_equal(inpainted[~mask], image[~mask])
        assert (inpainted[mask] != 127).mean() > 0.8    # the grey is replaced
    assert np.array_equal(image, original_image)
    assert np.array_equal(mask, original_mask)


@pytest.mark.parametrize("sampler, strength, guidance", [
    ("ddim", 1.0, 7.5),
    ("ddim", 0.6, 1.0),
    ("dpm_solver", 1.0, 7.5),
    ("dpm_solver", 0.6, 1.0),
])
def test_our_networks_equal_diffusers_pipeline(pipeline, sampler, strength, guidance):
    """The same weights, noise and steps. The latents after each step agree within 3e-5 of their
    largest value. The images, after decoding, resizing and rounding, agree within one level of 255,
    and exactly in 99.9% of the values."""
    image, mask = make_scene(45, 70)
    their_steps, our_steps = [], []

    def record_in(steps):
        def progress(sampling):
            for step in sampling:
                steps.append(step)
                yield step

        return progress

    inpaint_theirs, inpaint_ours = make_both_inpainters(
        pipeline,
        [record_in(their_steps), record_in(our_steps)],
        size=64,
        steps=5,
        guidance=guidance,
        sampler=sampler,
        strength=strength,
    )
    for _ in range(2):                                  # the second call has other noise
        theirs = inpaint_theirs(image, mask).astype(int)
        ours = inpaint_ours(image, mask).astype(int)
        assert np.abs(theirs - ours).max() <= 1
        assert (theirs == ours)[mask].mean() > 0.999
        assert len(np.unique(theirs[mask])) > 100
    steps_per_call = int(5 * strength)
    assert len(their_steps) == len(our_steps) == 2 * steps_per_call
    for their_step, our_step in zip(their_steps, our_steps):
        assert (their_step.index, their_step.t) == (our_step.index, our_step.t)
        tolerance = 3e-5 * float(their_step.x.abs().max())
        torch.testing.assert_close(our_step.x, their_step.x, rtol=0, atol=tolerance)
    assert not torch.equal(their_steps[0].x, their_steps[steps_per_call].x)


def test_the_same_seed_gives_the_same_image_and_the_prompt_matters(pipeline):
    image, mask = make_scene(64, 64)

    def inpainted(prompt, seed):
        generator = torch.Generator().manual_seed(seed)
        inpaint = make_stable_diffusion_inpainter(
            pipeline, prompt, size=64, steps=2, generator=generator
        )
        return inpaint(image, mask)

    assert np.array_equal(inpainted("soup", 0), inpainted("soup", 0))
    assert not np.array_equal(inpainted("soup", 0), inpainted("soup", 1))
    assert not np.array_equal(inpainted("soup", 0), inpainted("rice", 0))


@pytest.mark.parametrize("whose", ["diffusers", "ours"])
def test_progress_gets_every_step_and_can_stop_the_sampling(pipeline, whose):
    class StopSampling(Exception):
        pass

    indices, finished = [], []

    def progress(sampling):
        for step in sampling:
            indices.append(step.index)
            if len(indices) == 5:
                raise StopSampling
            yield step
        finished.append(len(indices))

    inpainters = make_both_inpainters(pipeline, (progress, progress), size=64, steps=3)
    inpaint = inpainters[whose == "ours"]
    inpaint(*make_scene(64, 64))
    assert indices == [0, 1, 2]
    assert finished == [3]
    with pytest.raises(StopSampling):
        inpaint(*make_scene(64, 64))
    assert indices == [0, 1, 2, 0, 1]


def test_an_empty_mask_runs_no_network_and_a_full_mask_works(pipeline):
    def fail(sampling):
        raise AssertionError("the sampling loop was started")

    image, mask = make_scene(37, 51)
    for inpaint in make_both_inpainters(pipeline, (fail, fail), size=64, steps=1):
        unchanged = inpaint(image, np.zeros_like(mask))
        assert np.array_equal(unchanged, image)
        assert unchanged is not image
    for inpaint in make_both_inpainters(pipeline, size=64, steps=1):
        assert inpaint(image, np.ones_like(mask)).shape == image.shape


def test_the_mask_covers_whole_latents_and_hides_all_masked_pixels(pipeline):
    """A latent is inpainted if any of its pixels is masked, and the colours under the mask do not
    change the network's input."""
    network, autoencoder = make_networks()
    inputs = []
    network.conv_in.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    context = torch.zeros(1, 3, 24)
    for image, mask in (make_scene(64, 64), make_scene(90, 90), make_scene(30, 40)):
        for colour in (0, 255):
            image[mask] = colour
            generator = torch.Generator().manual_seed(0)
            inpaint = make_inpainter_from_networks(
                network, autoencoder, context, context, size=64, steps=1, generator=generator
            )
            inpaint(image, mask)
        assert torch.equal(inputs[-1], inputs[-2])

    # One masked column: the last of 16 latents is masked.
    image, mask = make_scene(64, 64)
    mask[:] = False
    mask[:, 62] = True
    inpaint = make_inpainter_from_networks(
        network, autoencoder, context, context, size=64, steps=1
    )
    inpaint(image, mask)
    assert inputs[-1][0, 4, 0].tolist() == [0.0] * 15 + [1.0]


IMAGE = np.zeros((8, 9, 3), np.uint8)
MASK = np.zeros((8, 9), bool)


@pytest.mark.parametrize("image, mask, message", [
    (IMAGE, np.zeros((9, 8), bool), r"bool \[8, 9\].*not bool \[9, 8\]"),
    (IMAGE, np.zeros((8, 9), np.uint8), r"bool \[8, 9\].*not uint8 \[8, 9\]"),
    (IMAGE, np.zeros((8, 9, 1), bool), r"not bool \[8, 9, 1\]"),
    (np.zeros((8, 9, 3)), MASK, r"uint8 \[H, W, 3\], not float64 \[8, 9, 3\]"),
    (np.zeros((8, 9, 4), np.uint8), MASK, r"not uint8 \[8, 9, 4\]"),
    (np.zeros((8, 9), np.uint8), MASK, r"not uint8 \[8, 9\]"),
])
def test_a_wrong_image_or_mask_is_refused(pipeline, image, mask, message):
    for inpaint in make_both_inpainters(pipeline, size=64, steps=1):
        with pytest.raises(ValueError, match=message):
            inpaint(image, mask)


@pytest.mark.parametrize("options, message", [
    (dict(size=60), "multiple of 32 for this network, not 60"),
    (dict(size=0), "not 0"),
    (dict(guidance=0.5), "guidance must be at least 1 .* not 0.5"),
    (dict(strength=0), "strength .* not 0"),
    (dict(strength=1.5), "not 1.5"),
    (dict(strength=0.1), "not 0.1 with 5 steps"),
    (dict(sampler="euler"), "ddim, dpm_solver, not 'euler'"),
    (dict(steps=0), "with 0 steps"),
])
def test_options_out_of_range_are_refused(pipeline, options, message):
    context = torch.zeros(1, 3, 24)
    options = dict(size=64, steps=5) | options
    with pytest.raises(ValueError, match=message):
        make_stable_diffusion_inpainter(pipeline, "", **options)
    with pytest.raises(ValueError, match=message):
        make_inpainter_from_networks(*make_networks(), context, context, **options)


def test_a_unet_with_other_input_channels_is_refused():
    network = UNet(4, 4, (32, 64), context_dim=24)
    _, autoencoder = make_networks()
    context = torch.zeros(1, 3, 24)
    with pytest.raises(ValueError, match="9 input channels .*this one has 4"):
        make_inpainter_from_networks(network, autoencoder, context, context, size=64)


def test_half_precision_gives_nearly_the_same_image(folder, pipeline, monkeypatch):
    """Two steps of untrained networks. bfloat16 has 8 significant bits, which changes some levels
    of colours whose standard deviation is 35 levels.

    diffusers draws the noise in bfloat16, which before PyTorch 2.15 is different noise. Here it
    draws in float32, as we do.
    """
    def randn_in_float32(*shape, dtype=None, **options):
        return torch.randn(*shape, **options).to(dtype=dtype)

    diffusers_torch = types.SimpleNamespace(**vars(torch) | {"randn": randn_in_float32})
    monkeypatch.setattr("diffusers.utils.torch_utils.torch", diffusers_torch)
    image, mask = make_scene(64, 64)
    dtype = torch.bfloat16
    network, autoencoder = make_networks()
    in_float32 = make_both_inpainters(pipeline, size=64, steps=2)
    half_pipeline = load_pipeline(folder, device="cpu", dtype=dtype)
    theirs_in_half, _ = make_both_inpainters(half_pipeline, size=64, steps=2)
    ours_in_half = make_inpainter_from_networks(
        network.to(dtype),
        autoencoder.to(dtype),
        *encode_prompts(pipeline),
        size=64,
        steps=2,
        generator=torch.Generator().manual_seed(7),
    )
    for inpaint, inpaint_half in zip(in_float32, (theirs_in_half, ours_in_half)):
        inpainted = inpaint(image, mask).astype(int)
        inpainted_half = inpaint_half(image, mask).astype(int)
        assert np.array_equal(inpainted[~mask], inpainted_half[~mask])
        assert np.abs(inpainted - inpainted_half)[mask].mean() < 8


@pytest.mark.parametrize("offload", [False, True])
def test_on_a_gpu_the_pipeline_is_float16_and_can_be_offloaded(folder, monkeypatch, offload):
    calls = []

    def record(name):
        def call(self, *arguments, **options):
            calls.append((name, *arguments, *options.values()))
            return self

        return call

    for name in ("to", "enable_model_cpu_offload"):
        monkeypatch.setattr(StableDiffusionInpaintPipeline, name, record(name))
    pipe = load_pipeline(folder, device="cuda", offload=offload)
    expected = "enable_model_cpu_offload" if offload else "to"
    assert calls == [(expected, torch.device("cuda"))]
    for network in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert network.dtype == torch.float16


# ---------------------------------------------------------------- files


def test_a_single_file_gives_the_same_result_as_the_folder(folder, single_file, pipeline):
    path, config, _ = single_file
    image, mask = make_scene(64, 64)

    def inpainted(source, **options):
        inpaint = make_stable_diffusion_inpainter(
            source,
            "a bowl",
            size=64,
            steps=2,
            device="cpu",
            generator=torch.Generator().manual_seed(0),
            **options,
        )
        return inpaint(image, mask)

    expected = inpainted(pipeline)
    assert np.array_equal(inpainted(str(folder)), expected)
    assert np.array_equal(inpainted(path, config=config), expected)
    assert np.array_equal(inpainted(str(path), config=str(config)), expected)


class RunsCode:
    """An object whose pickle runs code when it is loaded."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code from the file was run')",))


def copy_folder(folder, to):
    for file in folder.rglob("*"):
        if file.is_file():
            copy = to / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    return to


def test_pickles_are_refused_and_can_be_converted(folder, single_file, pipeline, tmp_path):
    # A single file.
    _, config, state_dict = single_file
    checkpoint = {"state_dict": state_dict, "callbacks": [RunsCode()]}
    torch.save(checkpoint, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="pickle.*to_safetensors.*model.ckpt"):
        load_pipeline(tmp_path / "model.ckpt", config, "cpu")
    converted = convert_to_safetensors(tmp_path / "model.ckpt")
    assert converted == tmp_path / "model.safetensors"
    loaded = load_file(converted)
    assert loaded.keys() == state_dict.keys()
    assert all(torch.equal(loaded[name], state_dict[name]) for name in state_dict)

    # A folder.
    copy = copy_folder(folder, tmp_path / "pickled")
    for file in list(copy.rglob("*.safetensors")):
        name = "pytorch_model.bin" if file.stem == "model" else f"{file.stem}.bin"
        torch.save(load_file(file), file.with_name(name))
        file.unlink()
    with pytest.raises(ValueError, match="unet, vae, text_encoder .*pickles.*to_safetensors"):
        load_pipeline(copy, device="cpu")
    assert convert_to_safetensors(copy) == copy
    converted_pipeline = load_pipeline(copy, device="cpu")
    for part in ("unet", "vae", "text_encoder"):
        expected = getattr(pipeline, part).state_dict()
        loaded = getattr(converted_pipeline, part).state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_missing_files_are_named(folder, single_file, tmp_path):
    with pytest.raises(FileNotFoundError, match="no Stable Diffusion at .*nowhere"):
        make_stable_diffusion_inpainter(tmp_path / "nowhere", "soup")

    copy = copy_folder(folder, tmp_path / "part")
    for file in (copy / "unet").iterdir():
        file.unlink()
    (copy / "scheduler" / "scheduler_config.json").unlink()
    missing = r"lacks unet/config.json, scheduler/scheduler_config.json, unet/\*.safetensors"
    with pytest.raises(FileNotFoundError, match=missing):
        load_pipeline(copy, device="cpu")

    path, _, _ = single_file
    name_on_the_hub = "stable-diffusion-v1-5/stable-diffusion-inpainting"
    for wrong_config in (None, tmp_path / "nowhere", name_on_the_hub):
        with pytest.raises(FileNotFoundError, match="config=FOLDER"):
            load_pipeline(path, wrong_config, "cpu")
    with pytest.raises(FileNotFoundError, match="lacks model_index.json"):
        load_pipeline(path, tmp_path, "cpu")


def test_a_folder_with_only_float16_weights_is_loaded(folder, pipeline, tmp_path):
    copy = copy_folder(folder, tmp_path / "half")
    for file in list(copy.rglob("*.safetensors")):
        half = {name: tensor.half() for name, tensor in load_file(file).items()}
        save_file(half, file.with_name(f"{file.stem}.fp16.safetensors"), {"format": "pt"})
        file.unlink()
    loaded = load_pipeline(copy, device="cpu", offload=True)
    assert loaded.unet.dtype == torch.float32
    assert loaded.vae.dtype == torch.float32
    parameters = zip(pipeline.unet.parameters(), loaded.unet.parameters(), strict=True)
    for original, converted in parameters:
        assert torch.equal(converted, original.half().float())


# ---------------------------------------------------------------- sizes, and the demo


@pytest.mark.parametrize("shape, size, multiple, expected", [
    ((512, 512), 512, 64, (512, 512)),
    ((64, 64), 512, 64, (512, 512)),
    ((480, 640), 512, 64, (448, 576)),
    ((256, 1024), 512, 64, (256, 1024)),
    ((1, 100), 512, 64, (64, 5120)),
    ((37, 51), 64, 8, (56, 72)),
])
def test_the_working_size_keeps_the_aspect_ratio_and_has_about_size_squared_pixels(
    shape, size, multiple, expected
):
    assert compute_working_size(*shape, size, multiple) == expected


def test_the_demo_animates_a_photograph_with_it(folder, tmp_path):
    """Without training: Stable Diffusion inpaints the mask, and what the camera uncovers."""
    image, _ = make_scene(90, 70)
    mask = np.uint8(255) * np.tri(90, 70, dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "晚饭.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    out = tmp_path / "out"
    arguments = [
        "--image", str(tmp_path / "晚饭.png"),
        "--mask", str(tmp_path / "mask.png"),
        "--inpainter", "sd",
        "--sd", str(folder),
        "--sd-size", "64",
        "--steps", "2",
        "--move", "up",
        "--seconds", "1",
        "--fps", "6",
        "--show", "64",
        "--out", str(out),
    ]
    assert main(arguments) == 0
    assert sorted(path.name for path in out.iterdir()) == ["晚饭.png", "晚饭_up.gif"]
    with Image.open(out / "晚饭_up.gif") as pil_film:
        assert pil_film.n_frames == 6
        assert pil_film.size == (64, 64)
