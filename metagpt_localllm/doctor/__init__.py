"""``metagpt-localllm doctor``: what holds this machine back, and what mends it.

``command`` reads the options, ``diagnosis`` goes through all of it in order, ``places``, ``machine`` and ``measuring``
look at the world, ``serving``, ``fitting`` and ``timing`` judge what they saw, and ``telling`` says it.
"""

from metagpt_localllm.doctor.command import doctor

__all__ = ["doctor"]
