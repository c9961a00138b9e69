"""Errors that are meant for the user of a run: one sentence with field, value, rule and remedy, printed
without a traceback.

Everything else that is raised is a fault of the code (or of the machine) and keeps its traceback.
"""

from __future__ import annotations


class UserError(ValueError):
    """Something that the user can mend: a value, a file, a machine that lacks something. The message says
    how.
    """
