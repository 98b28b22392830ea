"""Runs as people look at them: a page, pictures, a list. Reads what runs left, and changes nothing of it. No torch."""
