"""Stochastic gradient Langevin dynamics (SGLD) for any energy: one step, a run of chains.

An energy is a callable x -> (N,), low where x is likely. Langevin dynamics *descends* it:

    x <- x - step_size * dE/dx + noise_std * eps,    eps ~ N(0, I)

which is equation 3 of arXiv 1912.03263 with the two scales set apart, as that paper's experiments do. The chains
sample exp(-E / T) at the temperature T = noise_std**2 / (2 * step_size); T = 1 is the textbook choice.

This file needs torch alone and knows nothing of the rest of the project.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import torch


@contextmanager
def frozen(module):
    """Hold a network in eval mode with frozen parameters, then put every single flag back as it was.

    module: torch.nn.Module or None (then nothing happens). Each submodule's `training` and each parameter's
    `requires_grad` is restored by itself, also after an exception, so a network whose parts are in mixed modes
    comes out as it went in.
    """
    if module is None:
        yield
        return
    modes = [(part, part.training) for part in module.modules()]
    grads = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        module.eval()
        for parameter, _ in grads:
            parameter.requires_grad_(False)
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        for parameter, requires_grad in grads:
            parameter.requires_grad_(requires_grad)


def energy_and_gradient(energy, x, labels=None, chunk_size=None):
    """Return E(x), shape (N,), and dE/dx, shaped like x, from one batched call (or one for each chunk).

    energy: callable, energy(x) -> (N,), or energy(x, labels) -> (N,) where labels are given; row i of the result
        must depend on row i of x alone.
    x: (N, ...) float.
    labels: None or a tensor (N, ...) that is cut into chunks together with x.
    chunk_size: rows a call; None takes all at once. It bounds the memory of the backward pass.

    Only the gradient with respect to x is formed: no parameter receives one and no graph is kept.
    Raises ValueError where the energy does not return one value for each row.
    """

    def of_chunk(x, labels):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            values = energy(x) if labels is None else energy(x, labels)
            if values.shape != (len(x),):
                raise ValueError(f"an energy must return shape ({len(x)},), one value a row; got {tuple(values.shape)}")
            return values.detach(), torch.autograd.grad(values.sum(), x)[0]

    return _in_chunks(of_chunk, chunk_size, x, labels)


def _in_chunks(function, chunk_size, *tensors):
    """Return what function(*tensors) does, a tuple of tensors, from calls on so many rows of each; None stays None."""
    count = len(tensors[0])
    if chunk_size is None or count <= chunk_size:
        return function(*tensors)
    cut = [[None] * -(-count // chunk_size) if tensor is None else tensor.split(chunk_size) for tensor in tensors]
    return tuple(torch.cat(parts) for parts in zip(*map(function, *cut), strict=True))


def draw_noise(x, generator=None):
    """Draw eps ~ N(0, I), shaped like x."""
    return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)


def add_noise(x, noise_std, generator=None, noise=None):
    """Return x + noise_std * eps, eps ~ N(0, I), drawn here unless it is given as noise.

    With noise_std 0 nothing is drawn and x itself comes back.
    """
    if noise_std == 0:
        return x
    return torch.add(x, draw_noise(x, generator) if noise is None else noise, alpha=noise_std)


def langevin_step(x, gradient, step_size, noise_std, *, pixel_grad_clip=None, clamp=None, generator=None, noise=None):
    """Take one Langevin step down the energy: x - step_size * gradient + noise_std * eps.

    x, gradient: (N, ...) float; gradient is dE/dx at x. Neither is changed.
    step_size: > 0, multiplies the raw energy gradient.
    noise_std: >= 0, in the units of x; 0 is plain gradient descent.
    pixel_grad_clip: each coordinate of the gradient is clipped to [-pixel_grad_clip, pixel_grad_clip]; None: not.
    clamp: (low, high) that the new x is clamped to; None: not.
    generator: torch.Generator on x's device for eps. noise: eps itself, shaped like x, where it is drawn already.
    """
    if pixel_grad_clip is not None:
        gradient = gradient.clamp(-pixel_grad_clip, pixel_grad_clip)
    new = add_noise(torch.add(x, gradient, alpha=-step_size), noise_std, generator, noise)
    if clamp is not None:
        new.clamp_(*clamp)
    return new


def chain_step(energy, x, noise=None, labels=None, *, step_size, noise_std, noise_first, pixel_grad_clip, clamp):
    """Take one step of `run_chains`, with eps given: returns the energies (N,) where the gradient is taken, and the new x.

    energy, x, labels: as in `energy_and_gradient`. noise: eps, shaped like x, or None where noise_std is 0. The rest: as in
    `run_chains`.
    """
    if noise_first:
        x, noise_std = add_noise(x, noise_std, noise=noise), 0
    values, gradient = energy_and_gradient(energy, x, labels)
    settings = {"pixel_grad_clip": pixel_grad_clip, "clamp": clamp}
    return values, langevin_step(x, gradient, step_size, noise_std, **settings, noise=noise)


def run_chains(
    energy, x, steps, step_size, noise_std, *, noise_first=False, labels=None, pixel_grad_clip=None, clamp=None,
    module=None, chunk_size=None, generator=None, callback=None, return_trajectory=False, check=True, graphs=None,
):  # fmt: skip
    """Run N Langevin chains for some steps, all of them in each batched call, and return where they end.

    energy, labels, chunk_size: as in `energy_and_gradient`. The noise of a step is drawn once for all chains,
        so the result does not depend on chunk_size beyond rounding. An energy that has a method stepper is asked by
        stepper(**settings), at the start of the chains, for what takes their steps: see `chain_step`, fast.Compiled.
    x: (N, ...) float, the chains' start; left as it is.
    steps: >= 0. step_size, noise_std, pixel_grad_clip, clamp: as in `langevin_step`.
    noise_first: a step adds its noise before it takes the gradient, x' = x + noise_std * eps, x <- x' - step_size *
        dE/dx', instead of after it. It is the same dynamics seen half a step later, at its cleanest: the noise that
        a chain carries has been through the gradient once.
    module: the torch.nn.Module behind the energy, held in eval mode with frozen parameters meanwhile and restored
        exactly (see `frozen`); an energy that is itself a Module is found without it.
    generator: torch.Generator on x's device: same seed, same chains, bit for bit on CPU.
    callback: called as callback(step, x, energy) in each step with the step's number from 0, the chains where the
        gradient is taken and their energies (N,).
    return_trajectory: return (steps + 1, N, ...) instead, the start first and the end last.
    check: look for values that are not finite, for which the host waits for a GPU once; False: leave that to the caller.
    graphs: a fast.ChainGraphs, which captures the chain as a CUDA graph and replays it, or None. Chains that are watched,
        by callback or return_trajectory, run without it.

    Returns (N, ...) float, detached. Raises ValueError for unusable settings and FloatingPointError, with the step,
    where an energy or the chains stop being finite.

    At temperature 1, E = |x|^2 / 2 gives a standard normal distribution:

    >>> def bowl(x):
    ...     return x.square().sum(1) / 2
    >>> generator = torch.Generator().manual_seed(0)
    >>> x = run_chains(bowl, torch.zeros(10_000, 2), 300, step_size=0.02, noise_std=0.04**0.5, generator=generator)
    >>> [round(variance, 1) for variance in x.var(0).tolist()]
    [1.0, 1.0]
    """
    check_settings(steps, step_size, noise_std, pixel_grad_clip, clamp, chunk_size)
    if module is None and isinstance(energy, torch.nn.Module):
        module = energy
    x = x.detach()
    trajectory = [x]
    settings = {
        "step_size": step_size, "noise_std": noise_std, "noise_first": noise_first,
        "pixel_grad_clip": pixel_grad_clip, "clamp": clamp,
    }  # fmt: skip

    def loop(x, labels, steps):
        """Return where chains end after some steps, and, where they will be looked at, the energies (N,) of each step."""
        stepper = getattr(energy, "stepper", None)
        one_step = stepper(**settings) if stepper else partial(chain_step, energy, **settings)
        energies = []  # stay on the device and are looked at once, after the last step: no synchronisation inside the chain
        for step in range(steps):
            noise = draw_noise(x, generator) if noise_std else None
            values, new = _in_chunks(one_step, chunk_size, x, noise, labels)
            if callback is not None:
                callback(step, add_noise(x, noise_std, noise=noise) if noise_first else x, values)
            if check:
                energies.append(values)
            x = new
            if return_trajectory:
                trajectory.append(x)
        return x, energies

    with frozen(module):
        if graphs is None or callback is not None or return_trajectory:
            x, energies = loop(x, labels, steps)
        else:
            key = (energy, chunk_size, check, *settings.values())
            x, energies = graphs.chains(loop, x, labels, steps, generator, key)
    if check:
        _check_finite(energies, x)
    return torch.stack(trajectory) if return_trajectory else x


def _check_finite(energies, x):
    """Raise FloatingPointError where chains x, or the energies of one of the steps that led there, are not finite."""
    if torch.isfinite(torch.cat([*energies, x.flatten()])).all():
        return
    step = [bool(torch.isfinite(part).all()) for part in (*energies, x)].index(False)
    what = "the chains are" if step == len(energies) else "the energy is"
    raise FloatingPointError(f"{what} not finite at Langevin step {step} of {len(energies)}")


def check_settings(steps, step_size, noise_std, pixel_grad_clip, clamp, chunk_size):
    """Refuse settings that cannot mean anything."""
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, not {steps}")
    if not 0 < step_size < float("inf"):
        raise ValueError(f"step_size must be a positive number, not {step_size}")
    if not 0 <= noise_std < float("inf"):
        raise ValueError(f"noise_std must be 0 or a positive number, not {noise_std}")
    if pixel_grad_clip is not None and not pixel_grad_clip > 0:
        raise ValueError(f"pixel_grad_clip must be positive or None, not {pixel_grad_clip}")
    if clamp is not None and not clamp[0] < clamp[1]:
        raise ValueError(f"clamp must be (low, high) with low < high, not {clamp}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be 1 or more, not {chunk_size}")
