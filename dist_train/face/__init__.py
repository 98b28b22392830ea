"""The package as a Python program sees it; the names stand in `dist_train/__init__.py`."""
