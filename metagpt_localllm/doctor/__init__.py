"""``metagpt-localllm doctor``: what holds this machine back, and what mends it.

``command`` reads the options, ``diagnosis`` goes through all of it in order, ``places``, ``machine``, ``measuring`` and ``gguf``
look at the world, ``serving``, ``fitting`` (with ``memory``) and ``timing`` judge what they saw, and ``telling`` says it. What
they hand each other are a ``subject``, a model on a server, and ``findings``.
"""

from metagpt_localllm.doctor.command import doctor

__all__ = ["doctor"]
