"""Programs that plot a run while it trains: `open_trackers` by name, `Tracking` as the run's listener."""

from fixify.tracking.listener import Tracking
from fixify.tracking.protocol import TRACKERS, Tracker, open_trackers

__all__ = ["TRACKERS", "Tracker", "Tracking", "open_trackers"]
