"""A site that is enrolled with nobody: keys and connection without a coordinator."""

from client.connection import Connection, keys_folder, save_connection, signing_key_file
from client.site_keys import make_keys


def enrol(site, *, server="127.0.0.1:9", expires="2099-01-01T00:00:00+00:00"):
    """Give a folder the keys of a site ``north``; its public signing key."""
    keys_folder(site).mkdir(mode=0o700, parents=True, exist_ok=True)
    key = make_keys(site, 1)
    text = key.public.text()
    save_connection(site, Connection("trial", "north", server, text, 1, expires))
    assert signing_key_file(site, 1).exists()
    return key.public
