"""What the command line does: list, check, compress, export.

A function per command, from paths to the text that is printed; `__main__`
reads the words of the command line and turns errors into exit statuses.
"""

from .compression import compress, recipes
from .inspection import info, verify
from .sources import as_module, exported

__all__ = ["as_module", "compress", "exported", "info", "recipes", "verify"]
