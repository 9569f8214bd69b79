"""The ClientApp of a Ray simulation: the site's own app, told which folder a virtual node has.

Flower gives its virtual nodes a partition number only. A real node's site comes from its own
configuration; here it comes from a file that the engine names in the environment.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.app import app as site_app
from simulation.ray_engine import SITES_VARIABLE

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round at the virtual node's site."""
    return site_app(message, _at_site(context))


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Who the virtual node is."""
    return site_app(message, _at_site(context))


def _at_site(context: Context) -> Context:
    sites = json.loads(Path(os.environ[SITES_VARIABLE]).read_text(encoding="utf-8"))
    site = sites[int(context.node_config["partition-id"])]
    return replace(context, node_config={**context.node_config, **site})
