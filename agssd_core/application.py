"""The application bundle that a run is submitted with: a few lines that name installed code.

No code travels. Server and site write the same text from their own installation, so a site can
tell by its digest whether the coordinator runs the version that the site's owner installed.
"""

import tomli_w

from agssd_core.protocol import PROTOCOL_VERSION

CODE_DECLINED = "declined-policy-code"
"""What a site answers to a bundle that is not on its list."""

SIZE_DECLINED = "declined-size"
"""What a site answers to a message that declares or brings more than its policy takes."""

DECLINED_UNOPENED = (CODE_DECLINED, SIZE_DECLINED)
"""Answers of a site's node itself, which no trainer has seen or signed."""

SITE_COMPONENT = "client.app:app"


def application_toml(site_component: str = SITE_COMPONENT) -> str:
    """``pyproject.toml`` of the bundle.

    Args:
        site_component: the component that Flower loads for a site; a simulation on Ray has its
            own. A site behind our launcher never loads what a bundle names.
    """
    content = {
        "project": {
            "name": "agssd",
            "version": f"{PROTOCOL_VERSION}.0.0",
            "license": "Apache-2.0",
            "description": "Components of the installed agssd-federation",
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "agssd",
                    "components": {"serverapp": "server.app:app", "clientapp": site_component},
                    "config": {"config": "", "run-folder": "", "federation": ""},
                }
            }
        },
    }
    return tomli_w.dumps(content)
