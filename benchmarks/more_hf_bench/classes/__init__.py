"""Classes and samples forgotten by an image classifier."""

DATASETS = (
    "digits", "fashion-mnist", "fashion-mnist-6000", "emoji-100", "cifar10", "cifar100", "tiny-imagenet",
    "imagenet-1k",
)  # fmt: skip
"""The data sets that `data.load_kd_data` knows by name, here so that the command line can list them without
torch."""
