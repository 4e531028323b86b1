"""Stochastic gradient Langevin dynamics (SGLD) for any energy: one step, a run of chains.

An energy is a callable x -> (N,), low where x is likely. Langevin dynamics *descends* it:

    x <- x - step_size * dE/dx + noise_std * eps,    eps ~ N(0, I)

which is equation 3 of arXiv 1912.03263 with the two scales set apart, as that paper's experiments
do. The chains sample exp(-E / T) at the temperature T = noise_std**2 / (2 * step_size); T = 1 is
the textbook choice.

This file needs torch alone and knows nothing of the rest of the project.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Energy = Callable[..., Tensor]


class Langevin(NamedTuple):
    """The settings of a Langevin step.

    step_size: > 0, multiplies the energy gradient.
    noise_std: >= 0, in the units of x; 0 is plain gradient descent.
    noise_first: add the noise before the gradient is taken, x' = x + noise_std * eps and
        x <- x' - step_size * dE/dx'. These are the same dynamics seen half a step later, when a
        chain is at its cleanest: its noise has been through the gradient once.
    pixel_grad_clip: clip each coordinate of the gradient to [-pixel_grad_clip, pixel_grad_clip].
    clamp: (low, high) that the new x is clamped to.
    """

    step_size: float
    noise_std: float
    noise_first: bool = False
    pixel_grad_clip: float | None = None
    clamp: tuple[float, float] | None = None

    def draw_noise(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor | None:
        """Return eps ~ N(0, I), shaped like x, or None if noise_std is 0."""
        if self.noise_std == 0:
            return None
        return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)

    def before_gradient(self, x: Tensor, noise: Tensor | None) -> Tensor:
        """Return where a step takes its gradient: x, with noise_first after its noise."""
        if noise is None or not self.noise_first:
            return x
        return torch.add(x, noise, alpha=self.noise_std)

    def without_noise(self) -> Langevin:
        """Return plain gradient descent of the same settings.

        One such step at the end takes off most of the noise that a chain carries, which no picture
        is meant to show. Source: Jolicoeur-Martineau et al., "Adversarial score matching and
        improved sampling for image generation" (arXiv 2009.05475), who step by Tweedie's formula:
        s**2 / T instead of step_size, for data with noise of deviation s.
        """
        return self._replace(noise_std=0.0)

    def check(self) -> None:
        """Raise ValueError, naming the setting, for one that cannot mean anything."""
        if not 0 < self.step_size < float("inf"):
            raise ValueError(f"step_size must be a positive number, not {self.step_size}")
        if not 0 <= self.noise_std < float("inf"):
            raise ValueError(f"noise_std must be 0 or a positive number, not {self.noise_std}")
        if self.pixel_grad_clip is not None and not self.pixel_grad_clip > 0:
            raise ValueError(
                f"pixel_grad_clip must be positive or None, not {self.pixel_grad_clip}"
            )
        if self.clamp is not None and not self.clamp[0] < self.clamp[1]:
            raise ValueError(f"clamp must be (low, high) with low < high, not {self.clamp}")


def energy_and_gradient(
    energy: Energy, x: Tensor, labels: Tensor | None = None, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """Return E(x), shape (N,), and dE/dx, shaped like x, from one batched call.

    energy: energy(x) -> (N,), or energy(x, labels) -> (N,) if labels are given; row i of the
        result must depend on row i of x alone.
    x: (N, ...) float. labels: (N, ...) or None.
    create_graph: keep the graph, so that the gradient itself can be differentiated.

    No parameter receives a gradient. Raises ValueError if the energy does not return (N,).
    """
    if not create_graph:
        x = x.detach().requires_grad_()
    with torch.enable_grad():
        values = energy(x) if labels is None else energy(x, labels)
        if values.shape != (len(x),):
            raise ValueError(
                f"an energy must return shape ({len(x)},), one value a row; "
                f"got {tuple(values.shape)}"
            )
        gradient = torch.autograd.grad(values.sum(), x, create_graph=create_graph)[0]
    return values.detach(), gradient


def langevin_step(
    energy: Energy,
    x: Tensor,
    langevin: Langevin,
    noise: Tensor | None = None,
    labels: Tensor | None = None,
    create_graph: bool = False,
) -> tuple[Tensor, Tensor]:
    """Take one Langevin step down the energy; x is left as it is.

    noise: eps, shaped like x, or None without noise. The rest as in `energy_and_gradient`.
    Returns the energies (N,) where the gradient is taken, and the new x.
    """
    x = langevin.before_gradient(x, noise)
    energies, gradient = energy_and_gradient(energy, x, labels, create_graph)
    if langevin.pixel_grad_clip is not None:
        gradient = gradient.clamp(-langevin.pixel_grad_clip, langevin.pixel_grad_clip)
    x = torch.add(x, gradient, alpha=-langevin.step_size)
    if noise is not None and not langevin.noise_first:
        x = torch.add(x, noise, alpha=langevin.noise_std)
    if langevin.clamp is not None:
        x = x.clamp_(*langevin.clamp)
    return energies, x


def run_chains(
    energy: Energy,
    x: Tensor,
    steps: int,
    langevin: Langevin,
    *,
    labels: Tensor | None = None,
    module: nn.Module | None = None,
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
    return_trajectory: bool = False,
    check: bool = True,
    step: Callable[..., tuple[Tensor, Tensor]] = langevin_step,
) -> Tensor:
    """Run N Langevin chains for some steps, all of them in each batched call; return their ends.

    energy, labels: as in `energy_and_gradient`. x: (N, ...) float, the start; left as it is.
    module: the network behind the energy, held in eval mode with frozen parameters meanwhile (see
        `frozen`); found without being named if the energy is a Module or a method of one.
    chunk_size: chains in one call of the energy, which bounds the memory; None: all. The noise of
        a step is drawn for all chains at once, so chunks change the result by rounding alone.
    generator: torch.Generator on x's device: same seed, same chains, bit for bit on a CPU.
    callback: called as callback(number, x, energies) in each step, numbered from 0, with the
        chains where the gradient is taken and their energies (N,).
    return_trajectory: return (steps + 1, N, ...) instead, from the start to the end.
    check: look for values that are not finite, after the last step; a GPU is waited for once.
    step: what takes one step, called like `langevin_step`; support/fast.py has a compiled one.

    Returns (N, ...) float, detached. Raises ValueError for unusable arguments and
    FloatingPointError, with the step, if an energy or the chains stop being finite.

    At temperature 1, E = |x|^2 / 2 gives a standard normal distribution:

    >>> def bowl(x):
    ...     return x.square().sum(1) / 2
    >>> textbook, generator = Langevin(0.02, 0.04**0.5), torch.Generator().manual_seed(0)
    >>> x = run_chains(bowl, torch.zeros(10_000, 2), 300, textbook, generator=generator)
    >>> [round(variance, 1) for variance in x.var(0).tolist()]
    [1.0, 1.0]
    """
    langevin.check()
    check_start(x)
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, not {steps}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be 1 or more, not {chunk_size}")
    if labels is not None and len(labels) != len(x):
        raise ValueError(f"labels must be one a chain: got {len(labels)} for {len(x)} chains")
    x = x.detach()
    trajectory, all_energies = [x], []  # looked at after the last step, not to wait for a GPU

    def one_step(x: Tensor, noise: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        return step(energy, x, langevin, noise, labels)

    with frozen(module or module_of(energy)):
        for number in range(steps):
            noise = langevin.draw_noise(x, generator)
            energies, new = _in_chunks(chunk_size, one_step, x, noise, labels)
            if callback is not None:
                callback(number, langevin.before_gradient(x, noise), energies)
            x = new
            if check:
                all_energies.append(energies)
            if return_trajectory:
                trajectory.append(x)
    if check:
        check_finite(all_energies, x)
    return torch.stack(trajectory) if return_trajectory else x


@contextmanager
def frozen(module: nn.Module | None) -> Iterator[None]:
    """Hold a network in eval mode with frozen parameters, then put every flag back as it was.

    Each submodule's `training` and each parameter's `requires_grad` is restored by itself, also
    after an exception, so a network whose parts are in mixed modes comes out as it went in.
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


