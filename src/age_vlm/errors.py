"""What a user can mend."""


class UserError(ValueError):
    """A mistake in what a user gave: one sentence that names the argument, what came and what was expected.

    Commands print the sentence and end with exit code 2. Any other exception is a fault of ours and keeps its traceback.
    """
