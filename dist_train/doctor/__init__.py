"""The checks of `python -m dist_train doctor`. A check is a function that yields lines; `report` shows them."""
