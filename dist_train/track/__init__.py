"""What a run says while it goes, and what it leaves of that."""
