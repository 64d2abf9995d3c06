import json
import socket

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionInpaintPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from easy_diffusion.animation.camera import uncover
from easy_diffusion.demo import main
from easy_diffusion.inpainting.blending import blend
from easy_diffusion.inpainting.stable_diffusion_inpainter import (
    compute_working_size,
    convert_to_safetensors,
    load_pipeline,
    make_inpainter_from_networks,
    make_stable_diffusion_inpainter,
)
from easy_diffusion.networks.autoencoder import Autoencoder
from easy_diffusion.networks.stable_diffusion_weights import PARTS, save_stable_diffusion
from easy_diffusion.networks.unet import UNet


def networks():
    """Narrow ones of Stable Diffusion's layout, f = 4; weights random everywhere, also where training begins at zero."""
    torch.manual_seed(0)
    network = UNet(9, 4, (32, 64, 64, 64), context_dim=24, attention=(True, True, True, False), heads=4).eval()
    autoencoder = Autoencoder(channels=(32, 32, 32), blocks=1, scale=0.18215).eval()
    for parameter in (*network.parameters(), *autoencoder.parameters()):
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.1)
    return network, autoencoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All parts of a tiny Stable Diffusion as diffusers' folder; as the published one, it speaks of a safety checker."""
    folder, (network, autoencoder) = tmp_path_factory.mktemp("sd") / "inpainting", networks()
    save_stable_diffusion(network, folder / "unet")
    save_stable_diffusion(autoencoder, folder / "vae")
    text = CLIPTextModel(CLIPTextConfig(vocab_size=514, hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                                        bos_token_id=512, eos_token_id=513))
    text.save_pretrained(folder / "text_encoder")
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(vocab=str(folder / "tokenizer" / "vocab.json"), merges=str(folder / "tokenizer" / "merges.txt"),
                  model_max_length=77).save_pretrained(folder / "tokenizer")
    PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, skip_prk_steps=True,
                  set_alpha_to_one=False).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({
        "_class_name": "StableDiffusionInpaintPipeline", "_diffusers_version": "0.6.0",
        "feature_extractor": ["transformers", "CLIPImageProcessor"], "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "scheduler": ["diffusers", "PNDMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"]}))
    return folder


@pytest.fixture(scope="module")
def single(folder, tmp_path_factory):
    """The same weights in one file with the original's names; and the folder without its weights."""
    place, state = tmp_path_factory.mktemp("single"), {}
    for module in networks():
        save_stable_diffusion(module, place / "part.safetensors")
        state |= load_file(place / "part.safetensors")
    prefix = PARTS["text encoder"][1]
    state |= {prefix + name.removeprefix("text_model."): tensor
              for name, tensor in load_file(folder / "text_encoder" / "model.safetensors").items()}
    save_file(state, place / "model.safetensors")
    for file in folder.rglob("*"):
        if file.suffix in (".json", ".txt"):
            copy = place / "config" / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(file.read_text())
    return place / "model.safetensors", place / "config", state


@pytest.fixture(scope="module")
def pipeline(folder):
    return load_pipeline(folder, device="cpu")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Whoever asks for the net has failed."""
    def refused(self, address):
        raise AssertionError(f"the network was asked: {address}")
    monkeypatch.setattr(socket.socket, "connect", refused)


def scene(height, width, seed=0):
    """A random smooth picture, its right third grey and to be repainted, from a column that is no multiple of anything."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(y / rng.uniform(3, 9) + x / rng.uniform(3, 9)) for _ in range(3)]
    picture = (120 + 60 * np.stack(waves, axis=-1) + rng.normal(0, 4, (height, width, 3))).round().astype(np.uint8)
    mask = np.zeros((height, width), dtype=bool)
    mask[:, width * 2 // 3 + 1:] = True
    picture[mask] = 127
    return picture, mask


# ---------------------------------------------------------------- the painters

def painters(pipeline, watches=(iter, iter), **settings):
    """diffusers' and ours, of the same weights, words and noise."""
    seeds = [torch.Generator().manual_seed(7) for _ in range(2)]
    return (make_stable_diffusion_inpainter(pipeline, "a bowl", "blurred", generator=seeds[0], progress=watches[0], **settings),
            make_inpainter_from_networks(*networks(), *words_of(pipeline), generator=seeds[1], progress=watches[1], **settings))


def words_of(pipeline):
    """The states of the prompt and of the negative one, [1, 77, 24] each."""
    return [tensor.detach() for tensor in pipeline.encode_prompt("a bowl", "cpu", 1, True, "blurred")]


@pytest.mark.parametrize("height, width", [(64, 64), (48, 80), (37, 51), (130, 31)])
def test_what_is_kept_comes_back_to_the_byte_at_any_size(pipeline, height, width):
    picture, mask = scene(height, width)
    before = picture.copy(), mask.copy()
    for paint in painters(pipeline, size=64, steps=1, guidance=1):
        painted = paint(picture, mask)
        assert painted.dtype == np.uint8 and painted.shape == picture.shape
        assert np.array_equal(painted[~mask], picture[~mask])
        assert (painted[mask] != 127).mean() > 0.8                          # the grey is gone
    assert np.array_equal(picture, before[0]) and np.array_equal(mask, before[1])


@pytest.mark.parametrize("sampler, strength, guidance", [
    ("ddim", 1.0, 7.5), ("ddim", 0.6, 1.0), ("dpm_solver", 1.0, 7.5), ("dpm_solver", 0.6, 1.0)])
def test_ours_equals_diffusers_pipeline(pipeline, sampler, strength, guidance):
    """The same weights, noise and steps. Latents after each step within 3e-5 of their largest; the picture, after the decoder, the way
    back to its size and rounding, within one level of 255, and the same byte in 99.9% of the numbers."""
    picture, mask = scene(45, 70)
    walks = [], []

    def into(steps):
        def progress(walk):
            for step in walk:
                steps.append(step)
                yield step
        return progress

    both = painters(pipeline, [into(steps) for steps in walks], size=64, steps=5, guidance=guidance, sampler=sampler, strength=strength)
    for repaint in range(2):                                                # the second has other noise
        theirs, ours = (paint(picture, mask).astype(int) for paint in both)
        assert np.abs(theirs - ours).max() <= 1 and (theirs == ours)[mask].mean() > 0.999
        assert len(np.unique(theirs[mask])) > 100
    assert len(walks[0]) == len(walks[1]) == 2 * int(5 * strength)
    for a, b in zip(*walks):
        assert (a.index, a.t) == (b.index, b.t)
        torch.testing.assert_close(b.x, a.x, rtol=0, atol=3e-5 * float(a.x.abs().max()))
    assert not torch.equal(walks[0][0].x, walks[0][int(5 * strength)].x)


def test_the_same_seed_paints_the_same_and_words_matter(pipeline):
    picture, mask = scene(64, 64)

    def painted(prompt, seed):
        return make_stable_diffusion_inpainter(pipeline, prompt, size=64, steps=2, generator=torch.Generator().manual_seed(seed))(picture, mask)

    assert np.array_equal(painted("soup", 0), painted("soup", 0))
    assert not np.array_equal(painted("soup", 0), painted("soup", 1))
    assert not np.array_equal(painted("soup", 0), painted("rice", 0))


@pytest.mark.parametrize("whose", ["diffusers", "ours"])
def test_progress_can_be_watched_and_stopped(pipeline, whose):
    class Enough(Exception):
        pass

    seen, ends = [], []

    def progress(walk):
        for step in walk:
            seen.append(step.index)
            if len(seen) == 5:
                raise Enough
            yield step
        ends.append(len(seen))

    paint = painters(pipeline, (progress, progress), size=64, steps=3)[whose == "ours"]
    paint(*scene(64, 64))
    assert seen == [0, 1, 2] and ends == [3]
    with pytest.raises(Enough):
        paint(*scene(64, 64))
    assert seen == [0, 1, 2, 0, 1]


def test_nothing_to_repaint_asks_no_network(pipeline):
    def never(walk):
        raise AssertionError("it walked")

    picture, mask = scene(37, 51)
    for paint in painters(pipeline, (never, never), size=64, steps=1):
        with_nothing = paint(picture, np.zeros_like(mask))
        assert np.array_equal(with_nothing, picture) and with_nothing is not picture
    theirs, ours = painters(pipeline, size=64, steps=1)
    assert theirs(picture, np.ones_like(mask)).shape == ours(picture, np.ones_like(mask)).shape == picture.shape


def test_a_few_hidden_pixels_hide_the_squares_that_they_touch(pipeline):
    """A latent square with one hidden pixel anywhere in it is repainted, and nothing of what lies under the mask reaches the network."""
    network, autoencoder = networks()
    seen = []
    network.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    words = torch.zeros(1, 3, 24)
    for picture, mask in (scene(64, 64), scene(90, 90), scene(30, 40)):
        for colour in (0, 255):
            picture[mask] = colour
            seed = torch.Generator().manual_seed(0)
            make_inpainter_from_networks(network, autoencoder, words, words, size=64, steps=1, generator=seed)(picture, mask)
        assert torch.equal(seen[-1], seen[-2])
    picture, mask = scene(64, 64)
    mask[:], mask[:, 62] = False, True
    make_inpainter_from_networks(network, autoencoder, words, words, size=64, steps=1)(picture, mask)
    assert seen[-1][0, 4, 0].tolist() == [0.0] * 15 + [1.0]


@pytest.mark.parametrize("picture, mask, says", [
    (np.zeros((8, 9, 3), np.uint8), np.zeros((9, 8), bool), r"bool \[8, 9\].*not bool \[9, 8\]"),
    (np.zeros((8, 9, 3), np.uint8), np.zeros((8, 9), np.uint8), r"bool \[8, 9\].*not uint8 \[8, 9\]"),
    (np.zeros((8, 9, 3), np.uint8), np.zeros((8, 9, 1), bool), r"not bool \[8, 9, 1\]"),
    (np.zeros((8, 9, 3)), np.zeros((8, 9), bool), r"uint8 \[H, W, 3\], not float64 \[8, 9, 3\]"),
    (np.zeros((8, 9, 4), np.uint8), np.zeros((8, 9), bool), r"not uint8 \[8, 9, 4\]"),
    (np.zeros((8, 9), np.uint8), np.zeros((8, 9), bool), r"not uint8 \[8, 9\]"),
])
def test_a_picture_or_mask_of_another_form_is_refused(pipeline, picture, mask, says):
    for paint in painters(pipeline, size=64, steps=1):
        with pytest.raises(ValueError, match=says):
            paint(picture, mask)


@pytest.mark.parametrize("settings, says", [
    (dict(size=60), "multiple of 32 for this network, not 60"), (dict(size=0), "not 0"), (dict(guidance=0.5), "guidance is 1 .* not 0.5"),
    (dict(strength=0), "strength .* not 0"), (dict(strength=1.5), "not 1.5"), (dict(strength=0.1), "not 0.1 with 5 steps"),
    (dict(sampler="euler"), "ddim, dpm_solver, not 'euler'"), (dict(steps=0), "with 0 steps"),
])
def test_numbers_out_of_range_are_refused(pipeline, settings, says):
    words = torch.zeros(1, 3, 24)
    for build in (lambda **more: make_stable_diffusion_inpainter(pipeline, "", **more),
                  lambda **more: make_inpainter_from_networks(*networks(), words, words, **more)):
        with pytest.raises(ValueError, match=says):
            build(**dict(size=64, steps=5) | settings)


def test_a_unet_of_other_channels_is_refused():
    network, autoencoder = UNet(4, 4, (32, 64), context_dim=24), networks()[1]
    with pytest.raises(ValueError, match="reads 9: .*this one reads 4"):
        make_inpainter_from_networks(network, autoencoder, torch.zeros(1, 3, 24), torch.zeros(1, 3, 24), size=64)


def test_half_precision_paints_nearly_the_same(folder, pipeline):
    """Two steps of untrained networks; bfloat16 has 8 bits, so of colours that deviate by 35 levels some go."""
    (picture, mask), dtype = scene(64, 64), torch.bfloat16
    network, autoencoder = networks()
    whole = painters(pipeline, size=64, steps=2)
    half = painters(load_pipeline(folder, device="cpu", dtype=dtype), size=64, steps=2)[0], make_inpainter_from_networks(
        network.to(dtype), autoencoder.to(dtype), *words_of(pipeline), size=64, steps=2, generator=torch.Generator().manual_seed(7))
    for one, other in zip(whole, half):
        one, other = one(picture, mask).astype(int), other(picture, mask).astype(int)
        assert np.array_equal(one[~mask], other[~mask])
        assert np.abs(one - other)[mask].mean() < 8


@pytest.mark.parametrize("offload", [False, True])
def test_on_a_gpu_it_is_half_and_may_wait_outside(folder, monkeypatch, offload):
    calls = []
    for name in ("to", "enable_model_cpu_offload"):
        monkeypatch.setattr(StableDiffusionInpaintPipeline, name,
                            lambda self, *at, name=name, **named: calls.append((name, *at, *named.values())) or self)
    pipe = load_pipeline(folder, device="cuda", offload=offload)
    assert calls == [("enable_model_cpu_offload" if offload else "to", torch.device("cuda"))]
    assert pipe.unet.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.float16


# ---------------------------------------------------------------- files

def test_a_single_file_paints_as_the_folder_does(folder, single, pipeline):
    path, config, _ = single
    picture, mask = scene(64, 64)
    paints = [make_stable_diffusion_inpainter(source, "a bowl", size=64, steps=2, device="cpu", generator=torch.Generator().manual_seed(0), **more)
              for source, more in ((pipeline, {}), (str(folder), {}), (path, dict(config=config)), (str(path), dict(config=str(config))))]
    first, *others = (paint(picture, mask) for paint in paints)
    assert all(np.array_equal(first, other) for other in others)


def test_pickles_are_refused_and_the_way_out_works(folder, single, pipeline, tmp_path):
    _, config, state = single
    torch.save({"state_dict": state, "callbacks": [Evil()]}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="pickle.*to_safetensors.*model.ckpt"):
        load_pipeline(tmp_path / "model.ckpt", config, "cpu")
    written = convert_to_safetensors(tmp_path / "model.ckpt")
    assert written == tmp_path / "model.safetensors"
    again = load_file(written)
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)

    copy = copied(folder, tmp_path / "pickled")
    for file in list(copy.rglob("*.safetensors")):
        torch.save(load_file(file), file.with_name("pytorch_model.bin" if file.stem == "model" else f"{file.stem}.bin"))
        file.unlink()
    with pytest.raises(ValueError, match="unet, vae, text_encoder .*pickles.*to_safetensors"):
        load_pipeline(copy, device="cpu")
    assert convert_to_safetensors(copy) == copy
    for name in ("unet", "vae", "text_encoder"):
        theirs, ours = (getattr(pipe, name).state_dict() for pipe in (pipeline, load_pipeline(copy, device="cpu")))
        assert theirs.keys() == ours.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from the file was run')",))


def copied(folder, to):
    for file in folder.rglob("*"):
        if file.is_file():
            (to / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (to / file.relative_to(folder)).write_bytes(file.read_bytes())
    return to


def test_what_a_folder_lacks_is_named_at_once(folder, single, tmp_path):
    with pytest.raises(FileNotFoundError, match="no Stable Diffusion at .*nowhere"):
        make_stable_diffusion_inpainter(tmp_path / "nowhere", "soup")
    copy = copied(folder, tmp_path / "part")
    for file in (copy / "unet").iterdir():
        file.unlink()
    (copy / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks unet/config.json, scheduler/scheduler_config.json, unet/\*.safetensors"):
        load_pipeline(copy, device="cpu")
    path, config, _ = single
    for wrong in (None, tmp_path / "nowhere", "stable-diffusion-v1-5/stable-diffusion-inpainting"):
        with pytest.raises(FileNotFoundError, match="config=FOLDER"):
            load_pipeline(path, wrong, "cpu")
    with pytest.raises(FileNotFoundError, match="lacks model_index.json"):
        load_pipeline(path, tmp_path, "cpu")


def test_a_folder_of_half_precision_alone_is_read(folder, pipeline, tmp_path):
    copy = copied(folder, tmp_path / "half")
    for file in list(copy.rglob("*.safetensors")):
        save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file.with_name(f"{file.stem}.fp16.safetensors"),
                  {"format": "pt"})
        file.unlink()
    again = load_pipeline(copy, device="cpu", offload=True)
    assert again.unet.dtype == again.vae.dtype == torch.float32
    for theirs, ours in zip(pipeline.unet.parameters(), again.unet.parameters(), strict=True):
        assert torch.equal(ours, theirs.half().float())


# ---------------------------------------------------------------- sizes and colours

@pytest.mark.parametrize("shape, size, multiple, expected", [
    ((512, 512), 512, 64, (512, 512)), ((64, 64), 512, 64, (512, 512)), ((480, 640), 512, 64, (448, 576)),
    ((256, 1024), 512, 64, (256, 1024)), ((1, 100), 512, 64, (64, 5120)), ((37, 51), 64, 8, (56, 72)),
])
def test_the_working_size_has_the_pictures_shape_and_size_squared_pixels(shape, size, multiple, expected):
    assert compute_working_size(*shape, size, multiple) == expected


def strip_of(decoder, inpaintings=40, match=True):
    """What a camera sees that goes right by a quarter of the picture each time, its new part painted as the mirror of what is left of it,
    by a painter whose decoder changes the colours. Mean and deviation of the new part after each repaint: [2, inpaintings + 1, 3]."""
    picture = np.random.default_rng(1).normal((150, 110, 80), 12, (256, 64, 3)).round().astype(np.uint8)
    moments = []
    for _ in range(inpaintings + 1):
        newest = picture[:, -16:].astype(float)
        moments.append((newest.mean(axis=(0, 1)), newest.std(axis=(0, 1))))
        seen, mask = uncover(picture, "right", 16)
        whole = seen.astype(np.float32)
        whole[:, 48:] = whole[:, 47:31:-1]
        painted = decoder(whole)
        picture = blend(painted, seen, mask) if match else np.where(mask[..., None], painted.round().astype(np.uint8), seen)
    return np.array(moments).swapaxes(0, 1)


@pytest.mark.parametrize("decoder, alone", [(lambda x: x - 3, 75), (lambda x: x * 0.99, 30)], ids=["3 levels darker", "1% flatter"])
def test_no_drift_over_40_repaints_of_a_strip(decoder, alone):
    """The decoder alone moves the colours by more than `alone` levels. Blended, their mean stays within half a level, their deviation
    within 2%."""
    mean, _ = strip_of(decoder, match=False)
    assert np.abs(mean[-1] - mean[0]).max() > alone
    mean, deviation = strip_of(decoder)
    assert np.abs(mean - mean[0]).max() < 0.5
    assert np.abs(deviation / deviation[0] - 1).max() < 0.02


def test_the_demo_films_a_photograph_with_it(folder, tmp_path):
    """No training: what is new, and what the mask hides, is painted by Stable Diffusion."""
    Image.fromarray(scene(90, 70)[0]).save(tmp_path / "晚饭.png")
    Image.fromarray(np.uint8(255) * np.tri(90, 70, dtype=np.uint8)).save(tmp_path / "mask.png")
    out = tmp_path / "out"
    assert main(["--image", str(tmp_path / "晚饭.png"), "--mask", str(tmp_path / "mask.png"), "--inpainter", "sd", "--sd", str(folder),
                 "--sd-size", "64", "--steps", "2", "--move", "up", "--seconds", "1", "--fps", "6", "--show", "64", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["晚饭.png", "晚饭_up.gif"]
    with Image.open(out / "晚饭_up.gif") as film:
        assert film.n_frames == 6 and film.size == (64, 64)
