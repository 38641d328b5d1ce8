"""A slow model server on a real socket, to try and to test this package without a model.

It has the speeds, the queue, the prefix cache, the context limit and the faults of a large model on
a desktop, and a time scale that makes minutes of it pass in seconds::

    with SimulatorThread(Machine(), scale=100, faults=[parse_fault("stall:on=3,after=20")]) as simulator:
        print(simulator.base_url, simulator.stats)
"""

from metagpt_localllm.simulator.answers import Answer
from metagpt_localllm.simulator.dialects import DIALECTS, TOO_LONG
from metagpt_localllm.simulator.faults import KINDS, Fault, parse_fault
from metagpt_localllm.simulator.machine import Machine, Stats
from metagpt_localllm.simulator.server import Simulator, SimulatorThread, serve

__all__ = [
    "DIALECTS",
    "KINDS",
    "TOO_LONG",
    "Answer",
    "Fault",
    "Machine",
    "Simulator",
    "SimulatorThread",
    "Stats",
    "parse_fault",
    "serve",
]
