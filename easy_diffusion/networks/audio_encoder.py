"""Audio encoder: sounds → context [B, L, D] and mask bool [B, L], the contract of a text encoder.

    X[k, f]   = Σ_n w[n] x[n + f·HOP] exp(-2πi k n / N_FFT)       short-time Fourier transform
    S[m, f]   = log10(max(Σ_k M[k, m] |X[k, f]|², FLOOR))         log-mel spectrogram
    mel(ν)    = 2595 log10(1 + ν / 700)                           O'Shaughnessy 1987, for ν in Hz

The filters M are MELS overlapping triangles, equally wide on the mel scale, on which equal steps
are heard as equal differences of pitch. Four convolutions, each with stride 2, make tokens of
STRIDE frames; a transformer lets the tokens attend to each other (the layout of Radford et al.,
"Robust Speech Recognition via Large-Scale Weak Supervision", 2022, section 2.2, which has one such
convolution).

Silence has no tokens. A token whose frames are all silent is masked, so that a silent sound leaves
the start token alone, and so does the empty sound "". It is the unconditional element: caption
dropout puts it in place of a sound. A sound has the same context whatever the length of the others
in the batch, which are padded with silence.

A sound is a waveform: float32 [N] in [-1, 1], SAMPLE_RATE values a second.

The file needs torch and, beside it, attention_kernels.py and blocks.py; `load_sound` also needs the
packages soundfile and soxr.

>>> encoder = AudioEncoder(dim=64)
>>> noise = 0.1 * torch.randn(SAMPLE_RATE)                  # one second
>>> context, mask = encoder([noise, torch.zeros(SAMPLE_RATE), ""])
>>> tuple(context.shape), mask.sum(dim=1).tolist()
((3, 8, 64), [8, 1, 1])
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .blocks import timestep_embedding

SAMPLE_RATE = 16_000    # Hz
N_FFT = 512             # samples of a frame, 32 ms
HOP = 160               # samples from one frame to the next, 10 ms
MELS = 64
FLOOR = 1e-6            # power below which a filter is silent: a sine of amplitude 1e-5
STRIDE = 16             # frames of a token, 160 ms
SILENT = 0.05           # decades above FLOOR below which a token is silent
MIN_LOUDNESS = 1e-4     # of a sound file: its largest absolute value, below which it is silent


# ---------------------------------------------------------------- spectrogram


def mel_filters() -> torch.Tensor:
    """The filters M, float32 [N_FFT/2 + 1, MELS], triangles of height 1 at these frequencies.

    The corners of filter m are the points m, m + 1 and m + 2 of MELS + 2 points that are equally
    spaced on the mel scale, from 0 to SAMPLE_RATE / 2.
    """
    highest = 2595 * torch.log10(torch.tensor(1 + SAMPLE_RATE / 2 / 700, dtype=torch.float64))
    mels = torch.linspace(0, float(highest), MELS + 2, dtype=torch.float64)
    corners = 700 * (10 ** (mels / 2595) - 1)                               # Hz
    frequencies = torch.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1, dtype=torch.float64)[:, None]
    rising = (frequencies - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - frequencies) / (corners[2:] - corners[1:-1])
    return torch.minimum(rising, falling).clamp(min=0).float()


def log_mel_spectrogram(sounds: torch.Tensor) -> torch.Tensor:
    """Log-mel spectrogram S of sounds [B, N] → float32 [B, MELS, 1 + N // HOP].

    Frame f is centred at sample f·HOP; before and after the sound there is silence. It is computed
    in float32 also under autocast, since half precision cannot represent FLOOR and large powers.
    """
    with torch.autocast(sounds.device.type, enabled=False):
        window = torch.hann_window(N_FFT, device=sounds.device)
        spectrum = torch.stft(
            sounds.float(), N_FFT, HOP, window=window, pad_mode="constant", return_complex=True
        )                                                                   # [B, N_FFT/2+1, frames]
        power = spectrum.abs().square()
        mel = mel_filters().to(sounds.device).T @ power                     # [B, MELS, frames]
        return mel.clamp(min=FLOOR).log10()


# ---------------------------------------------------------------- encoder


class AudioEncoder(nn.Module):
    """Sounds → context [B, L, dim] and mask bool [B, L]; L is 1 + the tokens of the longest sound.

    A sound is float [N] in [-1, 1] at SAMPLE_RATE, of any length N, or "" for none.

    dim: D, even, and a multiple of the number of heads, else ValueError.

    `forward` raises ValueError for a sound of another shape, or with a value that is not finite.
    The attribute `settings` is the dict of these arguments.
    """

    uncond = ""         # the unconditional element

    def __init__(self, dim: int = 128, layers: int = 2, heads: int = 4):
        super().__init__()
        if dim % 2 or dim % heads:
            raise ValueError(f"dim must be even and a multiple of {heads} heads, not {dim}")
        self.settings = dict(dim=dim, layers=layers, heads=heads)
        self.dim = dim
        self.start = nn.Parameter(torch.randn(dim) * 0.02)
        self.convs = nn.ModuleList(
            nn.Conv1d(channels, dim, 3, stride=2, padding=1) for channels in (MELS, dim, dim, dim)
        )
        layer = nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(dim)

    def forward(self, sounds: list) -> tuple[torch.Tensor, torch.Tensor]:
        waveforms = [check_sound(sound).to(self.start.device) for sound in sounds]
        batch = nn.utils.rnn.pad_sequence(waveforms, batch_first=True)      # [B, N]
        # Silence after the sound, so that all frames that overlap it are there, in whole tokens
        tokens = -(-(batch.shape[1] + N_FFT) // (STRIDE * HOP))
        batch = F.pad(batch, (0, (STRIDE * tokens - 1) * HOP - batch.shape[1]))
        return self.encode(log_mel_spectrogram(batch))

    def encode(self, spectrogram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Context and mask of log-mel spectrograms [B, MELS, frames], whole tokens of frames."""
        decades = spectrogram - math.log10(FLOOR)                           # 0 is silence
        loudest = decades.amax(dim=1).unflatten(1, (-1, STRIDE)).amax(dim=2)    # [B, L - 1]
        h = (decades / 5).to(self.start.dtype)                              # about 0 … 2
        for conv in self.convs:
            h = F.gelu(conv(h))                                             # the frames halve
        h = h.transpose(1, 2)                                               # [B, L - 1, D]
        positions = torch.arange(h.shape[1], device=h.device)
        h = h + timestep_embedding(positions, self.dim).to(h.dtype)
        start = self.start.expand(len(h), 1, -1)
        mask = F.pad(loudest > SILENT, (1, 0), value=True)                  # [B, L]
        context = torch.cat([start, h], dim=1)                              # [B, L, D]
        context = self.transformer(context, src_key_padding_mask=~mask)
        return self.norm(context), mask


def check_sound(sound) -> torch.Tensor:
    """A sound as a float32 tensor [N]; raises ValueError unless it is one, or ""."""
    if isinstance(sound, str) and sound == "":
        return torch.zeros(1)
    if not isinstance(sound, torch.Tensor) or sound.ndim != 1 or not sound.is_floating_point():
        given = repr(sound)
        if hasattr(sound, "dtype"):
            given = f"a {type(sound).__name__} of {sound.dtype} {tuple(sound.shape)}"
        raise ValueError(
            f'a sound is a float torch.Tensor [N], or "" for none, not {given}; '
            "torch.from_numpy makes one of an array"
        )
    if not sound.isfinite().all():
        raise ValueError("the sound has values that are not finite")
    return sound.float() if len(sound) else torch.zeros(1)


# ---------------------------------------------------------------- files


def load_sound(path, seconds: float | None = None) -> torch.Tensor:
    """Read a sound file, WAV, FLAC or another that soundfile reads: float32 [N] at SAMPLE_RATE.

    Several channels become their mean. Another sample rate is converted.

    seconds: read at most these from the start; None: all.

    Raises FileNotFoundError, or ValueError for a file that is no sound, that is empty, that has
    values that are not finite, or that is silent.
    """
    import soundfile
    import soxr

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            frames = -1 if seconds is None else round(seconds * rate)
            samples = file.read(frames, dtype="float32", always_2d=True)    # [N, channels]
    except (soundfile.LibsndfileError, TypeError) as error:    # TypeError: a .raw file has no rate
        raise ValueError(
            f"{path} is no sound file that can be read: {error} Other formats are converted by, "
            f"for example, ffmpeg -i {path} sound.wav"
        ) from error
    if len(samples) == 0:
        raise ValueError(f"{path} has no samples")
    samples = samples.mean(axis=1)
    if abs(samples).max() < MIN_LOUDNESS:
        raise ValueError(f"{path} is silent")
    if rate != SAMPLE_RATE:
        samples = soxr.resample(samples, rate, SAMPLE_RATE)
    try:
        return check_sound(torch.from_numpy(samples))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
