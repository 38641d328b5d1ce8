"""MetaGPT on slow local models: ``api_type: local_llm`` in config2.yaml.

Importing this package makes the type known to MetaGPT, before or after MetaGPT was imported; a
normal installation does so without any import (see ``_hook``).
"""

from metagpt_localllm._hook import activate as _activate

__all__ = ["__version__"]
__version__ = "0.1.0"

_activate()
