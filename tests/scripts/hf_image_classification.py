"""Hugging Face image classification: HfArgumentParser, a datasets.Dataset, Trainer; --do_train, --do_eval or both."""

import os
from dataclasses import dataclass, field

import datasets
import numpy as np
import torch
from notes import Notes
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from tost_plugins import TostCallback


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A folder of weights; without: from scratch"}
    )
    model_type: str = field(default="resnet")
    tost: str | None = field(default=None, metadata={"help": "A recipe; without: dense training"})


@dataclass
class DataTrainingArguments:
    train_samples: int = field(default=48)
    validation_samples: int = field(default=16)
    num_labels: int = field(default=3)


SMALL = {
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 12, 16], "depths": [1, 1, 1], "layer_type": "basic"},
    "vit": {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "image_size": 16, "patch_size": 4, "hidden_dropout_prob": 0.1,
    },
}  # fmt: skip


class NotingTrainer(Trainer):
    """As it is, but what each step trains on is written down."""

    notes = Notes()

    def training_step(self, model, inputs, *args, **kwargs):
        self.notes.saw(inputs["pixel_values"], inputs["labels"])
        return super().training_step(model, inputs, *args, **kwargs)


def make_dataset(samples: int, labels: int, seed: int) -> datasets.Dataset:
    random = np.random.default_rng(seed)
    label = random.integers(labels, size=samples)
    image = random.normal(size=(samples, 3, 16, 16)) + label[:, None, None, None] / 2
    return datasets.Dataset.from_dict({"image": image.astype(np.float32).tolist(), "label": label.tolist()})


def train_transforms(examples):
    images = [torch.tensor(image) for image in examples.pop("image")]
    examples["pixel_values"] = [image.flip(-1) if torch.rand(()) < 0.5 else image for image in images]
    return examples


def val_transforms(examples):
    examples["pixel_values"] = [torch.tensor(image) for image in examples.pop("image")]
    return examples


def collate_fn(examples):
    pixel_values = torch.stack([example["pixel_values"] for example in examples])
    return {"pixel_values": pixel_values, "labels": torch.tensor([example["label"] for example in examples])}


def compute_metrics(p):
    return {"accuracy": float((np.argmax(p.predictions, axis=1) == p.label_ids).mean())}


def quality(metrics):
    return {name: value for name, value in metrics.items() if name.endswith(("loss", "accuracy"))}


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)
    train_dataset = make_dataset(data_args.train_samples, data_args.num_labels, seed=1).with_transform(train_transforms)
    eval_dataset = make_dataset(data_args.validation_samples, data_args.num_labels, seed=2).with_transform(
        val_transforms
    )

    if model_args.model_name_or_path:
        model = AutoModelForImageClassification.from_pretrained(model_args.model_name_or_path)
    else:
        config = AutoConfig.for_model(model_args.model_type, **SMALL[model_args.model_type])
        config.num_labels = data_args.num_labels
        model = AutoModelForImageClassification.from_config(config)

    trainer = NotingTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset if training_args.do_train else None,
        eval_dataset=eval_dataset if training_args.do_eval else None,
        compute_metrics=compute_metrics,
        data_collator=collate_fn,
        callbacks=[TostCallback(model_args.tost)] if model_args.tost else None,
    )
    found = {}
    # on several ranks a Trainer that has evaluated never wraps its model in DDP (transformers 5.23)
    if training_args.do_eval and (training_args.world_size == 1 or not training_args.do_train):
        found["before"] = quality(trainer.evaluate())
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model(os.path.join(training_args.output_dir, "model"))
        trainer.log_metrics("train", result.metrics)
        trainer.save_state()
        if training_args.do_eval:
            found["after"] = quality(trainer.evaluate())
    trainer.notes.write(training_args.output_dir, model, **found)


if __name__ == "__main__":
    main()
