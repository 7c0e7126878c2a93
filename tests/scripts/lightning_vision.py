"""A LightningModule with its own training_step, a validation each epoch, gradient clipping, a cosine, ModelCheckpoint."""

import argparse
import os

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from notes import Notes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tost_plugins import TostLightning


class LitClassifier(LightningModule):
    def __init__(self, lr: float = 0.05, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 4),
        )  # fmt: skip
        self.notes = Notes()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.notes.saw(x, y)
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.log("val_loss", F.cross_entropy(logits, y), sync_dist=True)
        self.log("val_acc", (logits.argmax(1) == y).float().mean(), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9, weight_decay=1e-4)
        total = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def make_images(count: int):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 4
    return TensorDataset(torch.randn(count, 3, 8, 8, generator=generator) + y.view(-1, 1, 1, 1) / 2, y)


def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--ckpt_path")
    parser.add_argument("--test_only", action="store_true")
    parser.add_argument("--resume")
    parser.add_argument("--tost")
    parser.add_argument("--output_dir", required=True)
    return parser.parse_args()


def main(args):
    seed_everything(0)
    rank, images = os.environ.get("RANK", "0"), make_images(96)
    train_loader = DataLoader(torch.utils.data.Subset(images, range(64)), args.batch_size, shuffle=True)
    val_loader = DataLoader(torch.utils.data.Subset(images, range(64, 96)), args.batch_size)
    model = LitClassifier()
    if args.resume:
        model.load_state_dict(torch.load(args.resume))

    callbacks = [ModelCheckpoint(args.output_dir, monitor="val_loss", save_last=True)]
    if args.tost:
        callbacks.insert(0, TostLightning(args.tost))
    devices = int(os.environ.get("WORLD_SIZE", 1))
    trainer = Trainer(
        max_epochs=args.epochs, callbacks=callbacks, gradient_clip_val=1.0, accelerator="cpu", devices=devices,
        strategy="ddp" if devices > 1 else "auto", logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    found = {"before": trainer.validate(model, val_loader, verbose=False)[0]}
    if not args.test_only:
        trainer.fit(model, train_loader, val_loader, ckpt_path=args.ckpt_path)
        found["best"] = trainer.validate(model, val_loader, ckpt_path="best", verbose=False)[0]
        found["after"] = trainer.validate(model, val_loader, ckpt_path="last", verbose=False)[0]
        torch.save(model.state_dict(), os.path.join(args.output_dir, f"model.{rank}.pt"))
    model.notes.write(args.output_dir, model, **found)


if __name__ == "__main__":
    main(parse_args())
