"""What does not depend on the framework."""

from . import recipe as recipe
