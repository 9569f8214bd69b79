"""Private names of Flower that we rely on, and the check that this Flower has them."""

import inspect
from collections.abc import Mapping
from importlib import import_module

from agssd_core.errors import EngineError

_HOOKS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "flwr.supernode.start_client_internal": {
        "_pull_and_store_message": (
            "state",
            "object_store",
            "node_config",
            "receive",
            "get_run",
            "get_fab",
            "pull_object",
            "confirm_message_received",
            "trusted_entities",
        ),
        "_init_connection": (
            "server_address",
            "insecure",
            "root_certificates",
            "authentication_keys",
            "max_retries",
            "max_wait_time",
        ),
        "_insert_message": ("msg", "state", "store"),
        "pull_objects": ("object_ids", "pull_object_fn"),
        "time": (),
    },
    "flwr.supernode.nodestate.in_memory_nodestate": {
        "InMemoryNodeState": ("object_store",),
        "MessageEntry": ("message", "is_retrieved"),
    },
    "flwr.supercore.inflatable.inflatable_object": {
        "iterate_object_tree": ("tree",),
        "get_object_head_values_from_object_content": ("object_content",),
    },
    "flwr.supernode.runtime.run_clientapp": {
        "run_clientapp": (
            "runtime_api_address",
            "token",
            "insecure",
            "certificates",
            "parent_pid",
            "runtime_dependency_install",
        ),
        "install_from_fab": ("fab_file", "skip_prompt"),
        "get_load_client_app_fn": ("default_app_ref", "app_path", "multi_app"),
        "get_project_dir": ("fab_id", "fab_version", "fab_hash"),
        "push_task_output": ("client", "context", "sub_status", "details"),
        "Error": (),
    },
    "flwr.supercore.superexec.run_superexec": {
        "get_executor": ("executor_type", "executor_config", "insecure", "root_certificates_path"),
    },
    "flwr.supercore.cli.flower_superexec": {"flower_superexec": ()},
    "flwr.supernode.cli.flower_supernode": {"flower_supernode": ()},
    "flwr.supernode.fleet_http_client": {"FleetHttpClient": ()},
    "flwr.supercore.task_identity": {"TaskIdentity": ()},
}


def require_hooks() -> None:
    """Check that this Flower has the names that we build on.

    Raises:
        EngineError: one is missing or takes other arguments.
    """
    for module_name, names in _HOOKS.items():
        try:
            module = import_module(module_name)
        except ImportError:
            raise _other_flower(module_name) from None
        for name, wanted in names.items():
            found = getattr(module, name, None)
            if found is None:
                raise _other_flower(f"{module_name}.{name}")
            if wanted and not set(wanted) <= set(inspect.signature(found).parameters):
                raise _other_flower(f"{module_name}.{name}")


def _other_flower(name: str) -> EngineError:
    return EngineError(
        f"the installed Flower has no {name} as this version needs it. Install flwr 1.41, which "
        "constraints.txt pins."
    )
