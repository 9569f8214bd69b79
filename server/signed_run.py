"""What makes the rounds of an enrolled federation signed, believed by key only, and journalled."""

from pathlib import Path

from server.chronicle import Chronicle
from server.federation_folder import load_federation, open_journal, signing_key
from server.keys import Keys
from server.members import Members
from server.nodes import NODES_FILE
from server.rounds import How

ENGINE = "engine"


def signed_run(federation: Path, run: Path) -> How:
    """How the rounds of a run are carried out for a federation.

    Args:
        federation: the coordinator's folder.
        run: the run's, where the engine keeps its nodes.

    Raises:
        ConfigError: the folder is no federation's.
        KeyFileError: the coordinator's key is missing, damaged or readable by others.
        JournalError: the journal is damaged.
    """
    own = signing_key(federation)
    settings = load_federation(federation).settings
    members = Members(federation, run / ENGINE / NODES_FILE)
    journal = open_journal(federation, own, settings.name)
    return How(keys=Keys(own, members.keys()), members=members, chronicle=Chronicle(journal))
