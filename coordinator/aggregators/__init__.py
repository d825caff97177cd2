"""How the updates of a round become the next model: pure functions over values, numpy only, one file per method.

An aggregator sees the model, the updates of a round with their weights, and two settings; it returns the next model.  It
must give the same bits for any order of the updates, be blind to a common factor of the weights, leave alone what nobody
trained, and never turn finite numbers into others.  tests/coordinator/test_aggregators.py holds every registered one to it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol, cast

from coordinator.aggregators.product import Product
from protocol import plugins
from protocol.adapters import Adapter, Factors
from protocol.errors import BadConfig
