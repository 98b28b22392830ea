"""Tasks by name. A row names a class that fulfils `base.Task`; its module is imported when it is chosen.

To add one: write the class in a file here and add its row; or keep it in your own module and set
`task.name: my_module:MyTask`. Its arguments are `task.loss` and `task.metrics`, where it has arguments of these names,
`task.args`, and the facts of the data set, such as `classes`, that it asks for by name.
"""

TASKS = {
    "none": "dist_train.tasks.own:OwnLoop",
    "classification": "dist_train.tasks.classification:Classification",
}
