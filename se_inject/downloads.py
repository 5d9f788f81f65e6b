"""Downloads: fetch a network's weights, and say plainly why they did not come.

Takes a function of timm's or torchvision's that makes a network, gives what it gives. The libraries do the work.
"""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from se_inject.errors import SourceError, get_first_line

NO_NETWORK = "give --weights FILE to load them from a file, or --no-pretrained for random ones"


def fetch(create: Callable[[], Any], name: str) -> Any:
    """Make a network, with its weights from the library's hub.

    Args:
        create: Makes it.
        name: The network's, for people.

    Raises:
        SourceError: The weights cannot be fetched, or the network cannot be built.
    """
    try:
        with offline_if_unreachable():
            return build(create, name)
    except OSError as error:  # what the hub and urllib raise without a network
        raise SourceError(
            f"the weights of {name} could not be fetched ({get_sentence(error)}); {NO_NETWORK}"
        ) from error


def build(create: Callable[[], Any], name: str) -> Any:
    """Make a network that needs nothing from the hub.

    Args:
        create: Makes it.
        name: The network's, for people.

    Raises:
        SourceError: It cannot be built.
        OSError: As `create` raises it.
    """
    try:
        return create()
    except OSError:
        raise
    except Exception as error:  # builders raise what they like, of options that they do not check
        sentence = get_sentence(error)
        hint = f"; {NO_NETWORK}" if "pretrained" in sentence else ""
        raise SourceError(f"{name:.200} cannot be built: {sentence:.300}{hint}") from error


def get_sentence(error: BaseException) -> str:
    """Return the first sentence of an error's message, or its type where it has none."""
    return get_first_line(error).partition(". ")[0].rstrip(".")


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Where the hub's name cannot be resolved, let its client go to the cache at once instead of retrying for 20 s."""
    import huggingface_hub.constants as hub

    before = hub.HF_HUB_OFFLINE
    if not before and not urllib.request.getproxies():
        try:
            socket.getaddrinfo(urlsplit(hub.ENDPOINT).hostname, 443)
        except OSError:
            hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before
