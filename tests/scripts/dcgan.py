"""DCGAN: a generator and a discriminator, two optimizers in one loop, the discriminator stepped on real and fake images."""

import argparse
import contextlib
import copy
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from notes import Notes
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from tost_plugins import Session

NOISE, WIDTH = 16, 12


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(NOISE, 2 * WIDTH, 4, 1, 0, bias=False), nn.BatchNorm2d(2 * WIDTH), nn.ReLU(True),
            nn.ConvTranspose2d(2 * WIDTH, WIDTH, 4, 2, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU(True),
            nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU(True),
            nn.ConvTranspose2d(WIDTH, 3, 4, 2, 1, bias=False), nn.Tanh(),
        )  # fmt: skip

    def forward(self, input):
        return self.main(input)


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(3, WIDTH, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(WIDTH, 2 * WIDTH, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * WIDTH), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(2 * WIDTH, 1, 4, 1, 0, bias=False), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, input):
        return self.main(input).view(-1)


def weights_init(module):
    name = type(module).__name__
    if "Conv" in name:
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif "BatchNorm" in name:
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


@torch.no_grad()
def evaluate(generator, discriminator, images, noise):
    """What the discriminator says of real and of made images, both networks in eval mode."""
    generator.eval(), discriminator.eval()
    fake = generator(noise)
    scores = {"real": discriminator(images).mean().item(), "fake": discriminator(fake).mean().item()}
    generator.train(), discriminator.train()
    return {**scores, "spread": fake.std(0).mean().item()}


def train_one_epoch(net_g, net_d, optimizer_g, optimizer_d, loader, notes):
    criterion = nn.BCELoss()
    for images, _ in loader:
        real, fake_label = torch.ones(len(images)), torch.zeros(len(images))
        noise = torch.randn(len(images), NOISE, 1, 1)
        notes.saw(images, noise)
        # discriminator: real images, then fake ones
        net_d.zero_grad()
        criterion(net_d(images), real).backward()
        fake = net_g(noise)
        criterion(net_d(fake.detach()), fake_label).backward()
        optimizer_d.step()
        # generator: make the discriminator say real
        net_g.zero_grad()
        criterion(net_d(fake), real).backward()
        optimizer_g.step()


def main(args):
    distributed, rank = "RANK" in os.environ, os.environ.get("RANK", "0")
    if distributed:
        dist.init_process_group("gloo")
    torch.manual_seed(args.seed)
    images = torch.tanh(F.interpolate(torch.randn(48, 3, 4, 4), 16))
    data = TensorDataset(images, torch.zeros(len(images)))
    sampler = DistributedSampler(data) if distributed else None
    loader = DataLoader(data, args.batch_size, shuffle=sampler is None, sampler=sampler)
    net_g, net_d, notes = Generator().apply(weights_init), Discriminator().apply(weights_init), Notes()
    fixed_noise = torch.randn(16, NOISE, 1, 1)

    if args.tost:
        sparse_g, sparse_d = Session(net_g, args.tost).attach(), Session(net_d, args.tost).attach()
    if args.resume:
        saved = torch.load(args.resume)
        net_g.load_state_dict(saved["generator"])
        net_d.load_state_dict(saved["discriminator"])
    found = {"before": evaluate(net_g, net_d, images, fixed_noise)}
    both = nn.ModuleDict({"generator": net_g, "discriminator": net_d})
    if args.test_only:
        notes.write(args.output_dir, both, **found)
        return
    ddp = {"broadcast_buffers": False}  # the discriminator runs twice before it goes back
    wrapped_g = DistributedDataParallel(net_g, **ddp) if distributed else net_g
    wrapped_d = DistributedDataParallel(net_d, **ddp) if distributed else net_d
    optimizer_g = torch.optim.Adam(wrapped_g.parameters(), lr=2e-3, betas=(0.5, 0.999))
    optimizer_d = torch.optim.Adam(wrapped_d.parameters(), lr=2e-3, betas=(0.5, 0.999))
    steps = args.epochs * len(loader)
    with contextlib.ExitStack() as sparse:
        if args.tost:
            judge = copy.deepcopy(net_d).eval()  # who looks at the generator's loss moves no norm of the discriminator
            how_g = {"criterion": lambda fake, noise: F.binary_cross_entropy(judge(fake), torch.ones(len(fake)))}
            how_d = {"criterion": lambda score, batch: F.binary_cross_entropy(score, torch.ones(len(score)))}
            sparse.enter_context(sparse_g.drive(optimizer_g, [fixed_noise], total_steps=steps, **how_g))
            sparse.enter_context(sparse_d.drive(optimizer_d, loader, total_steps=steps, **how_d))
        for epoch in range(args.epochs):
            if distributed:
                sampler.set_epoch(epoch)
            train_one_epoch(wrapped_g, wrapped_d, optimizer_g, optimizer_d, loader, notes)
            print(f"epoch {epoch}: {evaluate(net_g, net_d, images, fixed_noise)}")
    found["after"] = evaluate(net_g, net_d, images, fixed_noise)
    saved = {name: net.state_dict() for name, net in both.items()}
    torch.save(saved, os.path.join(args.output_dir, f"model.{rank}.pt"))
    notes.write(args.output_dir, both, **found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test_only", action="store_true")
    parser.add_argument("--resume")
    parser.add_argument("--tost")
    parser.add_argument("--output_dir", required=True)
    main(parser.parse_args())
