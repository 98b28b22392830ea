"""Data sets, and transforms of batches, by name. A row names a function that returns `sets.Data`, or a class
that is a `batch_transforms.BatchTransform`; its module is imported when it is chosen.

To add one: write the function in a file here and add its row; or keep it in your own module and set
`data.name: my_module:my_function`. The function takes `root` and `download`; its other arguments are `data.args`.
"""

DATASETS = {
    "digits": "dist_train.data.digits:digits",
    "mnist": "dist_train.data.vision:mnist",
    "fashion_mnist": "dist_train.data.vision:fashion_mnist",
    "kmnist": "dist_train.data.vision:kmnist",
    "cifar10": "dist_train.data.vision:cifar10",
    "synthetic": "dist_train.data.synthetic:synthetic",
    "diabetes": "dist_train.data.diabetes:diabetes",
    "multi_label": "dist_train.data.multi_label:multi_label",
    "shapes": "dist_train.data.shapes:shapes",
    "csv_images": "dist_train.data.csv_images:csv_images",
    "image_folder": "dist_train.data.image_folder:image_folder",
    "text": "dist_train.data.text:text",
}
FROM_FILES = ("csv_images", "image_folder")
BATCH_TRANSFORMS = {
    "MixUp": "dist_train.data.batch_transforms:MixUp",
    "CutMix": "dist_train.data.batch_transforms:CutMix",
    "RandomErasing": "dist_train.data.batch_transforms:RandomErasing",
    "RandomHorizontalFlip": "dist_train.data.batch_transforms:RandomHorizontalFlip",
    "RandomCrop": "dist_train.data.batch_transforms:RandomCrop",
}
MIXING = ("MixUp", "CutMix")  # of these, those that make targets vectors
