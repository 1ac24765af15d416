"""The one error that a user can cause."""


class UserError(Exception):
    """A mistake of the user's, told in one sentence. The doors print it and end with exit code 2; it never hides a bug of ours."""
