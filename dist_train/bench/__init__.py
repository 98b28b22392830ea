"""What the command `bench` is made of: the processes that it measures, and what they are measured beside."""
