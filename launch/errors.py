"""A user's mistake: one line, exit code 2, no stack trace."""


class UserError(Exception):
    """The line names the key, what it got, what is accepted and the nearest valid spelling."""

    def __init__(self, line: str):
        super().__init__(line)
        self.user_line = line
