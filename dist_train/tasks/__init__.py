"""Tasks by name. A row names a class that fulfils `base.Task`; its module is imported when it is chosen.

To add one: write the class in a file here and add its row; or keep it in your own module and set
`task.name: my_module:MyTask`. Its arguments are `task.loss` and `task.metrics`, where it has arguments of these names,
`task.args`, and the facts of the data set, such as `classes`, that it asks for by name.

Metrics are rows too, by the kind of task; a row names a class that fulfils `metrics.Metric`, and one of your own is
`task.metrics: [my_module:MyMetric]`.
"""

TASKS = {
    "none": "dist_train.tasks.own:OwnLoop",
    "classification": "dist_train.tasks.classification:Classification",
    "regression": "dist_train.tasks.regression:Regression",
    "multi_label": "dist_train.tasks.multi_label:MultiLabel",
    "segmentation": "dist_train.tasks.segmentation:Segmentation",
    "language_modelling": "dist_train.tasks.language_modelling:LanguageModelling",
    "model_loss": "dist_train.tasks.model_loss:ModelLoss",
}

METRICS = {
    "classification": {
        "accuracy": "dist_train.tasks.class_metrics:Accuracy",
        "top_k_accuracy": "dist_train.tasks.class_metrics:TopKAccuracy",
        "balanced_accuracy": "dist_train.tasks.class_metrics:BalancedAccuracy",
        "precision": "dist_train.tasks.class_metrics:Precision",
        "recall": "dist_train.tasks.class_metrics:Recall",
        "f1": "dist_train.tasks.class_metrics:F1",
    },
    "multi_label": {
        "exact_match": "dist_train.tasks.label_metrics:ExactMatch",
        "precision": "dist_train.tasks.label_metrics:Precision",
        "recall": "dist_train.tasks.label_metrics:Recall",
        "f1": "dist_train.tasks.label_metrics:F1",
    },
    "segmentation": {
        "pixel_accuracy": "dist_train.tasks.class_metrics:Accuracy",
        "mean_iou": "dist_train.tasks.class_metrics:MeanIoU",
        "dice": "dist_train.tasks.class_metrics:Dice",
    },
    "regression": {
        "mae": "dist_train.tasks.number_metrics:MAE",
        "mse": "dist_train.tasks.number_metrics:MSE",
        "rmse": "dist_train.tasks.number_metrics:RMSE",
        "r2": "dist_train.tasks.number_metrics:R2",
    },
}