def check_start(x: Tensor) -> None:
    """Raise ValueError for a start that has no gradient: whole numbers, or in inference mode."""
    if not x.is_floating_point():
        raise ValueError(f"x must be floating-point numbers, not {x.dtype}: call x.float() first")
    if torch.is_inference_mode_enabled() or x.is_inference():
        raise ValueError(
            "a gradient in x cannot be had in torch.inference_mode, nor of a tensor made in it: "
            "use torch.no_grad there, which is harmless here, or clone x outside"
        )


def module_of(function: Callable) -> nn.Module | None:
    """Return the network behind a function: the function itself, or the one it is a method of."""
    owner = getattr(function, "__self__", function)
    return owner if isinstance(owner, nn.Module) else None


def _in_chunks(size: int | None, function: Callable[..., tuple], *tensors: Any) -> tuple:
    """Return function(*tensors), of tensors or None, from calls on at most `size` rows of each."""
    count = len(tensors[0])
    if size is None or count <= size:
        return function(*tensors)
    nothing = [None] * -(-count // size)
    cut = (nothing if x is None else x.split(size) for x in tensors)
    return tuple(torch.cat(parts) for parts in zip(*map(function, *cut), strict=True))


def check_finite(energies: list[Tensor], x: Tensor) -> None:
    """Raise FloatingPointError if chains, or the energies of a step, are not finite."""
    if torch.isfinite(torch.cat([*energies, x.flatten()])).all():
        return
    step = [bool(torch.isfinite(part).all()) for part in (*energies, x)].index(False)
    what = "the chains are" if step == len(energies) else "the energy is"
    raise FloatingPointError(f"{what} not finite at Langevin step {step} of {len(energies)}")
