"""Chains of a trained model as sample.py's flags ask for them: where they start, on which energy they run, what is held.

Fresh chains, the replay buffer's, or the user's pictures; E(x), E(x, y), mixtures of classes, the way from one class to
another; inpainting and denoising.
"""

from __future__ import annotations

import torch

import data
import fast
import parallel
import runs
from cli import UserError
from models import energy, joint_energy, mixture_energy, path_energy, predict
from restarts import restart_from_state
from sgld import add_noise, run_chains

PARTS = ("left", "right", "top", "bottom", "centre")
GRID_CHAINS = 400  # a picture holds no more, so that memory does not grow with --num
FRAMES = 50  # of an animation, at most
COLUMNS = 11  # of an interpolation: from all of one class to all of the other


class Chains:
    """Chains of one checkpoint as the flags ask for them.

    checkpoint: what train_jem.py wrote. args: parsed flags, completed by `check_against_checkpoint`. Raises UserError for
    pictures that cannot be read and for more of the buffer's chains than there are.
    """

    def __init__(self, checkpoint, args, device):
        self.checkpoint, self.args, self.device = checkpoint, args, device
        self.model = runs.load_model(checkpoint, device)
        conditional = mixture_energy if args.mixture else path_energy if args.interpolate else joint_energy
        precision = runs.pick_precision(args.precision, device)
        energy_of = runs.chain_energy(self.model, device, precision, conditional)
        self.energy_of, self.graphs = fast.from_flags(args, energy_of, self.model, device)
        self.settings = runs.chain_settings(checkpoint)
        self.settings.update({name: getattr(args, name) for name in ("step_size", "noise_std") if name in args.given})
        if args.denoise:
            self.settings["noise_std"] = 0.0
        self.restart = restart_from_state(checkpoint["restart"], device)
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.shape = checkpoint["buffer"]["images"].shape[1:]
        self.pictures = self._pictures().to(device) if args.from_images else None
        self.free = part_to_sample(args.inpaint, self.shape).to(device) if args.inpaint else None
        self.slots = self._slots() if args.source == "buffer" else None
        self.frames = []

    def blocks(self):
        """Yield (starts, images, labels) in blocks of at most args.chunk_size chains until args.num are drawn.

        starts, images: (n, C, H, W) float, pixels in [-1, 1]; labels: (n,) int64, the asked classes, or None where
        --class-label is not given. Only one block is in memory at a time, or one for each rank: the ranks draw the blocks
        by turns, the same whatever their number, and rank 0 yields them all.
        """
        count = -(-self.args.num // self.args.chunk_size)
        for turn in range(0, count, parallel.ranks()):
            number = turn + parallel.rank()
            blocks = parallel.gathered_at_first(self._block(number) if number < count else None)
            yield from (block for block in blocks if block)

    def _block(self, number):
        """Draw the block of a number; each but the first has a seed of its own."""
        args, first = self.args, number * self.args.chunk_size
        if number:
            self.generator.manual_seed(parallel.nth_seed(args.seed, number))
        classes = args.class_label or args.mixture or (args.interpolate and args.interpolate[:1])
        numbers = torch.arange(first, min(first + args.chunk_size, args.num), device=self.device)
        labels = torch.tensor(classes, device=self.device)[numbers % len(classes)] if classes else None
        starts = self._starts(numbers, labels)
        condition = labels
        if args.mixture:
            condition = self._weights({label: 1.0 for label in args.mixture}, len(starts))
        elif args.interpolate:
            condition = self._weights({args.interpolate[0]: 1.0}, len(starts))
        images = self._run(starts, args.steps, condition, watched=number == 0 and args.animate)
        return starts, images, labels if args.class_label else None

    def interpolate(self, images):
        """Lead chains (N, C, H, W) of the first class to the second; returns (N, COLUMNS, C, H, W), `images` first."""
        source, target = self.args.interpolate
        columns = [images.to(self.device)]
        for column in range(1, COLUMNS):
            share = column / (COLUMNS - 1)
            weights = self._weights({source: 1 - share, target: share}, len(images))
            columns.append(self._run(columns[-1], self.args.steps, weights))
            if self.args.animate:
                self.frames.append(columns[-1][:GRID_CHAINS])
        return torch.stack(columns, dim=1)

    def _weights(self, shares, count):
        """Return weights (count, K) with the given shares of classes in each row."""
        row = torch.zeros(self.restart.num_classes, device=self.device)
        for label, share in shares.items():
            row[label] = share
        return row.expand(count, -1)

    def _starts(self, numbers, labels):
        """Return where the chains of these numbers start, (n, C, H, W)."""
        if self.slots is not None:
            return self.checkpoint["buffer"]["images"][self.slots[numbers]]
        if self.pictures is None or self.free is not None:
            x = self.restart.draw(self.restart.labels(numbers) if labels is None else labels, self.generator)
            return x if self.free is None else torch.where(self.free, x, self._held(numbers))
        return add_noise(self._held(numbers), self.args.denoise or 0, self.generator)

    def _pictures(self):
        """Return the pictures that --from-images names."""
        if self.args.from_images != "test":
            return data.load_images(self.args.from_images, self.shape, self.args.num)
        return data.load(self.checkpoint["dataset"], self.args.data_dir, self.shape[1]).test.images[: self.args.num]

    def _held(self, numbers):
        """Return the user's pictures for the chains of these numbers, by turns."""
        return self.pictures[numbers % len(self.pictures)]

    def _run(self, x, steps, condition, watched=False):
        """Run chains; held pixels are put back after every step, and frames are kept where the chains are watched."""
        held, between = x, max(steps // FRAMES, 1)
        piece = 1 if self.free is not None else between if watched else max(steps, 1)
        settings = {"labels": condition, "module": self.model, "generator": self.generator, "graphs": self.graphs}
        if watched:
            self.frames.append(x[:GRID_CHAINS])
        for done in range(0, steps, piece):
            ends = min(done + piece, steps)
            x = run_chains(self.energy_of, x, ends - done, **settings, **self.settings)
            if self.free is not None:
                x = torch.where(self.free, x, held)
            if watched and (ends % between == 0 or ends == steps):
                self.frames.append(x[:GRID_CHAINS])
        return x

    def _slots(self):
        """Choose args.num slots of the buffer, all different: of any class, by turns of the asked ones, or by energy."""
        args, labels = self.args, self.checkpoint["buffer"]["labels"]
        order = torch.randperm(len(labels), device=labels.device, generator=self.generator)
        if args.by_energy and args.num <= len(labels):
            order = energy(predict(self.model, self.checkpoint["buffer"]["images"])).argsort()
            slots = torch.cat([order[: (args.num + 1) // 2], order[len(order) - args.num // 2 :]])
        elif not args.class_label:
            slots = order[: args.num]
        else:
            each = -(-args.num // len(args.class_label))
            rows = [order[labels[order] == label][:each] for label in args.class_label]
            slots = torch.stack([row[: min(map(len, rows))] for row in rows], dim=1).flatten()[: args.num]
        if len(slots) < args.num:
            raise UserError(
                f"the replay buffer has {len(slots)} such chains, not {args.num}: lower --num, or use --source fresh"
            )
        return slots


def part_to_sample(part, shape):
    """Return a mask (1, C, H, W), True where pixels are sampled: a name of PARTS, or an image file that is white there."""
    channels, height, width = shape
    free = torch.zeros(height, width, dtype=torch.bool)
    if part in PARTS:
        quarter, eighth = (height // 4, width // 4), (height - height // 4, width - width // 4)
        free[{
            "left": (slice(None), slice(width // 2)), "right": (slice(None), slice(width // 2, None)),
            "top": (slice(height // 2),), "bottom": (slice(height // 2, None),),
            "centre": (slice(quarter[0], eighth[0]), slice(quarter[1], eighth[1])),
        }[part]] = True  # fmt: skip
    else:
        free = data.load_images(part, (1, height, width), 1)[0, 0] > 0
    if not free.any() or free.all():
        raise UserError(f"--inpaint {part!r} leaves nothing to sample or nothing to hold: part of it must be white, part black")
    return free.expand(1, channels, height, width)
