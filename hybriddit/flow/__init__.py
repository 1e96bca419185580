"""Flow matching in SiT's convention (time 0 is noise, time 1 is data): paths, loss, samplers, guidance, likelihood."""

from .guidance import guided
from .likelihood import log_likelihood
from .loss import TIME_DISTRIBUTIONS, WEIGHTINGS, draw_times, flow_loss, training_interval
from .path import PATHS, PREDICTIONS, Coefficients, coefficients, convert, interpolate, shift_times, target
from .sample import DIFFUSIONS, LAST_STEPS, ODE_METHODS, SDE_METHODS, sample_ode, sample_sde, sampling_interval

__all__ = [
    "DIFFUSIONS",
    "LAST_STEPS",
    "ODE_METHODS",
    "PATHS",
    "PREDICTIONS",
    "SDE_METHODS",
    "TIME_DISTRIBUTIONS",
    "WEIGHTINGS",
    "Coefficients",
    "coefficients",
    "convert",
    "draw_times",
    "flow_loss",
    "guided",
    "interpolate",
    "log_likelihood",
    "sample_ode",
    "sample_sde",
    "sampling_interval",
    "shift_times",
    "target",
    "training_interval",
]
