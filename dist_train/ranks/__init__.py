"""The processes of a run: who started them, where they meet, what they tell each other, and how they end."""
