"""Models by name. A row names a class; its module is imported when it is chosen.

To add one: write the class in a file here and add its row; or keep it in your own module and
set `model.name: my_module:MyModel`. Facts of the data set, such as `input_shape` and `classes`, are passed to the
arguments of these names; `model.hidden`, `model.activation` and `model.dropout` are passed if they are set, and its
other arguments are `model.args`.
"""

MODELS = {
    "mlp": "dist_train.models.mlp:MLP",
    "unet": "dist_train.models.unet:UNet",
    "decoder": "dist_train.models.decoder:Decoder",
}
