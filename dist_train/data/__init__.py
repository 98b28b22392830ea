"""Data sets by name. A row names a function that returns `sets.Data`; its module is imported when it is chosen.

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
}
