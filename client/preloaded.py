"""Imported once by the process that tasks are forked from; no torch, which must not be forked."""

from flwr.supernode.runtime import run_clientapp

from client import relay

__all__ = ["relay", "run_clientapp"]
