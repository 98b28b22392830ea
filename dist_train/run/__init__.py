"""From a config to a running session.

Hooks by name, beside those that a user names by path; a row's module is imported when it is chosen.
"""

HOOKS = {"SampleText": "dist_train.run.sample_text:SampleText"}
