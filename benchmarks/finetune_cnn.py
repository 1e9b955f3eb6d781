"""What a practitioner does without deitkit: fine-tune a CNN from ImageNet on labelled photographs, with timm and torch.

    python benchmarks/finetune_cnn.py folder:flowers --checkpoint efficientnet_lite0-imagenet.safetensors

Only the split and the decoded images are deitkit's, so that the accuracy can stand in a table beside its own.
"""

import argparse
import time
from collections.abc import Sequence

import timm
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from torchvision.transforms import v2

from deitkit.data.dataset import load_dataset
from deitkit.evaluation.statistics import wilson_interval
from deitkit.recipe.schema import DataRecipe


def main(arguments: Sequence[str] | None = None) -> None:
    """Fine-tune, and print the accuracy on the test images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="As data.name of a recipe.")
    parser.add_argument("--model", default="tf_efficientnet_lite0", help="A name in timm.")
    parser.add_argument("--checkpoint", required=True, help="Its weights as safetensors.")
    parser.add_argument("--px", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    options = parser.parse_args(arguments)
    data = load_dataset(DataRecipe(name=options.data, image_px=options.px))

    torch.manual_seed(0)
    model = timm.create_model(options.model)
    model.load_state_dict(load_file(options.checkpoint))
    model.reset_classifier(data.classes)
    config = model.default_cfg
    prepare = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(config["mean"], config["std"])])
    view = v2.Compose([v2.RandomResizedCrop(options.px, scale=(0.4, 1.0)), v2.RandomHorizontalFlip(), prepare])
    optimizer = torch.optim.SGD(model.parameters(), options.learning_rate, 0.9, nesterov=True, weight_decay=5e-4)
    images, labels = data.train.pixels(torch.arange(len(data.train))), data.train.labels
    steps = len(images) // 32
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * steps)
    started = time.perf_counter()
    for epoch in range(options.epochs):
        model.train()
        for batch in torch.randperm(len(images)).split(32)[:steps]:
            loss = cross_entropy(model(torch.stack([view(image) for image in images[batch]])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}/{options.epochs}  loss {loss.item():.3f}", flush=True)
    seconds = time.perf_counter() - started

    model.eval()
    with torch.inference_mode():
        answers = torch.cat([model(prepare(some)).argmax(dim=1) for some in data.test.batches(128)])
    hits, n = int((answers == data.test.labels).sum()), len(data.test)
    low, high = wilson_interval(hits, n)
    print(f"top-1 {100 * hits / n:.1f} % [{100 * low:.1f}, {100 * high:.1f}], n = {n}, {seconds:.0f} s of training")


if __name__ == "__main__":
    main()
