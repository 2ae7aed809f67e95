"""Settings and their checks (`fields`, `settings`), composing them (`compose`), and what makes two runs the same (`identity`).

Nothing here imports torch: `--help`, `--cfg job`, completion and the answer from a finished record stay instant.
"""

from sparsebench.config.fields import NAME_PATTERN, ConfigError, build, setting
from sparsebench.config.settings import Settings, build_settings

__all__ = ["NAME_PATTERN", "ConfigError", "Settings", "build", "build_settings", "setting"]
