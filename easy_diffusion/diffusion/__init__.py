"""The mathematics of diffusion: schedules, losses, samplers, guidance, SDEs and flows.

The files in reading order:

    schedule.py         NoiseSchedule: betas, alpha_bar, alpha_t and sigma_t
    prediction.py       Prediction and Denoiser: what samplers call
    gaussian.py         GaussianDiffusion: prediction types, losses, variational bound
    samplers.py         ddpm, ddim, dpm_solver, heun, and the loop to write another sampler
    guidance.py         guided, clipped: classifier-free guidance and clipping of a denoiser
    timesteps.py        how t is drawn in training: uniform, logit-normal, importance sampling
    score_sde.py        the variance-exploding SDE: samplers, probability flow ODE, likelihoods
    flow_matching.py    RectifiedFlow and its samplers
    shared_noise.py     SharedNoiseDiffusion: the frames of a film have noise in common

The folder needs torch and numpy and imports nothing else from this project, so it can be copied
into another one.

>>> import torch
>>> from easy_diffusion.diffusion import GaussianDiffusion, NoiseSchedule, ddim
>>> schedule = NoiseSchedule.cosine(1000)
>>> diffusion = GaussianDiffusion(schedule, prediction_type="v")
>>> def network(x_t, t, context, mask):
...     return torch.zeros_like(x_t)
>>> *_, last = ddim(diffusion.denoiser(network), schedule, shape=(2, 3, 8, 8), steps=5)
>>> last.x.shape
torch.Size([2, 3, 8, 8])
"""

from .flow_matching import RectifiedFlow, flow_euler, flow_heun, flow_log_likelihood
from .gaussian import (
    PREDICTION_TYPES,
    VARIANCES,
    BoundTerm,
    GaussianDiffusion,
    discretised_log_likelihood,
    gaussian_kl,
    min_snr_weight,
    velocity_weight,
)
from .guidance import batched_guidance, clipped, concat_contexts, guided
from .prediction import Denoiser, Prediction, check_output, eps_from_x0, normal_noise
from .samplers import (
    Step,
    ddim,
    ddim_step,
    ddpm,
    ddpm_step,
    dpm_solver,
    heun,
    initial_noise,
    karras_timesteps,
    sampling_loop,
    spaced_timesteps,
)
from .schedule import NoiseSchedule, TimestepTable, check_timesteps
from .score_sde import (
    SDEStep,
    VarianceExploding,
    euler_maruyama,
    integrate_ode,
    langevin_step,
    log_likelihood,
    predictor_corrector,
    probability_flow,
)
from .shared_noise import SharedNoiseDiffusion
from .timesteps import (
    ImportanceTimesteps,
    logit_normal_time,
    logit_normal_timesteps,
    uniform_time,
    uniform_timesteps,
)

__all__ = [
    "PREDICTION_TYPES",
    "VARIANCES",
    "BoundTerm",
    "Denoiser",
    "GaussianDiffusion",
    "ImportanceTimesteps",
    "NoiseSchedule",
    "Prediction",
    "RectifiedFlow",
    "SDEStep",
    "SharedNoiseDiffusion",
    "Step",
    "TimestepTable",
    "VarianceExploding",
    "batched_guidance",
    "check_output",
    "check_timesteps",
    "clipped",
    "concat_contexts",
    "ddim",
    "ddim_step",
    "ddpm",
    "ddpm_step",
    "discretised_log_likelihood",
    "dpm_solver",
    "eps_from_x0",
    "euler_maruyama",
    "flow_euler",
    "flow_heun",
    "flow_log_likelihood",
    "gaussian_kl",
    "guided",
    "heun",
    "initial_noise",
    "integrate_ode",
    "karras_timesteps",
    "langevin_step",
    "log_likelihood",
    "logit_normal_time",
    "logit_normal_timesteps",
    "min_snr_weight",
    "normal_noise",
    "predictor_corrector",
    "probability_flow",
    "sampling_loop",
    "spaced_timesteps",
    "uniform_time",
    "uniform_timesteps",
    "velocity_weight",
]
