"""What a run is to do: the typed tree, strict YAML, names to classes. No torch here."""
