"""A loop with jitter: the safety net under missed events."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)


async def repeat(
    action: Callable[[], Awaitable[None]],
    *,
    every_s: float,
    jitter_ratio: float = 0.1,
    retry_s: float = 5.0,
    rng: random.Random | None = None,
) -> None:
    """Run the action again and again, first after one pause; a failure is tried again sooner."""
    rng = rng or random.Random()
    pause_s = every_s
    while True:
        await asyncio.sleep(pause_s * (1 + jitter_ratio * (2 * rng.random() - 1)))
        try:
            await action()
            pause_s = every_s
        except Exception as error:
            logger.warning("resync failed and will be tried again", extra={"error": str(error)})
            pause_s = min(retry_s, every_s)
