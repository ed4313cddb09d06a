"""What neurons are grouped by: one row each, of which equal directions go together (`groups.py`).

    weights        its row of the input projection: neurons that look for the same thing
    co-activation  its correlation with the others over probe tokens, in a few dimensions: that fire together
    mixed          both side by side: cos(mixed) = (cos(weights) + cos(co-activation)) / 2

The co-activation matrix C = Zᵀ Z / T of the T x F standardised activations Z is never built (F x F). Its leading
eigenvectors come from subspace iteration on Z, in pieces of a thousand tokens. Scaled by their eigenvalue's root they
are rows whose inner products are the best R-dimensional approximation of C: spectral clustering of the graph of
correlations.

Shapes: T tokens, F neurons, D width, R embedding width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from switchable.errors import InputError

TOKENS_AT_ONCE = 1024
SUBSPACE_STEPS = 3


def features(weight_FD: Tensor, active_TF: Tensor, structure: str) -> Tensor:
    """Return what neurons are grouped by, `structure`: `"weights"` (their rows), `"coactivation"` or `"mixed"`."""
    if structure == "weights":
        return weight_features(weight_FD)
    coactive_FR = coactivation_features(active_TF)
    return coactive_FR if structure == "coactivation" else mixed_features(weight_FD, coactive_FR)


def weight_features(up_FD: Tensor) -> Tensor:
    """Return each neuron's row of the input projection divided by its norm (a zero row stays zero)."""
    _check_matrix("up_FD", up_FD, "(neurons, width)")
    return unit_rows(up_FD)


def unit_rows(rows_ND: Tensor) -> Tensor:
    """Return rows in float32, each divided by its norm (a zero row stays zero).

    The division by the largest entry before that keeps the squares of very small or large numbers in range.
    """
    rows_ND = rows_ND.detach().float()
    peak_N1 = torch.linalg.vector_norm(rows_ND, torch.inf, dim=1, keepdim=True)
    rows_ND = rows_ND / torch.where(peak_N1 > 0, peak_N1, 1)
    norm_N1 = torch.linalg.vector_norm(rows_ND, dim=1, keepdim=True)
    return rows_ND.div_(torch.where(norm_N1 > 0, norm_N1, 1))


def coactivation_features(active_TF: Tensor, width: int = 64) -> Tensor:
    """Return `width` numbers per neuron whose inner products approximate the correlation of their activity.

    active_TF: activity of each neuron on probe tokens: bool (fires or not: the phi coefficient), or
    activations (Pearson's). A neuron that never changes (dead, or always on) gets a zero row.
    """
    _check_matrix("active_TF", active_TF, "(tokens, neurons)")
    active_TF = active_TF.detach()
    tokens, neurons = active_TF.shape
    width = min(width, tokens, neurons)
    mean_F, inverse_F = _moments(active_TF)
    generator = torch.Generator().manual_seed(0)
    basis_FR = torch.randn(neurons, width, generator=generator, device="cpu").to(mean_F)
    for _ in range(SUBSPACE_STEPS):
        basis_FR = torch.linalg.qr(_correlate(active_TF, mean_F, inverse_F, basis_FR)).Q
    # Rayleigh and Ritz: diagonalise C within the subspace found. In float64: with few neurons alive most eigenvalues
    # are zeros up to rounding, on which float32's algorithm gives up on some processors.
    image_FR = _correlate(active_TF, mean_F, inverse_F, basis_FR)
    inner_RR = (basis_FR.T @ image_FR).double()
    values_R, vectors_RR = (part.float() for part in torch.linalg.eigh((inner_RR + inner_RR.T) / 2))
    features_FR: Tensor = (basis_FR @ vectors_RR) * values_R.clamp(min=0).sqrt() * (inverse_F > 0)[:, None]
    return features_FR


def mixed_features(weight_FD: Tensor, coactive_FR: Tensor) -> Tensor:
    """Return both kinds of rows side by side, so that their cosines count half each."""
    rows, others = len(weight_FD), len(coactive_FR)
    if rows != others:
        raise InputError(f"{rows} rows of weights, {others} of co-activation; give one each per neuron")
    return torch.cat([weight_features(weight_FD), weight_features(coactive_FR)], dim=1) * math.sqrt(0.5)


def _moments(active_TF: Tensor) -> tuple[Tensor, Tensor]:
    """Return each neuron's mean activity and the inverse of its standard deviation (0: it never changes)."""
    sum_F = torch.zeros(active_TF.shape[1], dtype=torch.float64, device=active_TF.device)
    square_F = torch.zeros_like(sum_F)
    for piece_TF in torch.split(active_TF, TOKENS_AT_ONCE):
        sum_F += piece_TF.double().sum(0)
        square_F += piece_TF.double().square().sum(0)
    mean_F = sum_F / len(active_TF)
    variance_F = square_F / len(active_TF) - mean_F.square()
    changes_F = variance_F > 1e-10 * square_F / len(active_TF)
    inverse_F = torch.where(changes_F, variance_F.clamp(min=1e-300).rsqrt(), 0.0)
    return mean_F.float(), inverse_F.float()


def _correlate(active_TF: Tensor, mean_F: Tensor, inverse_F: Tensor, basis_FR: Tensor) -> Tensor:
    """Return C @ basis_FR, C the F x F matrix of correlations, piece by piece of the tokens."""
    scaled_FR = basis_FR * inverse_F[:, None]
    result_FR = torch.zeros_like(basis_FR)
    for piece_TF in torch.split(active_TF, TOKENS_AT_ONCE):
        centred_TF = piece_TF.float() - mean_F
        result_FR += centred_TF.T @ (centred_TF @ scaled_FR)
    return result_FR * (inverse_F / len(active_TF))[:, None]


def _check_matrix(name: str, values: Tensor, shape: str) -> None:
    if not isinstance(values, Tensor) or values.ndim != 2 or 0 in values.shape or values.is_complex():
        given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(f"{name} is {given}; give a real tensor of two dimensions, {shape}")
    if values.is_floating_point() and not values.isfinite().all():
        raise InputError(f"{name} holds NaN or infinite values; give finite ones (has training diverged?)")
