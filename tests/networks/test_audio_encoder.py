"""Audio encoder: the library's spectrogram, silence, sound files of all kinds."""

import numpy as np
import pytest
import torch

from easy_diffusion.networks.audio_encoder import (
    FLOOR,
    HOP,
    MELS,
    N_FFT,
    SAMPLE_RATE,
    AudioEncoder,
    load_sound,
    log_mel_spectrogram,
    mel_filters,
)


def make_sound(seconds, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.2 * torch.randn(round(seconds * SAMPLE_RATE), generator=generator)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return AudioEncoder(dim=32).eval()


def test_the_spectrogram_equals_that_of_transformers():
    audio_utils = pytest.importorskip("transformers.audio_utils")
    filters = audio_utils.mel_filter_bank(
        N_FFT // 2 + 1, MELS, 0, SAMPLE_RATE / 2, SAMPLE_RATE, norm=None, mel_scale="htk"
    )
    assert np.abs(mel_filters().numpy() - filters).max() < 1e-6
    sound = make_sound(0.53)
    sound[3000:5000] = 0
    theirs = audio_utils.spectrogram(
        sound.numpy().astype(np.float64), audio_utils.window_function(N_FFT, "hann"), N_FFT, HOP,
        power=2.0, pad_mode="constant", mel_filters=filters, mel_floor=FLOOR, log_mel="log10",
    )
    ours = log_mel_spectrogram(sound[None])[0].numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-4


def test_a_sine_is_loudest_in_the_filter_of_its_frequency():
    t = torch.arange(SAMPLE_RATE) / SAMPLE_RATE
    for frequency in (300, 1000, 5000):
        spectrogram = log_mel_spectrogram(torch.sin(2 * np.pi * frequency * t)[None])[0]
        m = spectrogram[:, 50].argmax()
        bins = mel_filters()[:, m].nonzero().flatten() * SAMPLE_RATE / N_FFT    # Hz
        assert bins.min() <= frequency <= bins.max()


@torch.no_grad()
def test_silence_is_the_unconditional_element(encoder):
    context, mask = encoder([encoder.uncond])
    for silence in (torch.zeros(SAMPLE_RATE), torch.zeros(0), torch.zeros(7)):
        silent_context, silent_mask = encoder([silence])
        assert silent_mask.sum() == mask.sum() == 1
        assert torch.allclose(silent_context[:, :1], context[:, :1], atol=1e-6)


@torch.no_grad()
def test_a_sound_has_the_same_context_beside_longer_ones_and_with_silence_after_it(encoder):
    sound = make_sound(0.3)
    alone, mask = encoder([sound])
    n = int(mask.sum())
    beside, mask_beside = encoder([sound, make_sound(1.1, seed=1)])
    followed, mask_followed = encoder([torch.cat([sound, torch.zeros(SAMPLE_RATE)])])
    assert mask_beside[0].sum() == mask_followed.sum() == n == 3
    assert torch.allclose(beside[0, :n], alone[0, :n], atol=1e-5)
    assert torch.allclose(followed[0, :n], alone[0, :n], atol=1e-5)


@torch.no_grad()
def test_a_sound_shorter_than_a_frame_has_tokens(encoder):
    context, mask = encoder([make_sound(0.005)])
    assert mask.sum() > 1 and context.isfinite().all()


@torch.no_grad()
def test_tokens_of_silent_frames_are_masked(encoder):
    sound = make_sound(2)
    sound[SAMPLE_RATE // 2:3 * SAMPLE_RATE // 2] = 0
    _, mask = encoder([sound])
    assert not mask[0, 5:10].any()              # tokens of 160 ms; the first is the start token
    assert mask[0, :4].all() and mask[0, 11:13].all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_hears_the_same(encoder, dtype):
    """Under autocast, and with weights of that type: the mask is the same, the context similar."""
    sounds = [0.9 * torch.ones(SAMPLE_RATE), make_sound(0.3), ""]
    context, mask = encoder(sounds)
    with torch.autocast("cpu", dtype):
        contexts = [encoder(sounds)]
    contexts.append(encoder.to(dtype)(sounds))
    for half_context, half_mask in contexts:
        assert torch.equal(half_mask, mask)
        difference = (half_context.float() - context)[mask]
        assert difference.abs().max() < 0.3 and difference.std() < 0.05


def test_a_dimension_that_does_not_fit_is_refused():
    for dim in (9, 6):
        with pytest.raises(ValueError, match=f"not {dim}"):
            AudioEncoder(dim=dim, heads=4 if dim == 6 else 3)


def test_all_weights_have_gradients(encoder):
    context, mask = encoder([make_sound(0.3)])
    (context * torch.randn_like(context)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


@pytest.mark.parametrize(
    "sound, message",
    [
        (torch.zeros(2, 100), r"float32 \(2, 100\)"),
        (torch.zeros(100, dtype=torch.int16), r"int16 \(100,\)"),
        ("番茄", "番茄"),
        (np.zeros(10, np.float32), "ndarray of float32"),
        (torch.tensor([0.0, float("nan")]), "not finite"),
        (torch.tensor([0.0, float("inf")]), "not finite"),
    ],
)
def test_what_is_no_sound_is_refused(encoder, sound, message):
    with pytest.raises(ValueError, match=message):
        encoder([sound])


# ---------------------------------------------------------------- files


@pytest.fixture
def soundfile():
    return pytest.importorskip("soundfile")


@pytest.mark.parametrize("suffix, subtype, tolerance", [
    ("wav", "PCM_U8", 2 ** -7), ("wav", "PCM_16", 2 ** -15), ("wav", "PCM_24", 2 ** -23),
    ("wav", "FLOAT", 0), ("flac", "PCM_16", 2 ** -15), ("flac", "PCM_24", 2 ** -23),
])
def test_files_of_all_sample_formats_are_read(soundfile, tmp_path, suffix, subtype, tolerance):
    sound = make_sound(0.2).clamp(-0.9, 0.9)
    path = tmp_path / f"锅.{suffix}"
    soundfile.write(path, sound.numpy(), SAMPLE_RATE, subtype=subtype)
    loaded = load_sound(path)
    assert loaded.dtype == torch.float32
    assert (loaded - sound).abs().max() <= tolerance


def test_channels_are_averaged(soundfile, tmp_path):
    left, right = make_sound(0.1, 0), make_sound(0.1, 1)
    soundfile.write(
        tmp_path / "a.wav", torch.stack([left, right], 1).numpy(), SAMPLE_RATE, subtype="FLOAT"
    )
    assert torch.allclose(load_sound(tmp_path / "a.wav"), (left + right) / 2, atol=1e-7)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_another_sample_rate_is_converted(soundfile, tmp_path, rate):
    t = np.arange(rate) / rate
    soundfile.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 440 * t), rate, subtype="FLOAT")
    loaded = load_sound(tmp_path / "a.wav").numpy()
    assert abs(len(loaded) - SAMPLE_RATE) <= 1
    t = np.arange(len(loaded)) / SAMPLE_RATE
    error = loaded - 0.5 * np.sin(2 * np.pi * 440 * t)
    assert np.abs(error[1000:-1000]).max() < 1e-3       # the ends ring a little


def test_only_the_seconds_asked_for_are_read(soundfile, tmp_path):
    soundfile.write(tmp_path / "a.wav", make_sound(1).numpy(), SAMPLE_RATE)
    assert len(load_sound(tmp_path / "a.wav", seconds=0.25)) == SAMPLE_RATE // 4


def test_a_file_that_is_no_sound_is_refused(soundfile, tmp_path):
    with pytest.raises(FileNotFoundError, match="none.wav"):
        load_sound(tmp_path / "none.wav")
    (tmp_path / "text.wav").write_text("not a sound", "utf-8")
    with pytest.raises(ValueError, match="text.wav is no sound file"):
        load_sound(tmp_path / "text.wav")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), SAMPLE_RATE)
    with pytest.raises(ValueError, match="empty.wav has no samples"):
        load_sound(tmp_path / "empty.wav")
    samples = np.zeros(100, np.float32)
    samples[50] = np.nan
    soundfile.write(tmp_path / "nan.wav", samples, 44100, subtype="FLOAT")
    with pytest.raises(ValueError, match="nan.wav: .* not finite"):
        load_sound(tmp_path / "nan.wav")
